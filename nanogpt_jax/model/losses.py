"""The training objective."""

# B batch, T time, V vocab; N rows, V' padded vocabulary

import jax
import jax.numpy as jnp


def without_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits [N, V'] with -inf for the padding of the vocabulary, which is never chosen and never learns -> [N, V']."""
    padded = logits.shape[-1]
    return jnp.where(jnp.arange(padded) < vocab_size, logits, -jnp.inf) if padded > vocab_size else logits


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target]: logits [B, T, V] float32, targets [B, T] int32 -> nats [B, T].

    The gradient, softmax(logits) - onehot(target), is computed in one pass. JAX's own would write the whole softmax to
    memory, and then subtract 1 at each target.
    """
    return _cross_entropy(logits, targets)[0]


def _cross_entropy(logits: jax.Array, targets: jax.Array):
    most = logits.max(axis=-1, keepdims=True)
    e = jnp.exp(logits - most)
    total = e.sum(axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return jnp.log(total) + (most - picked)[..., 0], (e, total, targets)


def _cross_entropy_backward(saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array):
    e, total, targets = saved
    is_target = jax.nn.one_hot(targets, e.shape[-1], dtype=bool)
    return e * (g / total)[..., None] - jnp.where(is_target, g[..., None], 0), None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_backward)
