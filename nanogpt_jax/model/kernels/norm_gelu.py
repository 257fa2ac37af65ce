"""Layer norm and GELU, with backward passes that need little memory.

Layer norm saves its input and two numbers a row, GELU its input and its output.

Standard gradients; only what is saved for them, and when they run, is ours.
"""

# N rows, C channels

import math

import jax
import jax.numpy as jnp
from jax import lax

from nanogpt_jax.model.kernels.linear import materialize

EPSILON = 1e-5  # GPT-2's, in the layer norm
GELU_SCALE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """(x - mean) / √(variance + 1e-5) · scale + bias over the last axis: [..., C] -> [..., C] in the dtype of x.

    Computed in float32; the variance is a mean of squared distances, since E[x²] - E[x]² cancels badly.

    Flat, [N, C] like the linear layers' input. The last operation takes two arrays of that size, because XLA:CPU
    computes such an operation once, but recomputes an operation on a single array in each use.
    """
    return _layer_norm(x, scale, bias)[0]


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None):
    wide = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    mean = wide.mean(-1, keepdims=True)
    per_std = lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + EPSILON)
    mean, per_std = materialize(mean, per_std)
    y = (wide - mean) * (per_std * scale[None])
    y = y if bias is None else y + bias[None]
    return y.astype(x.dtype).reshape(x.shape), (x, mean, per_std, scale, bias)


def _layer_norm_backward(saved, g: jax.Array):
    x, mean, per_std, scale, bias = saved
    x, g = materialize(x, g)
    x, mean, per_std = lax.optimization_barrier((x, mean, per_std))  # else a GPU would recompute the two from x
    normed = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) - mean) * per_std
    wide = g.astype(jnp.float32).reshape(normed.shape)
    scaled = wide * scale[None]
    along, across = (scaled * normed).mean(-1, keepdims=True), scaled.mean(-1, keepdims=True)
    dx = (scaled - across) * per_std - normed * (along * per_std)
    return dx.astype(x.dtype).reshape(x.shape), (wide * normed).sum(0), None if bias is None else wide.sum(0)


layer_norm.defvjp(_layer_norm, _layer_norm_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x/2 · (1 + tanh(u)) with u = √(2/π) (x + 0.044715 x³), of each entry: [...] -> [...] in the dtype of x.

    GPT-2's form of the Gaussian error linear unit (Hendrycks and Gimpel 2016), computed in float32. It is written as
    x / (1 + e^-2u), which is equal, because XLA:CPU computes a division once, but recomputes products in each use.
    """
    wide = x.astype(jnp.float32)
    return (wide / (1 + jnp.exp(-_twice_u(wide)))).astype(x.dtype)


def _twice_u(x: jax.Array) -> jax.Array:
    return 2 * GELU_SCALE * (x + GELU_CUBE * x * x * x)


def _gelu(x: jax.Array):
    y = gelu(x)
    return y, (x, y if x.dtype == jnp.float32 else None)  # in memory anyway, as the input of the next linear layer


def _gelu_backward(saved: tuple[jax.Array, jax.Array | None], g: jax.Array):
    """dy/dx = s + x·s·(1 - s)·2u', s = 1 / (1 + e^-2u), which is y/x; 16-bit y is too coarse for that."""
    x, y, g = materialize(*saved, g)
    wide = x.astype(jnp.float32)
    s = jax.nn.sigmoid(_twice_u(wide)) if y is None else jnp.where(abs(wide) < 1e-9, 0.5, y / wide)
    slope = s + wide * (s - s * s) * (2 * GELU_SCALE + 6 * GELU_SCALE * GELU_CUBE * wide * wide)
    return ((g * slope).astype(x.dtype),)


gelu.defvjp(_gelu, _gelu_backward)
