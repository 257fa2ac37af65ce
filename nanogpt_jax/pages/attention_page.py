"""The page of `nanogpt-jax attend`: from what was watched and read to HTML with its numbers inside."""

# T tokens, L layers, H heads, N = L + 2 stages of a word: its embedding, with its position, after each layer

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanogpt_jax.pages import attention, html, words
from nanogpt_jax.pages.attention import Cosines
from nanogpt_jax.pages.tokens import pieces, shown

LANGUAGES = tuple(words.ATTENTION)


@dataclass(frozen=True)
class Watched:
    """A text of T tokens, and what the model computed for it; model/watching.py explains the arrays."""

    tokens: list[int]
    scores: np.ndarray  # [L, H, T, T]
    weights: np.ndarray  # [L, H, T, T]
    value_norms: np.ndarray  # [L, H, T]
    losses: np.ndarray  # [T-1]
    likeliest: np.ndarray  # [L+1, T, n]
    probability: np.ndarray  # [L+1, T, n]
    divergence: np.ndarray  # [L+1, T]


@dataclass(frozen=True)
class Other:
    """The run that the losses are compared with."""

    run: str
    step: int
    losses: np.ndarray  # [T-1]


@dataclass(frozen=True)
class Word:
    """One word in n sentences."""

    word: str
    sentences: list[list[bytes]]  # the tokens of each
    positions: list[int]  # the word's last token in each
    cosines: Cosines  # of N stages
    vectors: int  # how many the baseline is from
    texts: int  # how many of them the model wrote
    seed: int


@dataclass(frozen=True)
class About:
    run: str
    step: int
    tokenizer: str
    n_all: int  # tokens of the text before it was cut to the context
    head: tuple[int, int]  # shown first: layer and head, from 0
    language: str = "en"


def page(
    about: About, seen: Watched, token_bytes: Callable[[int], bytes], versus: Other | None, word: Word | None
) -> str:
    """The whole page. `token_bytes` gives the bytes of a token."""
    say = words.ATTENTION[about.language]
    L, H, T, _ = seen.weights.shape
    kept = attention.stored(seen.weights)
    off = float(np.abs(seen.weights.sum(-1, dtype=np.float64) - 1).max())
    texts = {
        **say,
        "title": say["title"].format(run=about.run),
        "about": say["about"].format(step=about.step, layers=L, heads=H, tokens=T, tokenizer=about.tokenizer),
        "notes": "".join(f'<p class="note">{html.escape(note)}</p>' for note in _notes(about, seen, versus)),
        "word": _word(word, say, about.language) if word else "",
        "exact": say["exact"].format(sum=f"{off:.0e}", left_out=_left_out(kept, say, about.language)),
    }
    return html.page(
        texts["title"],
        html.filled(html.asset("attention.html"), texts),
        style=html.asset("attention.css"),
        script=f"\n{html.asset('attention.js')}",
        data=_data(about, seen, token_bytes, versus, kept),
        language=about.language,
    )


def _data(
    about: About, seen: Watched, token_bytes: Callable[[int], bytes], versus: Other | None, kept: attention.Stored
) -> dict[str, Any]:
    """What attention.js reads."""
    say = words.ATTENTION[about.language]
    L, H, T, _ = seen.weights.shape
    used, inverse = np.unique(np.concatenate([seen.tokens, seen.likeliest.ravel()]), return_inverse=True)
    heads = attention.heads(seen.weights)
    data: dict[str, Any] = {
        "language": about.language,
        "words": {**say, "difference": say["difference"].format(versus=versus.run if versus else "")},
        "L": L,
        "H": H,
        "T": T,
        "K": kept.kept,
        "head": about.head[0] * H + about.head[1],
        "vocabulary": [shown(token_bytes(int(token))) for token in used],
        "text": inverse[:T].tolist(),
        "pieces": pieces([token_bytes(token) for token in seen.tokens]),
        "levels": _rounded(attention.LEVELS, 6),
        "codes": attention.as_text(kept.codes),
        "keys": None if kept.keys is None else attention.as_text(kept.keys.astype("<u2")),
        "logSums": attention.packed(attention.log_sums(seen.scores, seen.weights)),
        "valueNorms": attention.packed(seen.value_norms),
        "likeliest": attention.as_text(inverse[T:].astype("<u4")),
        "probability": attention.packed(seen.probability),
        "divergence": attention.packed(seen.divergence),
        **{name: _rounded(getattr(heads, name), 5) for name in heads._fields},
        "loss": [None, *_rounded(seen.losses, 5)],
    }
    if versus:
        data["difference"] = [None, *_rounded(seen.losses - versus.losses, 5)]
    return data


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values.ravel().tolist()]


def _number(value: float, digits: int, language: str) -> str:
    text = f"{value:.{digits}f}"
    return text.replace(".", ",") if language == "es" else text


def _notes(about: About, seen: Watched, versus: Other | None) -> list[str]:
    say, T = words.ATTENTION[about.language], len(seen.tokens)
    notes = [say["cut"].format(all=about.n_all, tokens=T)] if about.n_all > T else []
    if versus and T > 1:
        ours, theirs = (_number(float(x.mean()), 3, about.language) for x in (seen.losses, versus.losses))
        notes.append(
            say["versus_says"].format(run=about.run, versus=versus.run, step=versus.step, ours=ours, theirs=theirs)
        )
    return notes


def _left_out(kept: attention.Stored, say: dict[str, str], language: str) -> str:
    if not kept.kept:
        return say["exact_whole"]
    mean, worst = (f"{_number(100 * share, 1, language)} %" for share in kept.left_out)
    return say["exact_left_out"].format(kept=kept.kept, mean=mean, worst=worst)


def _word(word: Word, say: dict[str, str], language: str) -> str:
    """The section about one word in several sentences; all of it is in the HTML."""
    n, found = len(word.sentences), word.cosines
    items = "".join(f"<li>{_sentence(*one)}</li>" for one in zip(word.sentences, word.positions, strict=True))
    pairs = list(itertools.combinations(range(n), 2))
    heads = [say["stage"]]
    heads += [say["word_pair"].format(a=a + 1, b=b + 1) for a, b in pairs] + [say["word_unrelated"]]
    heads += [say["word_pair_standardised"].format(a=a + 1, b=b + 1) for a, b in pairs]
    heads += [say["word_unrelated_standardised"]]
    stages = [say["word_embedding"], say["word_position"]]
    stages += [say["lensAfter"].format(layer=layer + 1) for layer in range(len(found.pairs) - 2)]
    rows: list[list[object]] = []
    for stage, *figures in zip(stages, *found, strict=True):
        columns = [x for both in (figures[:2], figures[2:]) for x in (*(both[0][a, b] for a, b in pairs), both[1])]
        rows.append([stage, *(_number(float(x), 3, language) for x in columns)])
    ends = sorted({shown(tokens[position]) for tokens, position in zip(word.sentences, word.positions, strict=True)})
    notes = [say["word_about"]]
    if len(ends) > 1:
        notes.append(say["word_other"].format(tokens=", ".join(f"«{end}»" for end in ends)))
    notes.append(say["word_baseline"].format(vectors=word.vectors, texts=word.texts, seed=word.seed))
    title = html.escape(say["word_title"].format(word=word.word, n=n))
    table = html.table(heads, rows, say["word_caption"].format(word=word.word))
    return (
        f'<section aria-labelledby="word-title">\n<h2 id="word-title">{title}</h2>\n<ol>{items}</ol>\n'
        + "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
        + f'<div class="scrolls" tabindex="0" role="group" aria-labelledby="word-title">{table}</div>\n</section>'
    )


def _sentence(tokens: Sequence[bytes], position: int) -> str:
    before, after = (b"".join(part).decode("utf-8", "replace") for part in (tokens[:position], tokens[position + 1 :]))
    return f"{html.escape(before)}<mark>[{html.escape(shown(tokens[position]))}]</mark>{html.escape(after)}"
