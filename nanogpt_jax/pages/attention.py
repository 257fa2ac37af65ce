"""What a model computed for one text, as the numbers of a page: small enough to be inside it, and how far off they are.

A weight takes one byte: its place among 256 `LEVELS`. From 0.08 on the levels are 2/255 apart; below that, each is 10 %
above the last, down to 2e-7. So a weight is never off by more than 1/255. A score, which the page takes from the weight
as ln(weight) + the row's log-sum-exp, is off by 0.05; where a weight was moved to the level on its other side, so that
its row sums to 1, by 0.1. (A byte linear in the weight would know nothing of scores below 1/255, and a square root
little.)
"""

# T tokens, L layers, H heads, K weights that are kept of each row

import base64
from typing import Any, NamedTuple

import numpy as np

ROOM = 9_000_000  # bytes of all weights before base64. 12 x 12 heads: each weight up to 353 tokens, at 1,024 K = 20
RATIO, STEP = 1.1, 2 / 255  # of two neighbours among the levels: their quotient below, their difference above


def _levels() -> np.ndarray:
    above = 1 - STEP * np.arange(118)  # 1 .. 0.08
    below = above[-1] * RATIO ** -np.arange(1.0, 138)  # .. 1.8e-7
    return np.concatenate([above, below, [0]])[::-1].astype(np.float32)


LEVELS = _levels()  # [256], rising from 0 to 1
BETWEEN = (LEVELS[1:] + LEVELS[:-1]) / 2
BETWEEN[0] = LEVELS[1] / RATIO**0.5  # what is stored as more than 0 has its score to 0.05 too
MOVED_TO = 1 / 255  # the most that a weight may be moved for the sake of its row's sum


class Stored(NamedTuple):
    """The weights of all heads, as the page keeps them."""

    kept: int  # K; 0: each weight of the triangle
    codes: np.ndarray  # uint8: row after row of the lower triangle [L, H, T(T+1)/2], or [L, H, T, K]
    keys: np.ndarray | None  # uint16 [L, H, T, K]: which keys they are; rising; beyond the row's own K, 0 with code 0
    left_out: tuple[float, float]  # the share of a row's mass that was not kept: the mean over all rows, the worst row


def stored(weights: np.ndarray, room: int = ROOM) -> Stored:
    """weights [L, H, T, T] of a causal model -> all, or of each row the first and the largest, if all exceed `room`."""
    L, H, T, _ = weights.shape
    if room >= L * H * T * (T + 1) // 2:
        triangle = np.tril_indices(T)
        return Stored(0, np.stack([coded(layer)[:, *triangle] for layer in weights]), None, (0.0, 0.0))
    K = min(T, max(1, room // (3 * L * H * T)))
    keys = np.zeros((L, H, T, K), np.uint16)
    codes = np.zeros((L, H, T, K), np.uint8)
    lost = np.zeros((L, H, T))
    for layer, w in enumerate(weights):  # one at a time: all of them may be a gigabyte
        wanted = np.concatenate([w[..., :1] + 2, w[..., 1:]], axis=-1)  # the first token, the sink, always
        largest = np.sort(np.argpartition(wanted, T - K, axis=-1)[..., T - K :], axis=-1)  # [H, T, K]
        found = np.take_along_axis(w, largest, axis=-1)
        codes[layer] = nearest(found)
        keys[layer] = np.where(codes[layer] > 0, largest, 0)
        lost[layer] = np.maximum(w.sum(-1, dtype=np.float64) - found.sum(-1, dtype=np.float64), 0)
    return Stored(K, codes, keys, (float(lost.mean()), float(lost.max())))


def nearest(weights: np.ndarray) -> np.ndarray:
    """weights in [0, 1] -> uint8, the number of the nearest level."""
    return np.searchsorted(BETWEEN, weights).astype(np.uint8)


def coded(weights: np.ndarray) -> np.ndarray:
    """weights [..., T], rows that sum to 1 -> uint8, rows whose levels sum to 1 but for the last small step.

    The nearest level first. Then, from the left, weights go to the level on their other side, as long as that brings
    the sum nearer to 1 and moves none by more than 1/255.
    """
    codes = nearest(weights)
    off = LEVELS[codes].sum(-1, dtype=np.float64, keepdims=True) - 1  # [..., 1]
    other = (codes - np.sign(off)).clip(0, 255).astype(np.uint8)
    gain = np.abs(LEVELS[other] - LEVELS[codes])
    may = (np.abs(LEVELS[other] - weights) <= MOVED_TO) & (codes > 0) & (other > 0)
    gain = np.where(may & ((LEVELS[codes] > weights) == (off > 0)), gain, 0)
    moved = (gain > 0) & (np.cumsum(gain, axis=-1, dtype=np.float64) <= np.abs(off))
    return np.where(moved, other, codes)


def packed(values: np.ndarray) -> dict[str, Any]:
    """Numbers as 16 bits each, low + step * n: off by at most step / 2."""
    values = np.asarray(values, np.float64)
    low = float(values.min())
    step = float(values.max() - low) / 65535 or 1.0
    return {"low": low, "step": step, "numbers": as_text(np.round((values - low) / step).astype("<u2"))}


def as_text(array: np.ndarray) -> str:
    """The bytes of an array, for a page."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


class Heads(NamedTuple):
    """What a head does on the whole, by which heads can be sorted. Each [L, H]."""

    entropy: np.ndarray  # bits, the mean over all rows: 0 if each looks at one token, log2(n) if at n alike
    distance: np.ndarray  # tokens looked back, the mean
    first: np.ndarray  # share of the first token, the mean over all rows but its own


def heads(weights: np.ndarray) -> Heads:
    """weights [L, H, T, T] -> what each head does."""
    T = weights.shape[-1]
    back = (np.arange(T)[:, None] - np.arange(T)).astype(np.float32)
    entropy, distance, first = [], [], []
    for w in weights:  # [H, T, T]
        entropy.append(-(w * np.log2(np.where(w > 0, w, 1))).sum(-1).mean(-1))
        distance.append((w * back).sum(-1).mean(-1))
        first.append(w[:, min(1, T - 1) :, 0].mean(-1))
    return Heads(*(np.stack(found) for found in (entropy, distance, first)))


def log_sums(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """scores, weights [L, H, T, T] -> [L, H, T], the log of each row's sum of exp(score): score = ln(weight) + this."""
    T = scores.shape[-1]
    top = weights.argmax(-1)[..., None]  # where the weight is largest, its logarithm is most exact
    found = [np.take_along_axis(x, top, axis=-1)[..., 0] for x in (scores, weights)]
    assert found[0].shape == (*scores.shape[:2], T)
    return found[0] - np.log(found[1])


def losses(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """logits [T, V], tokens [T] -> nats [T-1] of each token after the first, from those before it."""
    x = logits[:-1].astype(np.float64)
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[:, 0] - x[np.arange(len(x)), tokens[1:]]


# ---- one word in several sentences ----------------------------------------------------------------------------------


class Cosines(NamedTuple):
    """How alike the vectors of one word are in n sentences, at each of N stages."""

    pairs: np.ndarray  # [N, n, n]
    anything: np.ndarray  # [N]: the mean cosine of two different tokens: what "nothing in common" is here
    standardised: np.ndarray  # [N, n, n]: each dimension less its mean, divided by its deviation
    anything_standardised: np.ndarray  # [N]


def cosines(word: np.ndarray, others: np.ndarray, tokens: np.ndarray, seed: int = 0, pairs: int = 2000) -> Cosines:
    """word [N, n, C]; others [N, M, C], the vectors of M `tokens` [M] in running text -> how alike, and beside what.

    Means and deviations of the dimensions are those of `others`. A pair of the baseline is two different tokens.
    """
    chance = np.random.default_rng(seed)
    i, j = chance.integers(0, len(tokens), (2, pairs))
    i, j = i[tokens[i] != tokens[j]], j[tokens[i] != tokens[j]]
    found: list[list[Any]] = [[], [], [], []]
    for x, y in zip(word.astype(np.float64), others.astype(np.float64), strict=True):
        deviation = y.std(0)
        scale = np.where(deviation > 0, deviation, 1)
        for kind, (u, v) in enumerate([(x, y), ((x - y.mean(0)) / scale, (y - y.mean(0)) / scale)]):
            u, v = _unit(u), _unit(v)
            found[2 * kind].append(u @ u.T)
            found[2 * kind + 1].append((v[i] * v[j]).sum(-1).mean() if len(i) else np.float64(np.nan))
    return Cosines(*(np.stack(each) for each in found))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
