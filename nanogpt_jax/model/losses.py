"""The training objective."""

# N rows, C channels, V' padded vocabulary

import functools

import jax
import jax.numpy as jnp
from jax import lax

ROWS = 256  # whose logits exist at a time: 49 MiB of GPT-2's
BLOCKS = 8  # in which the gradient of wte is added up; a padded vocabulary is a multiple


def without_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits [N, V'] with -inf for the padding of the vocabulary, which can neither win nor learn -> [N, V']."""
    padded = logits.shape[-1]
    return jnp.where(jnp.arange(padded) < vocab_size, logits, -jnp.inf) if padded > vocab_size else logits


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target]: logits [B, T, V] float32, targets [B, T] int32 -> nats [B, T].

    The gradient is softmax(logits) - onehot(target), and here made in one go. JAX's own would put all of the softmax
    into memory first and then each target's -1 into that: 1.05 of a step of GPT-2 on an H100.
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
    is_target = jnp.arange(e.shape[-1]) == targets[..., None]
    return e * (g / total)[..., None] - jnp.where(is_target, g[..., None], 0), None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy_of_head(x: jax.Array, wte: jax.Array, targets: jax.Array, vocab_size: int) -> jax.Array:
    """Mean cross-entropy of the logits x·wteᵀ: x [N, C], wte [V', C] float32, targets [N] int32 -> nats [] float32.

    All logits are the largest array of a step, 196 MiB for 1024 positions of GPT-2, and their gradient is another. Here
    they exist for ROWS rows at a time, whose gradient at once becomes that of x and of wte. It is known before the
    backward pass begins, since nothing but a factor follows a mean (as in Liger Kernel, Hsu et al. 2024).
    """
    return cross_entropy(_logits(x, wte, vocab_size), targets).mean()


def _logits(x: jax.Array, wte: jax.Array, vocab_size: int) -> jax.Array:
    return without_padding(jnp.matmul(x, wte.astype(x.dtype).T).astype(jnp.float32), vocab_size)


def _cross_entropy_of_head(x: jax.Array, wte: jax.Array, targets: jax.Array, vocab_size: int):
    N, least = len(x), -(-len(x) // ROWS)
    pieces = next((n for n in range(least, 2 * least) if N % n == 0), 1)  # 1 where no such number divides N
    R, V = N // pieces, len(wte) // BLOCKS

    def add(i, sums):
        loss, dx, dwte = sums
        rows, theirs = (lax.dynamic_slice_in_dim(a, i * R, R) for a in (x, targets))
        nats, back = jax.vjp(lambda logits: cross_entropy(logits, theirs).sum() / N, _logits(rows, wte, vocab_size))
        d = lax.optimization_barrier(back(jnp.float32(1))[0].astype(x.dtype))
        dx = lax.dynamic_update_slice_in_dim(dx, jnp.matmul(d, wte.astype(x.dtype)), i * R, 0)

        def add_block(j, dwte):  # in place: the sum of two whole ones would be a third array of that size
            here = lax.dynamic_slice_in_dim(d, j * V, V, 1)
            new = lax.dot_general(here, rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            return lax.dynamic_update_slice_in_dim(dwte, lax.dynamic_slice_in_dim(dwte, j * V, V) + new, j * V, 0)

        return loss + nats, dx, lax.fori_loop(0, BLOCKS, add_block, dwte)

    zeros = jnp.float32(0), jnp.zeros_like(x), jnp.zeros_like(wte)
    loss, dx, dwte = lax.fori_loop(0, pieces, add, zeros)
    return loss, (dx, dwte)


def _cross_entropy_of_head_backward(vocab_size: int, gradients: tuple[jax.Array, jax.Array], g: jax.Array):
    dx, dwte = gradients
    return dx * g.astype(dx.dtype), dwte * g, None


cross_entropy_of_head.defvjp(_cross_entropy_of_head, _cross_entropy_of_head_backward)
