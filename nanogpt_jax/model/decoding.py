"""Generation with GPT-2: the blocks of gpt2.py with a cache of keys and values, as pure functions.

`params` are in the layout for generation: `inference.generate.for_decoding(params)`.
"""

# B batch, T time, C channels, H heads, D head dim, V' padded vocabulary, P padded prompt length, S cache length

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.model import gpt2

KeysValues = tuple[jax.Array, jax.Array]


class Cache(NamedTuple):
    """Keys and values of the positions seen so far."""

    k: list[jax.Array]  # L arrays [B·H, S, D], the layout of attention.cached
    v: list[jax.Array]
    length: jax.Array  # [B] int32, filled positions in each row


def init_cache(cfg: ModelConfig, batch_size: int, length: int) -> Cache:
    """An empty cache for `length` positions, at most block_size."""
    shape = (batch_size * cfg.n_head, length, cfg.head_dim)
    empty = [jnp.zeros(shape, cfg.dtype) for _ in range(cfg.n_layer)]
    return Cache(empty, list(empty), jnp.zeros(batch_size, jnp.int32))


def _extend(cfg: ModelConfig, params: gpt2.Params, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """tokens [B, T] that follow the cached ones -> vectors [B, T, C], and the cache with T more positions a row."""
    T = tokens.shape[1]
    x = gpt2.embed(cfg, params, tokens, cache.length[:, None] + jnp.arange(T)[None])
    keys, values = [], []
    for block, k, v in zip(params["h"], cache.k, cache.v, strict=True):
        x, (k, v) = _extend_layer(cfg, block, x, (k, v), cache.length)
        keys.append(k)
        values.append(v)
    return x, Cache(keys, values, cache.length + T)


@functools.partial(jax.jit, static_argnames="cfg", inline=True)  # traced once, not L times
def _extend_layer(cfg: ModelConfig, block: gpt2.Params, x: jax.Array, kv: KeysValues, length: jax.Array):
    return gpt2.Block(cfg).apply({"params": block}, x, kv, length)


def prefill(cfg: ModelConfig, params: gpt2.Params, tokens: jax.Array, lengths: jax.Array, cache: Cache):
    """Prompts [B, P] int32 of `lengths` [B], padded on the right -> logits [B, V'] after each prompt, and the cache.

    Padding writes into the cache beyond a row's length; no query looks there before it is overwritten.
    """
    x, cache = _extend(cfg, params, tokens, cache._replace(length=jnp.zeros_like(lengths)))
    last = x[jnp.arange(len(tokens)), lengths - 1]
    return gpt2.head(cfg, params, last, decoding=True), cache._replace(length=lengths)


def decode_step(cfg: ModelConfig, params: gpt2.Params, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """The model on one more token a row: token [B] int32 -> logits [B, V'] float32 and the extended cache.

    Equals forward(...)[:, -1] on the whole prefix (tests/test_generate.py).
    """
    x, cache = _extend(cfg, params, token[:, None], cache)
    return gpt2.head(cfg, params, x[:, 0], decoding=True), cache
