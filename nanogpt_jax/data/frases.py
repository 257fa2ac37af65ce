"""Spanish sentences from a small grammar of ours: a text of which all is known that a model can learn from it.

Animals, people, colours and places. Adjectives, participles and verbs agree with their noun, over one word or more than
ten; "a el" and "de el" become "al" and "del". Some sentences name a colour, and only a look back at it tells how they
end: "Me encanta el color negro, espero algún día tener una gata así: mi gata será negra."
"""

import functools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from nanogpt_jax.data.grammar import Grammar, State, Word

SENTENCES = 16_000
SEED = 1
TEXT_SHA256 = "c8766e20aaf22eb709ce57338dc79d5eb5246d68f28540ebedcb487b56fc7d1c"

# ---- the words ------------------------------------------------------------------------------------------------------

# gender -> nouns in the singular; frequent ones first
ANIMALS = {
    "m": "gato ratón perro conejo caballo pájaro león lobo zorro burro oso pato gallo mono tigre búho",
    "f": "gata perra ardilla vaca paloma coneja oveja loba tortuga yegua gallina rana osa leona cabra liebre",
}
PEOPLE = {
    "m": "niño abuelo vecino hermano maestro médico pintor panadero pastor rey",
    "f": "niña abuela vecina hermana maestra doctora pintora panadera pastora reina",
}
PLACES = {
    "m": "jardín bosque río parque pueblo mercado patio monte castillo puente valle establo",
    "f": "casa calle plaza escuela montaña granja cueva iglesia cocina torre playa ciudad",
}
# in the masculine singular
COLOURS = "negro blanco gris rojo amarillo marrón verde azul dorado morado plateado rosado"
QUALITIES = "pequeño viejo grande joven rápido curioso tranquilo feliz gordo lento tímido valiente bonito fuerte"
OF_PLACES = "viejo pequeño grande antiguo tranquilo oscuro bonito lejano verde vacío"
FEELINGS = "cansado contento asustado enfadado triste enfermo nervioso preocupado aburrido alegre"
POSTURES = "dormido sentado escondido perdido mojado tumbado despierto herido"
# in the third person singular; what follows: "a" and whom, "de" and whom, perhaps where, "a" where, "de" where
CHASES = "persigue mira busca sigue escucha espera encuentra asusta cuida llama ayuda saluda visita recuerda"
FLEES = "huye escapa desconfía"
PLAYS = "duerme juega descansa come canta"
GOES = "va llega corre vuelve"
COMES = "sale viene regresa"

GENDERS, NUMBERS = ("m", "f"), ("s", "p")
EL = {("m", "s"): "el", ("f", "s"): "la", ("m", "p"): "los", ("f", "p"): "las"}
UN = {("m", "s"): "un", ("f", "s"): "una", ("m", "p"): "unos", ("f", "p"): "unas"}
CONTRACTED = {"a": "al", "de": "del"}  # with "el"


def plural(word: str) -> str:
    """Of a noun or an adjective."""
    if word == "joven":
        return "jóvenes"
    if word[-1] in "aeiouéíó":
        return word + "s"
    if word[-2:] in ("ón", "ín"):
        return word[:-2] + {"ó": "o", "í": "i"}[word[-2]] + "nes"
    return (word[:-1] + "c" if word[-1] == "z" else word) + "es"


def forms(adjective: str) -> dict[tuple[str, str], str]:
    """(gender, number) -> its form."""
    feminine = adjective[:-1] + "a" if adjective[-1] == "o" else adjective
    singular = {"m": adjective, "f": feminine}
    return {(g, n): plural(singular[g]) if n == "p" else singular[g] for g in GENDERS for n in NUMBERS}


def _noun(singular: str, n: str, role: str) -> Word:
    return Word(plural(singular) if n == "p" else singular, role)


def _agreeing(adjective: str, g: str, n: str, *roles: str) -> Word:
    every = forms(adjective)
    return Word(every[g, n], agrees=roles, forms=tuple(dict.fromkeys(every.values())))


def _doing(verb: str, n: str, role: str) -> Word:
    both = (verb, "son" if verb == "es" else verb + "n")
    return Word(both[n == "p"], agrees=(role,), forms=both)


# ---- the rules ------------------------------------------------------------------------------------------------------
# Each gives what may replace a symbol, with weights. g: gender, n: number, role: of the noun that is spoken of.

Options: TypeAlias = list[tuple[float, State]]
RELATIVE = {"subject": 0.4, "object": 0.45}  # how often a clause says more of it


def _by_rank(words: str, share: float = 1.0) -> list[tuple[float, str]]:
    """Weights that sum to `share`: as in real texts, the first word is twice as frequent as the second (Zipf)."""
    ranked = list(enumerate(words.split(), start=1))
    total = sum(1 / rank for rank, _ in ranked)
    return [(share / rank / total, word) for rank, word in ranked]


def _evenly(words: str, share: float = 1.0) -> list[tuple[float, str]]:
    return [(share / len(words.split()), word) for word in words.split()]


def _articles() -> Iterator[tuple[str, str, float, str]]:
    """(gender, number, weight, article)"""
    for g, n in EL:
        yield g, n, 0.15 if n == "s" else 0.10, EL[g, n]
        yield g, n, 0.05 if n == "s" else 0.03, UN[g, n]


def _words(text: str) -> State:
    return tuple(map(Word, text.split()))


def _sentence() -> Options:
    end = (Word("."), Word("\n"))
    statements: Options = [
        (weight, (Word(article.capitalize()), ("animate", g, n, "subject"), ("predicate", g, n), *end))
        for g, n, weight, article in _articles()
    ]
    return [*statements, (0.15, (Word("Me"), ("likes",), *end))]


def _predicate(g: str, n: str) -> Options:
    return [(1.0, (("verb", g, n, "subject", "object"), ("and", g, n)))]


def _and(g: str, n: str) -> Options:
    """How the subject is, after all that came between."""
    so: State = (_doing("está", n, "subject"), ("feeling", g, n, "subject"))
    return [(0.65, ()), (0.25, (*_words(", pero"), *so)), (0.1, (Word("y"), *so))]


def _phrase(preposition: str, what: str, role: str) -> Options:
    """A preposition, an article, and a noun with what belongs to it: the symbol `what`."""
    weights = {article: weight for _, _, weight, article in _articles()}
    contracted = weights["el"] / sum(weights.values())
    apart: State = (Word(preposition), ("article", preposition, what, role))
    if preposition not in CONTRACTED:
        return [(1.0, apart)]
    return [(contracted, (Word(CONTRACTED[preposition]), (what, "m", "s", role))), (1 - contracted, apart)]


def _article(preposition: str, what: str, role: str) -> Options:
    return [
        (weight, (Word(article), (what, g, n, role)))
        for g, n, weight, article in _articles()
        if not (article == "el" and preposition in CONTRACTED)
    ]


def _animate(g: str, n: str, role: str) -> Options:
    """An animal or a person, perhaps with an adjective and a clause."""
    clause: State = (("relative", g, n, role),) if role in RELATIVE else ()
    return [
        (weight, (_noun(noun, n, role), ("adjective", kind, g, n, role), *clause))
        for kind, nouns in (("animal", _by_rank(ANIMALS[g], 0.75)), ("person", _by_rank(PEOPLE[g], 0.25)))
        for weight, noun in nouns
    ]


def _place(g: str, n: str, role: str) -> Options:
    more: State = (("adjective", "place", g, n, role), ("owned",))
    return [(weight, (_noun(noun, n, role), *more)) for weight, noun in _by_rank(PLACES[g])]


def _owned() -> Options:
    return [(0.85, ()), (0.15, (("phrase", "de", "owner", "owner"),))]


def _owner(g: str, n: str, role: str) -> Options:
    return [(weight, (_noun(noun, n, role),)) for weight, noun in _by_rank(PEOPLE[g])]


def _adjective(kind: str, g: str, n: str, role: str) -> Options:
    """Right after its noun, or none."""
    words = {
        "animal": _evenly(COLOURS, 0.2) + _evenly(QUALITIES, 0.15),
        "person": _evenly(QUALITIES, 0.35),
        "place": _evenly(OF_PLACES, 0.35),
    }
    return [(0.65, ()), *((weight, (_agreeing(a, g, n, role),)) for weight, a in words[kind])]


def _relative(g: str, n: str, role: str) -> Options:
    often = RELATIVE[role]
    return [(1 - often, ()), (often, (Word("que"), ("verb", g, n, role, "inner")))]


def _verb(g: str, n: str, role: str, other: str) -> Options:
    """What somebody is or does; `other` is the role of whom it is done to."""
    is_so = 3 if other == "inner" else 1  # more often in a clause, or else too few of an object's tell how it is
    kinds: list[tuple[float, str, State]] = [
        (0.18 * is_so, "está", (("feeling", g, n, role),)),
        (0.07 * is_so, "es", (("quality", g, n, role),)),
        (0.35, CHASES, (("phrase", "a", "animate", other),)),
        (0.08, FLEES, (("phrase", "de", "animate", other),)),
        (0.10, "vive", (("phrase", "en", "place", "place"),)),
        (0.10, PLAYS, (("where",),)),
        (0.07, GOES, (("phrase", "a", "place", "place"),)),
        (0.05, COMES, (("phrase", "de", "place", "place"),)),
    ]
    return [(weight, (_doing(verb, n, role), *then)) for w, verbs, then in kinds for weight, verb in _by_rank(verbs, w)]


def _where() -> Options:
    return [(0.5, ()), (0.5, (("phrase", "en", "place", "place"),))]


def _feeling(g: str, n: str, role: str) -> Options:
    words = _evenly(FEELINGS, 0.45) + _evenly(POSTURES, 0.35)
    return [(0.2, (Word("muy"), ("degree", FEELINGS, g, n, role))), *_each(words, g, n, role)]


def _quality(g: str, n: str, role: str) -> Options:
    return [(0.2, (Word("muy"), ("degree", QUALITIES, g, n, role))), *_each(_evenly(QUALITIES, 0.8), g, n, role)]


def _degree(words: str, g: str, n: str, role: str) -> Options:
    return _each(_evenly(words), g, n, role)


def _each(adjectives: Iterable[tuple[float, str]], g: str, n: str, role: str) -> Options:
    return [(weight, (_agreeing(adjective, g, n, role),)) for weight, adjective in adjectives]


def _likes() -> Options:
    return [(0.6, (*_words("encanta el color"), ("colour",))), (0.4, (*_words("gusta el color"), ("colour",)))]


def _colour() -> Options:
    hope = _words(", espero algún día tener")
    return [(weight, (Word(c, "colour"), *hope, ("wish", c))) for weight, c in _evenly(COLOURS)]


def _wish(colour: str) -> Options:
    return [(0.5, (Word(UN[g, "s"]), ("wished", colour, g))) for g in GENDERS]


def _wished(colour: str, g: str) -> Options:
    will_be: State = (("detour",), Word("será"), _agreeing(colour, g, "s", "wish", "colour"))
    return [
        (weight, (Word(noun), *_words("así : mi"), Word(noun, "wish"), *will_be))
        for weight, noun in _by_rank(ANIMALS[g])
    ]


def _detour() -> Options:
    return [(0.7, ()), (0.3, (*_words(", que vivirá"), ("phrase", "en", "place", "place"), Word(",")))]


RULES = {
    rule.__name__.removeprefix("_"): rule
    for rule in (
        *(_sentence, _predicate, _and, _phrase, _article, _animate, _place, _owned, _owner, _adjective, _relative),
        *(_verb, _where, _feeling, _quality, _degree, _likes, _colour, _wish, _wished, _detour),
    )
}


@functools.cache
def grammar() -> Grammar:
    return Grammar(("sentence",), RULES)


# ---- text -----------------------------------------------------------------------------------------------------------


@functools.cache
def text() -> str:
    """The corpus: a sentence a line. The same bytes with every version of Python."""
    chance = random.Random(SEED)
    return "".join(written(grammar().sentence(chance)) for _ in range(SENTENCES))


def written(sentence: Iterable[Word]) -> str:
    """The text of words that begin a sentence."""
    return re.sub(r" ([,.:\n])", r"\1", " ".join(word.text for word in sentence))


def words_of(sentence: str) -> list[str]:
    """Words and marks: what the tokenizer `word` makes of it, without the spaces."""
    return re.findall(r"\w+|[^\w\s]|\n", sentence)


# ---- what agrees with what ------------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """A word whose form others decide. Places count words and marks from the beginning of the sentence: tokens."""

    at: int
    word: Word
    decided_by: tuple[int, ...]  # the places of the noun and, of a colour that was named before, of its name

    def distance(self, words: Sequence[Word]) -> int:
        """In words, without marks: 1 if the noun stands right before it."""
        return sum(word.text.isalpha() for word in words[self.decided_by[0] + 1 : self.at + 1])


def agreements(words: Sequence[Word]) -> list[Agreement]:
    """Every word of a sentence, or of its beginning, that agrees with one before it.

    `words` is what `grammar().read(words_of("La gata está cansada."))` gives.
    """
    found, places = [], {}
    for at, word in enumerate(words):
        if word.agrees:
            found.append(Agreement(at, word, tuple(places[role] for role in word.agrees)))
        if word.role:
            places[word.role] = at
    return found


FAR = 6  # words
COLOUR = "colour after así"


def items(each: int = 200, seed: int = 1) -> list[dict[str, Any]]:
    """Multiple choice with `each` items a group: sentences, cut before a word that agrees, and what it could be.

    In the groups "agreement, 1 word" to "agreement, 6 words or more" (between noun and adjective or participle) and
    "verb, ..." all forms of the word are to choose from; in "colour after así", all colours in the noun's gender. Words
    with one form for all are left out. `decided_by` holds the tokens that decide, as in `Agreement`.
    """
    chance, found = random.Random(f"items {seed}".encode()), {group: [] for group in _groups()}
    while any(len(group) < each for group in found.values()):
        words = grammar().sentence(chance)
        for agreement in agreements(words):
            group, choices = _question(words, agreement)
            if len(choices) > 1 and len(found[group]) < each:
                query = written(words[: agreement.at])
                item = {"query": query, "choices": choices, "gold": choices.index(agreement.word.text), "group": group}
                found[group].append({**item, "decided_by": list(agreement.decided_by)})
                break  # one item a sentence, so that items are independent
    return [item for group in found.values() for item in group]


def _groups() -> list[str]:
    near = [f"agreement, {n} word{'s' * (n > 1)}" for n in range(1, FAR)]
    return [
        *near,
        f"agreement, {FAR} words or more",
        f"verb, 1 to {FAR - 1} words",
        f"verb, {FAR} words or more",
        COLOUR,
    ]


def _question(words: Sequence[Word], agreement: Agreement) -> tuple[str, list[str]]:
    """The group of an item, and the choices."""
    word, distance = agreement.word, agreement.distance(words)
    if len(agreement.decided_by) > 1:
        g = next(g for g in GENDERS if words[agreement.decided_by[0]].text in ANIMALS[g].split())
        return COLOUR, [forms(colour)[g, "s"] for colour in COLOURS.split()]
    groups = _groups()
    if word.forms[0] in _verbs():
        return groups[FAR + (distance >= FAR)], list(word.forms)
    return groups[min(distance, FAR) - 1], list(word.forms)


@functools.cache
def _verbs() -> set[str]:
    return set(f"está es vive {CHASES} {FLEES} {PLAYS} {GOES} {COMES}".split())
