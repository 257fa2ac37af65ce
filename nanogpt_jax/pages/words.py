"""What a page says, in each language. {name} is filled in: by Python, or by the page's script."""

ATTENTION = {
    "en": {
        "title": "Attention in {run}",
        "about": (
            "Step {step}: {layers} layers of {heads} heads, {tokens} tokens of text ({tokenizer}). Made by "
            "nanogpt-jax attend. This file needs no network. Layers, heads and tokens count from 1. ␣ is a space,"
            " ↵ a newline; a token like <0xC3> is a byte, a part of a character."
        ),
        "cut": "The text has {all} tokens, and the model sees {tokens} at once: this page shows the first {tokens}.",
        "no_script": "The page draws its numbers with a script, and scripts are switched off in this browser.",
        "text_title": "The text, and the loss of each token",
        "text_about": (
            "Under each token stands its loss in nats, −ln of the probability that the model gave it after the "
            "tokens before it: 0 if it was sure, more if it was surprised. Choose a token: everything below is "
            "about it."
        ),
        "colour_by": "The tokens show",
        "loss": "loss",
        "difference": "loss less that of {versus}",
        "versus_says": (
            "{versus}, step {step}, has a mean loss of {theirs} on this text, and {run} one of {ours}. A negative"
            " difference: {run} expected the token more."
        ),
        "nats": "nats",
        "noLoss": "no loss, as nothing is before it",
        "all_title": "All layers and heads",
        "all_about": (
            "Each picture is one head: a row for each token that asks, a column for each token that it looks at. "
            "Darker (on a dark page: lighter) is more. Arrow keys move, and the head that is chosen is shown in "
            "full below."
        ),
        "sort_by": "Sort by",
        "sort_place": "layer and head",
        "entropy": "entropy in bits (lowest first)",
        "distance": "tokens looked back (most first)",
        "first": "share of the first token (most first)",
        "heads_table": "All heads as a table",
        "headsTable": "Each figure is a mean over the rows of the head",
        "head": "head",
        "headName": "layer {layer}, head {head}",
        "headSays": "entropy {entropy} bits, looks {distance} tokens back, {first} on the first token",
        "oneHead": "One head in full",
        "head_about": (
            "A row holds the weights of one token over itself and those before it. They sum to 1. What comes "
            "later is masked: its weight is exactly 0."
        ),
        "head_keys": (
            "Point at a cell, or focus the picture and use the arrow keys: up and down change the token that "
            "asks, left and right the token that it looks at. Page Up and Page Down move ten rows, Home goes to "
            "the first token, End to the token itself. A click holds the cell until the next click or Escape."
        ),
        "matrix": "Attention weights",
        "masked": "masked",
        "left_out": "left out of this page",
        "leftOut": "left out",
        "shade": "The shade grows with the square root of the weight, so that small weights are seen.",
        "reads": (
            "{query} looks at {key}: weight {weight}, score before the softmax {score}, ‖α·V‖ {push} (‖V‖ {norm})."
        ),
        "readsMasked": "{query} cannot look at {key}, which comes later: masked, weight exactly 0.",
        "readsLeftOut": "{query} looks at {key}: this weight is small and was left out of the page.",
        "rowSays": (
            "The row of {query}: entropy {entropy} bits, looks {distance} tokens back in the mean; {first} goes "
            "to the first token, «{sink}», the sink: where many heads put the weight that they have no use for. "
            "The weights stored here sum to {sum}."
        ),
        "rowKept": "Of this row the first and the largest are kept, {kept} in all; {mass} of its weight is left out.",
        "largest": "What {query} looks at most",
        "number": "no.",
        "token": "token",
        "weight": "weight",
        "score": "score",
        "push": "‖α·V‖",
        "row_table": "The whole row as a table",
        "rowTable": "The row of {query}",
        "rowTitle": "What {query} looks at in {where}",
        "weight_alone": (
            "A weight alone explains nothing. What moves the output is the weight times the value, α·V: a token "
            "with a large weight and a short value adds little. And other layers and the residual stream carry "
            "the text past every head."
        ),
        "piece": "part of a character",
        "pieceOf": "part of the character {whole}",
        "lensTitle": "What the model expects after {query}",
        "lensNext": "Next in the text is «{next}» ✓, to which the model gives {chance}: a loss of {loss} nats.",
        "lensEnd": "The text ends here.",
        "lens_about": (
            "Each row reads the vector of this token after a layer by the model's own last norm and head (the "
            "logit lens, nostalgebraist 2020). Early layers do not write for the head, so their rows are hints. "
            "The divergence says how far a row is from the model's answer: KL in nats, 0 in the last row."
        ),
        "lensCaption": "The likeliest next tokens, by layer",
        "lensFirst": "embedding and position",
        "lensAfter": "after layer {layer}",
        "lensLast": "after layer {layer}: the answer",
        "stage": "read",
        "divergence": "divergence",
        "word_title": "«{word}» in {n} sentences",
        "word_about": (
            "The cosine of the word's vectors in two sentences, as the layers give it its context: 1 is the same "
            "direction. A word of several tokens is its last one, in [brackets] here."
        ),
        "word_baseline": (
            "Cosines of a GPT-2 lie near 1 for anything (Ethayarajh 2019), because a few dimensions are large "
            "everywhere (Timkey and van Schijndel 2021). So compare each with “unrelated”, the mean cosine of "
            "different tokens at that layer, and with the standardised ones: each dimension less its mean, "
            "divided by its deviation. Both are taken from {vectors} vectors, of these sentences and of {texts} "
            "texts that the model itself wrote (seed {seed})."
        ),
        "word_other": "In these sentences the word ends in different tokens ({tokens}), so even the embeddings differ.",
        "word_caption": "Cosine of «{word}» between sentences",
        "word_pair": "{a} and {b}",
        "word_pair_standardised": "{a} and {b}, standardised",
        "word_unrelated": "unrelated",
        "word_unrelated_standardised": "unrelated, standardised",
        "word_embedding": "token embedding alone",
        "word_position": "with its position",
        "exact_title": "How exact these numbers are",
        "exact": (
            "The weights, scores and values come from the model's own forward pass, in which each row sums to 1 "
            "within {sum}. Here each weight is stored as one of 256 levels, off by at most 1/255, and small ones "
            "by at most 10 %; a score, read back from its weight, by at most 0.1. Weights below 2e-7 are shown as"
            " 0. {left_out}"
        ),
        "exact_whole": "No weight is left out.",
        "exact_left_out": (
            "Of each row only the first and the largest are kept, {kept} weights: {mean} is left out in the mean, "
            "{worst} in the worst row."
        ),
    },
    "es": {
        "title": "La atención en {run}",
        "about": (
            "Paso {step}: {layers} capas de {heads} cabezas, {tokens} tokens de texto ({tokenizer}). Hecho por "
            "nanogpt-jax attend. Este archivo no necesita red. Capas, cabezas y tokens se cuentan desde 1. ␣ es "
            "un espacio, ↵ un salto de línea; un token como <0xC3> es un byte, una parte de un carácter."
        ),
        "cut": (
            "El texto tiene {all} tokens y el modelo ve {tokens} a la vez: esta página muestra los primeros {tokens}."
        ),
        "no_script": "La página dibuja sus números con un script, y este navegador tiene los scripts desactivados.",
        "text_title": "El texto y la pérdida de cada token",
        "text_about": (
            "Bajo cada token está su pérdida en nats, −ln de la probabilidad que el modelo le dio tras los tokens"
            " anteriores: 0 si estaba seguro, más si se sorprendió. Elige un token: todo lo de abajo trata de él."
        ),
        "colour_by": "Los tokens muestran",
        "loss": "pérdida",
        "difference": "pérdida menos la de {versus}",
        "versus_says": (
            "{versus}, paso {step}, tiene una pérdida media de {theirs} en este texto, y {run} una de {ours}. "
            "Diferencia negativa: {run} esperaba más ese token."
        ),
        "nats": "nats",
        "noLoss": "sin pérdida, porque no tiene nada delante",
        "all_title": "Todas las capas y cabezas",
        "all_about": (
            "Cada imagen es una cabeza: una fila por token que pregunta, una columna por token al que mira. Más "
            "oscuro (en una página oscura: más claro) es más. Las flechas se mueven, y la cabeza elegida se "
            "muestra entera más abajo."
        ),
        "sort_by": "Ordenar por",
        "sort_place": "capa y cabeza",
        "entropy": "entropía en bits (menor primero)",
        "distance": "tokens hacia atrás (mayor primero)",
        "first": "parte del primer token (mayor primero)",
        "heads_table": "Todas las cabezas en una tabla",
        "headsTable": "Cada cifra es una media sobre las filas de la cabeza",
        "head": "cabeza",
        "headName": "capa {layer}, cabeza {head}",
        "headSays": "entropía de {entropy} bits, mira {distance} tokens atrás, {first} al primer token",
        "oneHead": "Una cabeza entera",
        "head_about": (
            "Una fila contiene los pesos de un token sobre sí mismo y los anteriores. Suman 1. Lo que viene "
            "después está enmascarado: su peso es exactamente 0."
        ),
        "head_keys": (
            "Señala una celda, o enfoca la imagen y usa las flechas: arriba y abajo cambian el token que "
            "pregunta, izquierda y derecha el token al que mira. RePág y AvPág mueven diez filas, Inicio va al "
            "primer token, Fin al propio token. Un clic fija la celda hasta el siguiente clic o Escape."
        ),
        "matrix": "Pesos de atención",
        "masked": "enmascarado",
        "left_out": "fuera de esta página",
        "leftOut": "omitido",
        "shade": "El tono crece con la raíz cuadrada del peso, para que se vean los pesos pequeños.",
        "reads": (
            "{query} mira a {key}: peso {weight}, puntuación antes del softmax {score}, ‖α·V‖ {push} (‖V‖ {norm})."
        ),
        "readsMasked": "{query} no puede mirar a {key}, que viene después: enmascarado, peso exactamente 0.",
        "readsLeftOut": "{query} mira a {key}: este peso es pequeño y quedó fuera de la página.",
        "rowSays": (
            "La fila de {query}: entropía de {entropy} bits, mira {distance} tokens atrás de media; {first} va al"
            " primer token, «{sink}», el sumidero: donde muchas cabezas dejan el peso que no necesitan. Los pesos"
            " guardados aquí suman {sum}."
        ),
        "rowKept": "De esta fila quedan el primero y los mayores, {kept} en total; {mass} de su peso queda fuera.",
        "largest": "A qué mira más {query}",
        "number": "n.º",
        "token": "token",
        "weight": "peso",
        "score": "puntuación",
        "push": "‖α·V‖",
        "row_table": "La fila entera en una tabla",
        "rowTable": "La fila de {query}",
        "rowTitle": "A qué mira {query} en {where}",
        "weight_alone": (
            "Un peso solo no explica nada. Lo que mueve la salida es el peso por el valor, α·V: un token con "
            "mucho peso y un valor corto añade poco. Además, otras capas y el flujo residual llevan el texto por "
            "fuera de cada cabeza."
        ),
        "piece": "parte de un carácter",
        "pieceOf": "parte del carácter {whole}",
        "lensTitle": "Qué espera el modelo después de {query}",
        "lensNext": "En el texto sigue «{next}» ✓, al que el modelo da un {chance}: una pérdida de {loss} nats.",
        "lensEnd": "Aquí termina el texto.",
        "lens_about": (
            "Cada fila lee el vector de este token tras una capa con la última norma y la cabeza de salida del "
            "propio modelo (logit lens, nostalgebraist 2020). Las primeras capas no escriben para la salida: sus "
            "filas son indicios. La divergencia dice cuán lejos está una fila de la respuesta del modelo: KL en "
            "nats, 0 en la última fila."
        ),
        "lensCaption": "Los siguientes tokens más probables, por capa",
        "lensFirst": "embedding y posición",
        "lensAfter": "tras la capa {layer}",
        "lensLast": "tras la capa {layer}: la respuesta",
        "stage": "lectura",
        "divergence": "divergencia",
        "word_title": "«{word}» en {n} frases",
        "word_about": (
            "El coseno de los vectores de la palabra en dos frases, a medida que las capas le dan su contexto: 1 "
            "es la misma dirección. De una palabra de varios tokens se toma el último, aquí entre [corchetes]."
        ),
        "word_baseline": (
            "En un GPT-2 los cosenos están cerca de 1 para cualquier cosa (Ethayarajh 2019), porque unas pocas "
            "dimensiones son grandes en todas partes (Timkey y van Schijndel 2021). Compara cada uno con "
            "«ajenas», el coseno medio de tokens distintos en esa capa, y con los estandarizados: cada dimensión "
            "menos su media, dividida por su desviación. Ambos salen de {vectors} vectores, de estas frases y de "
            "{texts} textos que escribió el propio modelo (semilla {seed})."
        ),
        "word_other": (
            "En estas frases la palabra termina en tokens distintos ({tokens}), así que ya los embeddings difieren."
        ),
        "word_caption": "Coseno de «{word}» entre frases",
        "word_pair": "{a} y {b}",
        "word_pair_standardised": "{a} y {b}, estandarizado",
        "word_unrelated": "ajenas",
        "word_unrelated_standardised": "ajenas, estandarizado",
        "word_embedding": "solo el embedding del token",
        "word_position": "con su posición",
        "exact_title": "Cuán exactos son estos números",
        "exact": (
            "Los pesos, puntuaciones y valores salen del propio paso hacia delante del modelo, en el que cada "
            "fila suma 1 con un error de {sum}. Aquí cada peso se guarda como uno de 256 niveles, con un error de"
            " 1/255 como mucho, y los pequeños de un 10 % como mucho; una puntuación, recuperada de su peso, de "
            "0,1 como mucho. Los pesos menores que 2e-7 se muestran como 0. {left_out}"
        ),
        "exact_whole": "No falta ningún peso.",
        "exact_left_out": (
            "De cada fila solo se guardan el primero y los mayores, {kept} pesos: queda fuera {mean} de media, {worst}"
            " en la peor fila."
        ),
    },
}
