"""Prefill, compiled decode, and the rules by which a token is chosen. Pure: arrays in, arrays out.

The host does the rest in sampler.py: text, stop strings, and sliding a full context.
"""

# B batch, P padded prompt length, S cache length, V padded vocabulary

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.inference import native
from nanogpt_jax.model import decoding, gpt2

# axes of a kernel's inputs
KERNEL_INPUTS = {"c_attn": 1, "attn/c_proj": 2, "c_fc": 1, "mlp/c_proj": 1}


@dataclass(frozen=True)
class Rules:
    """How the next token is drawn from the logits. Hashable: each set of rules compiles to its own program."""

    temperature: float = 0.8  # divides the logits; 0: always the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the smallest set of tokens whose probabilities reach p; 1: all
    min_p: float = 0.0  # only tokens at least min_p times as likely as the likeliest; 0: all
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the output become less likely (CTRL, 2019)


def filter_logits(rules: Rules, logits: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """logits [B, V] float32 -> the same with -inf for excluded tokens. The filters apply in Hugging Face's order.

    seen [B, V] bool: tokens of the prompt and the output; needed only with a repetition penalty.
    """
    if rules.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs to know what was seen"
        penalty = rules.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if rules.temperature == 0:  # the filters below always keep the likeliest token
        return logits
    logits = logits / rules.temperature
    if rules.top_k:
        logits = _drop_below(logits, lax.top_k(logits, min(rules.top_k, logits.shape[-1]))[0][:, -1:])
    if rules.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        needed = jnp.cumsum(p, axis=-1) - p < rules.top_p  # the likelier tokens do not reach p yet; true for the first
        logits = _drop_below(logits, jnp.where(needed, ordered, jnp.inf).min(axis=-1, keepdims=True))
    if rules.min_p:
        logits = _drop_below(logits, logits.max(axis=-1, keepdims=True) + math.log(rules.min_p))
    return logits


def _drop_below(logits: jax.Array, least: jax.Array) -> jax.Array:
    return jnp.where(logits < least, -jnp.inf, logits)


def choose(rules: Rules, logits: jax.Array, seen: jax.Array | None, keys: jax.Array) -> jax.Array:
    """logits [B, V], a key for each row [B] -> tokens [B] int32."""
    logits = filter_logits(rules, logits, seen)
    if rules.temperature:  # the likeliest after adding Gumbel noise: a sample from the softmax
        logits += jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def row_keys(seed: jax.typing.ArrayLike, batch_size: int) -> jax.Array:
    """A key for each row [B]. It depends only on the row's index, so a row's text does not depend on the batch size."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch_size))


class State(NamedTuple):
    """The state of generation between two calls."""

    token: jax.Array  # [B] int32, the token chosen last; not in the cache yet
    cache: decoding.Cache
    seen: jax.Array | None  # [B, V] bool, with a repetition penalty


def for_decoding(cfg: ModelConfig, params: gpt2.Params) -> gpt2.Params:
    """`params` in the layout for generation: h a list of L layers, kernels [*O, *I] like wte, in the compute dtype.

    So every weight is read once, in the order of memory (kernels/linear.py, project_few). The embedding is cut to cfg's
    vocabulary, so that ids without text cannot be drawn. Not jitted: one slice program for each shape compiles faster
    than L slices of each array.
    """

    def transposed(path, p: jax.Array) -> jax.Array:
        name = "/".join(key.key for key in path)
        inputs = next((n for kernel, n in KERNEL_INPUTS.items() if name.endswith(kernel + "/kernel")), 0)
        return jnp.moveaxis(p, range(inputs), range(-inputs, 0))

    layers = [jax.tree.map(lambda p, i=i: p[i], params["h"]) for i in range(cfg.n_layer)]
    layers = [jax.tree.map_with_path(transposed, layer) for layer in layers]
    params = {**params, "h": layers, "wte": params["wte"][: cfg.padded_vocab_size]}
    return jax.tree.map(
        lambda p: p.astype(cfg.dtype) if p.ndim > 1 else p, params
    )  # vectors stay float32: they cost nothing


@partial(jax.jit, static_argnames=("cfg", "rules", "cache_length"))
def prefill(cfg: ModelConfig, rules: Rules, params, tokens, lengths, seen, seed, count, *, cache_length: int):
    """The first token after each prompt: tokens [B, P] of `lengths` [B], padded on the right -> [B, 1], the state, and
    whether the logits are finite, [] bool.

    `count`: tokens that the rows have generated before; `cache_length` >= P: positions to allocate in the cache.
    """
    cache = decoding.init_cache(cfg, len(tokens), cache_length)
    logits, cache = decoding.prefill(cfg, params, tokens, lengths, cache)
    state = _next(rules, logits, cache, seen, row_keys(seed, len(tokens)), count)
    return state.token[:, None], state, jnp.isfinite(logits.max())  # of the padding they are -inf


@partial(jax.jit, static_argnames=("cfg", "rules", "chunk"), donate_argnames="state")
def decode(cfg: ModelConfig, rules: Rules, params, state: State, seed, count, steps, *, chunk: int):
    """The next `steps` <= chunk tokens of each row, in one call -> [B, chunk] int32, padded with zeros, and the state.

    The caller makes sure that the cache has room. Rows that have ended may overrun it; their tokens are then garbage.
    """

    def step(i, carry):
        state, tokens = carry
        logits, cache = decode_step(cfg, params, state.token, state.cache)
        state = _next(rules, logits, cache, state.seen, keys, count + i)
        return state, tokens.at[:, i].set(state.token)

    decode_step = native.decode_step if native.takes(cfg, len(state.token)) else decoding.decode_step
    keys = row_keys(seed, len(state.token))
    tokens = jnp.zeros((len(keys), chunk), jnp.int32)
    state, tokens = lax.fori_loop(0, steps, step, (state, tokens))
    return tokens, state


def _next(rules: Rules, logits, cache, seen, keys, count) -> State:
    token = choose(rules, logits, seen, jax.vmap(jax.random.fold_in, (0, None))(keys, count))
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return State(token, cache, seen)
