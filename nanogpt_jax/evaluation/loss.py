"""Loss on a whole text: every token after the first predicted once, in fixed windows.

A float32 product is summed in an order that its shape decides, so the last bits of a loss would depend on how many
windows are computed together. Here the shape is fixed: each device computes groups of about `GROUP` tokens, the same
windows in the same rows, one group after the other. The nats of each token come back to the host, and all sums are
taken there, exactly rounded. So a figure is the same to the last digit for any batch size and number of devices.
"""

# B windows, T block_size, W width of a row, E groups of rows, N tokens

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.data import batches
from nanogpt_jax.distributed.mesh import batch_ways
from nanogpt_jax.distributed.sharding import BATCH, shard
from nanogpt_jax.model import execution, gpt2, losses

GROUP = 2048  # tokens computed together; fewer are slower (by half at 64, nothing from 1024 on), more take memory

Score = Callable[[gpt2.Params, np.ndarray], tuple[jax.Array, jax.Array]]
Track = Callable[[Iterable[Any], int], Iterable[Any]]  # (items, how many) -> items; shows how far it is


def silent(items: Iterable[Any], n: int) -> Iterable[Any]:
    del n
    return items


def for_scoring(cfg: ModelConfig, platform: str) -> ModelConfig:
    """`cfg` without what only training needs, and with how it is computed chosen for `platform`."""
    return execution.resolve(replace(cfg, attention="auto", scan_unroll=0, remat="none", dropout=0.0), platform)


def make_score(cfg: ModelConfig, mesh: Mesh) -> Score:
    """(params, tokens [E, B, W+1]) -> nats [E, B, W] float32 of each token after its row's first, and whether it was
    the likeliest. B is `rows(W)` a device; the groups are computed one after the other."""
    layout = shard(mesh, P(None, *BATCH))

    @functools.partial(jax.jit, in_shardings=(None, layout), out_shardings=layout)
    def score(params: gpt2.Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        def group(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, targets = gpt2.forward(cfg, params, tokens[:, :-1]), tokens[:, 1:]
            return losses.cross_entropy(logits, targets), jnp.argmax(logits, axis=-1) == targets

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for attention.splash, which splits itself
            return lax.map(group, tokens)

    return score


def rows(length: int) -> int:
    """Rows of a group."""
    return max(1, GROUP // length)


def read_back(results: Iterable[Any]) -> Iterable[Any]:
    """Device arrays as numpy arrays, two behind the device, which so never waits for the host."""
    ahead: deque[Any] = deque()
    for result in results:
        ahead.append(result)
        if len(ahead) > 2:
            yield jax.device_get(ahead.popleft())
    while ahead:
        yield jax.device_get(ahead.popleft())


def token_nats(
    score: Score,
    params: gpt2.Params,
    tokens: np.ndarray,
    mesh: Mesh,
    *,
    block_size: int,
    stride: int = 0,
    batch_size: int = 0,
    track: Track = silent,
) -> np.ndarray:
    """-log p of every token of a text [N] after the first, in order: [N-1] float32.

    `stride` (0: block_size) is how far one window begins after the other: each token is predicted from at least
    block_size - stride tokens before it, as soon as there are so many. `batch_size`: windows that a device is handed
    at a time, rounded up to whole groups (0: one group); no number depends on it.
    """
    B = rows(block_size) * batch_ways(mesh)
    E = -(-batch_size // rows(block_size)) or 1
    windows = batches.validation(tokens, block_size=block_size, batch_size=E * B, stride=stride)
    total = -(-batches.n_validation(tokens, block_size, stride) // (E * B))
    counted: deque[np.ndarray] = deque()

    def calls() -> Iterable[jax.Array]:
        for inputs, weights in track(windows, total):
            counted.append(weights > 0)
            yield score(params, inputs.reshape(E, B, block_size + 1))[0]

    return np.concatenate([nats.reshape(E * B, -1)[counted.popleft()] for nats in read_back(calls())])


def evaluate(
    score: Score, params: gpt2.Params, tokens: np.ndarray, mesh: Mesh, *, block_size: int, n_bytes: int
) -> dict[str, float]:
    """{"loss": nats a token, "perplexity", "bits_per_byte"} of the text `tokens`, which encodes `n_bytes` of UTF-8."""
    return summary(token_nats(score, params, tokens, mesh, block_size=block_size), n_bytes)


def summary(nats: np.ndarray, n_bytes: int) -> dict[str, float]:
    """The same of each token's nats [N-1]."""
    total = math.fsum(nats.tolist())
    loss = total / len(nats)
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": total / math.log(2) / n_bytes}


def perplexity(nats: float) -> float:
    return math.exp(min(nats, 700))  # a float64 ends at e^709
