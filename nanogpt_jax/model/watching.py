"""The forward pass, watched: what each layer made of a text, and what it would predict from there.

Nothing is computed a second time: `gpt2.hidden` returns what attention made on its way to the logits.
"""

# T time, C channels, H heads, V' padded vocabulary, L layers

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.model import gpt2


class Seen(NamedTuple):
    """What the model computed for one text of T tokens."""

    logits: jax.Array  # [T, V'] float32; of the padding -inf
    hidden: jax.Array  # [L+1, T, C]: the embeddings, then each layer's output, before ln_f
    scores: jax.Array  # [L, H, T, T] float32: QKᵀ/√d_k, before the mask
    weights: jax.Array  # [L, H, T, T] float32: their softmax, 0 where the mask is
    value_norms: jax.Array  # [L, H, T] float32: the length of each value vector


@functools.partial(jax.jit, static_argnames="cfg")
def watch(cfg: ModelConfig, params: gpt2.Params, tokens: jax.Array) -> Seen:
    """tokens [T] int32, T <= block_size -> what the model computes, by the reference attention."""
    assert cfg.block_size >= len(tokens), f"{len(tokens)} tokens do not fit into a context of {cfg.block_size}"
    x, (inputs, (scores, weights, norms)) = gpt2.hidden(cfg, params, tokens[None], watch=True)
    hidden = jnp.concatenate([inputs, x[None]])[:, 0]
    return Seen(gpt2.head(cfg, params, x[0]), hidden, scores[:, 0], weights[:, 0], norms[:, 0])


class Lens(NamedTuple):
    """What the head would predict from the vectors of each layer (the logit lens, nostalgebraist 2020)."""

    likeliest: jax.Array  # [L+1, T, n] int32: the likeliest next tokens, first the likeliest
    probability: jax.Array  # [L+1, T, n] float32: of these
    divergence: jax.Array  # [L+1, T] float32: KL(the model's answer ‖ this layer's), in nats; of the last layer 0


@functools.partial(jax.jit, static_argnames=("cfg", "n"))
def lens(cfg: ModelConfig, params: gpt2.Params, seen: Seen, n: int = 5) -> Lens:
    """Every layer's vectors through ln_f and the head, and the `n` likeliest next tokens of each."""
    answer = jax.nn.log_softmax(seen.logits[:, : cfg.vocab_size])
    p = jnp.exp(answer)
    best, likeliest = lax.top_k(p, n)
    last, certainty = Lens(likeliest, best, jnp.zeros(len(p))), (p * answer).sum(axis=-1)

    def read(x: jax.Array) -> Lens:
        logits = gpt2.head(cfg, params, x)[:, : cfg.vocab_size]
        total = jax.nn.logsumexp(logits, axis=-1)  # log p = logits - total: a whole array of them would take longer
        best, likeliest = lax.top_k(logits, n)
        divergence = jnp.maximum(certainty - (p * logits).sum(axis=-1) + total, 0)  # rounding may go below
        return Lens(likeliest, jnp.exp(best - total[:, None]), divergence)

    return jax.tree.map(lambda all, one: jnp.concatenate([all, one[None]]), lax.map(read, seen.hidden[:-1]), last)
