"""y = x·W, with a backward rule of its own.

The gradients are the usual ones, dx = g·Wᵀ and dW = xᵀ·g. What is ours is when they are computed. Left alone, XLA:CPU
turns dW into a product with a transposed copy of g, and recomputes everything elementwise that leads to g (GELU', the
layer norm's backward pass) inside that strided copy; it does the same with x. A barrier makes both exist once, in
order.
"""

import math

import jax
from jax import lax


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [N, I] in the compute dtype, kernel [I, *O] float32 -> [N, *O] in the dtype of x.

    O may be several axes: [C, 3, H, D] makes queries, keys and values with the head axis explicit.
    """
    return _dot(x, kernel.astype(x.dtype), ((1,), (0,)))


def _dot(a: jax.Array, b: jax.Array, contract: tuple, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=dtype or a.dtype)


def _forward(x: jax.Array, kernel: jax.Array):
    # written out: a call to `linear` would hide the product from remat's policy
    return _dot(x, kernel.astype(x.dtype), ((1,), (0,))), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = saved
    x, g = lax.platform_dependent(x, g, cpu=lambda *xg: lax.optimization_barrier(xg), default=lambda *xg: xg)
    out = tuple(range(1, g.ndim))
    dx = _dot(g, kernel.astype(g.dtype), (out, out))
    # Summed over N in float32, whatever the compute dtype. Flat: XLA:CPU has no such product with several output axes.
    dkernel = _dot(x, g.reshape(len(g), -1), ((0,), (0,)), kernel.dtype)
    return dx, dkernel.reshape(kernel.shape)


linear.defvjp(_forward, _backward)


def project(x: jax.Array, kernel: jax.Array, n_in: int = 1) -> jax.Array:
    """`linear` for x [..., *I] and kernel [*I, *O], where I are the last `n_in` axes of x -> [..., *O]."""
    lead, inner = x.shape[: x.ndim - n_in], x.shape[x.ndim - n_in :]
    y = linear(x.reshape(math.prod(lead), math.prod(inner)), kernel.reshape(math.prod(inner), *kernel.shape[n_in:]))
    return y.reshape(*lead, *kernel.shape[n_in:])
