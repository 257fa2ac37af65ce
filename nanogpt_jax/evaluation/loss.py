"""Loss on a whole text: every token after the first is predicted once, in fixed windows.

The shape of a float32 product decides the order of its sums, so the last bits of a loss would depend on the number of
windows in a batch. Here the shape is fixed: each device computes one group of about `GROUP` tokens after the other,
with the same windows in the same rows. The host gets the nats of each token and computes all sums, exactly rounded. So
a figure is the same to the last digit for any batch size and number of devices.
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
from nanogpt_jax.distributed import processes
from nanogpt_jax.distributed.mesh import batch_ways
from nanogpt_jax.distributed.sharding import BATCH, shard
from nanogpt_jax.model import execution, gpt2, losses

GROUP = 2048  # tokens computed together; fewer than 1024 are slower, more take memory

Score = Callable[[gpt2.Params, np.ndarray], tuple[jax.Array, jax.Array]]
Track = Callable[[Iterable[Any], int], Iterable[Any]]  # (items, how many) -> items; shows progress


def silent(items: Iterable[Any], n: int) -> Iterable[Any]:
    del n
    return items


def for_scoring(cfg: ModelConfig, platform: str) -> ModelConfig:
    """`cfg` without the settings of training, and with automatic settings resolved for `platform`."""
    return execution.resolve(replace(cfg, attention="auto", scan_unroll=0, remat="none", dropout=0.0), platform)


@functools.lru_cache(maxsize=8)  # a sweep asks for the same one again
def make_score(cfg: ModelConfig, mesh: Mesh) -> Score:
    """(params, tokens [E, B, W+1]) -> nats [E, B, W] float32 of each token after its row's first, and whether it was
    the likeliest. B is `rows(W)` for each device; groups are computed one after the other."""
    layout = shard(mesh, P(None, *BATCH))
    found = layout if processes.count() == 1 else shard(mesh)  # every process reads all of them

    @functools.partial(jax.jit, in_shardings=(None, layout), out_shardings=found)
    def score(params: gpt2.Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        def group(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, targets = gpt2.forward(cfg, params, tokens[:, :-1]), tokens[:, 1:]
            return losses.cross_entropy(logits, targets), jnp.argmax(logits, axis=-1) == targets

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for kernels that XLA cannot split
            return lax.map(group, tokens)

    if processes.count() == 1:
        return score
    compiled = processes.together("the evaluation", score)
    return lambda params, tokens: compiled(params, processes.put(tokens, layout))


def rows(length: int) -> int:
    """Number of rows of this length in a group."""
    return max(1, GROUP // length)


def read_back(results: Iterable[Any]) -> Iterable[Any]:
    """Device arrays as numpy arrays, read two calls late, so that the device never waits for the host."""
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

    `stride` (0: block_size) is the distance between the starts of windows: each token is predicted from at least
    block_size - stride tokens before it, or from all if there are fewer. `batch_size`: windows in a call for each
    device, rounded up to whole groups (0: one group); no figure depends on it.
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
    """The figures of `evaluate`, from each token's nats [N-1]."""
    total = math.fsum(nats.tolist())
    loss = total / len(nats)
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": total / math.log(2) / n_bytes}


def perplexity(nats: float) -> float:
    return math.exp(min(nats, 700))  # float64 overflows after e^709
