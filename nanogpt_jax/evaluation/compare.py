"""Two runs on the same text or items: how far apart they are, and whether that is more than chance."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanogpt_jax.evaluation import statistics
from nanogpt_jax.evaluation.statistics import Estimate
from nanogpt_jax.evaluation.texts import Text

CLEAR = 2.0  # standard errors from which on a difference is called clear

# what is found for each item -> what it is called, and whether less of it is better
ITEMS = {
    "choices acc": ("acc in multiple choice", False),
    "choices acc_norm": ("acc_norm in multiple choice", False),
    "words acc": ("acc in last words", False),
    "words nats": ("nats a last word", True),
}


@dataclass(frozen=True)
class Side:
    """One of the two runs, and what was found for it."""

    name: str
    block_size: int
    text: Text | None  # None: no loss was asked for
    found: dict[str, np.ndarray]  # "nats": each token's after the first of the text [N-1]; and ITEMS, [n] each


def differences(a: Side, b: Side) -> list[dict[str, Any]]:
    """b's figures less a's, each on the same stretches of text or the same items."""
    names, differences = [a.name, b.name], []
    if a.text and b.text and a.text.tokenizer.fingerprint == b.text.tokenizer.fingerprint:
        starts = statistics.stretches(len(a.found["nats"]), max(a.block_size, b.block_size))
        counts = np.diff(np.append(starts, len(a.found["nats"])))
        sums = statistics.sums_between(b.found["nats"], starts) - statistics.sums_between(a.found["nats"], starts)
        differences.append(_difference("nats a token", statistics.ratio(sums, counts), names, True))
    elif a.text and b.text:
        sums, counts = by_bytes([a.text, b.text], [a.found["nats"], b.found["nats"]], [a.block_size, b.block_size])
        bits = statistics.ratio((sums[1] - sums[0]) / math.log(2), counts)
        differences.append(_difference("bits a byte", bits, names, True))
    for key in [key for key in ITEMS if key in a.found]:
        what, less_is_better = ITEMS[key]
        less = statistics.mean(b.found[key] - a.found[key])
        differences.append(_difference(what, less, names, less_is_better))
    return differences


def _difference(what: str, less: Estimate, names: list[str], less_is_better: bool) -> dict[str, Any]:
    """A difference, b's figure less a's, and what it means."""
    ahead, behind = names[::-1] if (less.value < 0) == less_is_better else names
    error = "an unknown error" if less.error is None else f"{less.error:.4f}"
    size = f"by {abs(less.value):.4f} ± {error} {what}, {less.errors:.1f} standard errors"
    if less.value == 0:
        words = f"no difference: 0 ± {error} {what}"
    elif less.errors >= CLEAR:
        words = f"{ahead} is better than {behind} {size}"
    else:
        words = f"no clear difference: {ahead} is ahead of {behind} {size}; below {CLEAR:.0f} that may be chance"
    return {
        "what": what,
        "difference": less,
        "standard_errors": less.errors if math.isfinite(less.errors) else None,
        "better": ahead if less.errors >= CLEAR else None,
        "words": words,
    }


def by_bytes(texts: list[Text], nats: list[np.ndarray], block_sizes: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Each run's nats on the same stretches of text, and their bytes, all [n], for runs with different tokenizers.

    A stretch ends where tokens of both runs end. The first begins after both first tokens, which are not predicted.
    """
    ends = []  # of each token, in bytes
    for text in texts:
        tokenizer = text.tokenizer
        lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)])
        if tokenizer.end_of_text is not None:
            lengths[tokenizer.end_of_text] = 0
        ends.append(np.cumsum(lengths[text.tokens]))
    common = np.intersect1d(*ends)
    windows = [T * int(common[-1]) // len(text.tokens) for T, text in zip(block_sizes, texts, strict=True)]
    starts = statistics.stretches(int(common[-1]), max(1, *windows))
    cuts = np.unique(common[np.searchsorted(common, np.append(starts, common[-1]))])
    sums = []
    for end, each in zip(ends, nats, strict=True):
        places = np.searchsorted(end, cuts, side="right") - 1  # indices of nats, which begin with the second token
        sums.append(statistics.sums_between(each[places[0] : places[-1]], places[:-1] - places[0]))
    return sums, np.diff(cuts)
