"""Batches as a pure function of (seed, step): nothing to save, and "resuming" means asking for the next step.

# B batch, T time (block_size), N tokens of a split, n windows of T tokens in an epoch
"""

import functools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from nanogpt_jax.config import UserError

ROUNDS = 6  # of the Feistel network; four suffice for large n, but small n has few bits to mix
Item = TypeVar("Item")


@dataclass(frozen=True)
class Mixture:
    """The training splits of several sources, and the number of sequences of each in a cycle."""

    names: tuple[str, ...]
    parts: tuple[np.ndarray, ...]
    cycle: tuple[int, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))


def n_windows(tokens: np.ndarray, block_size: int, name: str = "the training split") -> int:
    """Windows in an epoch, at least 1. UserError if `tokens` [N] are too few for one."""
    if len(tokens) < block_size + 1:
        raise UserError(
            f"model.block_size={block_size} needs {block_size + 1} tokens, but {name} has {len(tokens)}\n"
            f"       set model.block_size to at most {len(tokens) - 1}, or give a longer text"
        )
    # as many as fit after every offset in [0, T), so that all epochs are equally long, and step -> window is arithmetic
    return max(1, (len(tokens) - block_size) // block_size)


def check_length(tokens: np.ndarray | Mixture, block_size: int) -> None:
    """UserError if `tokens` [N], or those of one source of a mixture, are too few for a window."""
    for name, part in _sources(tokens):
        n_windows(part, block_size, name)


def _sources(tokens: np.ndarray | Mixture) -> list[tuple[str, np.ndarray]]:
    """The sources, each with its name for errors."""
    if not isinstance(tokens, Mixture):
        return [("the training split", tokens)]
    names = [f"{name} in the training split" for name in tokens.names]
    return list(zip(names, tokens.parts, strict=True))


def batch(
    tokens: np.ndarray | Mixture,
    *,
    seed: int,
    step: int | np.ndarray,
    batch_size: int,
    block_size: int,
    rows: slice | np.ndarray = slice(None),
) -> np.ndarray:
    """The sequences of a step: int32 [B, T+1], inputs and the targets one to the right; of K steps: [K, B, T+1].

    `batch_size` is global; `rows` selects those of this process. An epoch visits every window once, in a new order and
    from a new offset, so that sequences do not always begin at the same tokens. In a mixture, each source has its own
    epochs, and the index of a sequence alone decides its source.
    """
    sequence = _sequences(step, batch_size, rows)
    sources = _sources(tokens)
    if not isinstance(tokens, Mixture):
        return _windows(tokens, sequence, seed, block_size, sources[0][0])
    which, number = assign(tokens.cycle, sequence)
    found = np.empty((*sequence.shape, block_size + 1), np.int32)
    for i, (name, part) in enumerate(sources):
        # so that sources of the same length take different orders
        of_seed = int(_mix(np.array([seed], np.uint64) + np.uint64(i))[0])
        found[which == i] = _windows(part, number[which == i], of_seed, block_size, name)
    return found


def order(n: int, *, seed: int, step: int | np.ndarray, batch_size: int) -> np.ndarray:
    """Indices in [0, n) for a step, each once an epoch: [B] uint64; of K steps: [K, B]."""
    return _shuffled(n, _sequences(step, batch_size), seed)[0]


def _sequences(step: int | np.ndarray, batch_size: int, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
    """The numbers of a step's sequences, counted from the first step on: [B] uint64; of K steps: [K, B]."""
    first = np.asarray(step, np.uint64)[..., None] * np.uint64(batch_size)
    return first + np.arange(batch_size, dtype=np.uint64)[rows]


def _shuffled(n: int, sequence: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence's index in [0, n), as every epoch visits each once, and the key of its epoch."""
    epoch, position = np.divmod(sequence, np.uint64(n))  # a batch may straddle two epochs
    key = _mix(_mix(epoch) ^ np.uint64(seed))
    return shuffle(position, n, key), key


def _windows(tokens: np.ndarray, sequence: np.ndarray, seed: int, block_size: int, name: str) -> np.ndarray:
    """Windows of one source: sequence numbers [...] uint64 -> int32 [..., T+1]."""
    n = n_windows(tokens, block_size, name)
    window, key = _shuffled(n, sequence, seed)
    offset = _mix(key) % np.uint64(min(block_size, len(tokens) - n * block_size))
    start = offset + window * np.uint64(block_size)
    return np.asarray(tokens[start[..., None].astype(np.int64) + np.arange(block_size + 1)], np.int32)


def assign(cycle: tuple[int, ...], sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sequences [...] uint64 -> (source, number within it). Without state, and exact proportions in every cycle."""
    order, rank = _one_cycle(cycle)
    turn, place = np.divmod(sequence, np.uint64(len(order)))
    which = order[place]
    return which, turn * np.array(cycle, np.uint64)[which] + rank[place]


@functools.cache
def _one_cycle(cycle: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The sources of a cycle in order, spread evenly, and how often each occurred before; both [sum(cycle)].

    The k-th of a source's m turns is due at (2k + 1) / 2m of the cycle; turns are sorted by that.
    """
    turns = [((2 * k + 1) / (2 * m), i, k) for i, m in enumerate(cycle) for k in range(m)]
    turns.sort()
    return np.array([i for _, i, _ in turns]), np.array([k for _, _, k in turns], np.uint64)


def shuffle(position: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The image of `position` in the permutation of range(n) that `key` selects; both [B] uint64.

    A Feistel network permutes the next even power of two; values outside range(n) go through it again (cycle walking),
    fewer than 4 times on average. It needs no table, so an epoch may have any number of windows.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = [_mix(key + np.uint64(r)) for r in range(ROUNDS)]

    def permute(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return left << half | right

    x = permute(position)
    while (outside := x >= n).any():
        x = np.where(outside, permute(x), x)
    return x


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: a bijection of uint64 in which every output bit depends on every input bit. [B] uint64, wraps."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def n_validation(tokens: np.ndarray, block_size: int, stride: int = 0) -> int:
    """Number of windows that `validation` yields."""
    return 1 + max(0, -(-(len(tokens) - 1 - block_size) // (stride or block_size)))


def validation(
    tokens: np.ndarray, *, block_size: int, batch_size: int, stride: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The whole split in fixed windows: yields (tokens int32 [B, T+1], weights float32 [B, T]).

    Every token after the first is predicted once with weight 1. Windows begin `stride` tokens apart (0: block_size);
    if they overlap, the first T - stride predictions of the later one have weight 0, so that every counted token is
    predicted from more than T - stride others. Padding is token 0 with weight 0: at the end of the last window, and of
    the last batch up to B, so that one compiled shape suffices.
    """
    predictions = len(tokens) - 1
    assert predictions >= 1, "a split holds at least 2 tokens"
    stride = stride or block_size
    assert 1 <= stride <= block_size, f"stride={stride}"
    n = n_validation(tokens, block_size, stride)
    for first in range(0, n, batch_size):
        number = first + np.arange(batch_size)[:, None]  # [B, 1]
        index = stride * number + np.arange(block_size + 1)  # [B, T+1]
        inside = (index <= predictions) & (number < n)
        window = np.where(inside, tokens[np.minimum(index, predictions)], 0)
        new = (number == 0) | (np.arange(block_size) >= block_size - stride)
        yield np.asarray(window, np.int32), (inside[:, 1:] & new).astype(np.float32)


def prefetch(items: Iterator[Item], depth: int = 2) -> Generator[Item, None, None]:
    """`items`, prepared up to `depth` ahead in one thread, which starts when the first item is requested.

    An exception in `items` is raised here, in its place. Closing the generator drops queued items and waits for the one
    in progress. The thread never waits for the consumer, so it always ends.
    """
    end = object()
    worker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(worker.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(worker.submit(next, items, end))
            yield item  # pyright: ignore[reportReturnType]
    finally:
        worker.shutdown(cancel_futures=True)
