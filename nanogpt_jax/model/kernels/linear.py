"""The linear layer, with a backward pass that XLA:CPU computes well.

Standard gradients; only what is saved for them, and when they run, is ours. For dW = xᵀ·g, XLA:CPU would transpose g,
and recompute the elementwise operations before g inside that strided copy. A barrier computes each array once.
"""

# N rows, I inputs, O outputs

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from nanogpt_jax.model import execution


def materialize(*xs: Any) -> tuple[Any, ...]:
    """`xs`, arrays or None. A CPU computes them here, once, and does not recompute them in each use."""
    return lax.platform_dependent(*xs, cpu=lambda *xs: lax.optimization_barrier(xs), default=lambda *xs: xs)


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [N, I] in the compute dtype, kernel [I, *O] float32 -> [N, *O] in the dtype of x.

    O may be several axes: [C, 3, H, D] makes queries, keys and values with the head axis explicit.
    """
    return _forward(x, kernel)[0]


def _dot(a: jax.Array, b: jax.Array, contract: tuple, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=dtype or a.dtype)


def transposed_copy(x: jax.Array) -> jax.Array:
    """xᵀ for x [N, I]; on one CPU a transposed buffer, written in one pass.

    Else XLA:CPU would transpose inside whatever uses the copy, which is several times slower.
    """

    def copy(x: jax.Array) -> jax.Array:
        return materialize(with_layout_constraint(x.T, Layout((0, 1))))[0]

    if jax.sharding.get_abstract_mesh().size > 1:  # XLA cannot split the constraint: it would gather all of x
        return x.T
    return lax.platform_dependent(x, cpu=copy, default=jnp.transpose)


def _forward(x: jax.Array, kernel: jax.Array):
    return _dot(x, kernel.astype(x.dtype), ((1,), (0,))), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = saved
    x, g = materialize(x, g)
    # Flat: for several output axes XLA:CPU has no fast product, and would transpose w.
    g, w = g.reshape(len(g), -1), kernel.reshape(len(kernel), -1).astype(g.dtype)
    # dW is summed over N in float32, whatever the compute dtype. Transpose the narrower factor. If both are equally
    # wide, transpose g: the head needs dW transposed (wte), which then costs only two small copies.
    is_tall = w.shape[0] >= w.shape[1]
    narrow, wide = (g, x) if is_tall else (x, g)
    dkernel = _dot(transposed_copy(narrow), wide, ((1,), (0,)), kernel.dtype)
    if is_tall or g.dtype != kernel.dtype:
        # Else XLA:CPU would swap the factors if dW is transposed next: slower, and unsupported for bfloat16.
        (dkernel,) = materialize(dkernel)
    dkernel = transposed_copy(dkernel) if is_tall else dkernel
    return _dot(g, w, ((1,), (1,))), dkernel.reshape(kernel.shape)


linear.defvjp(_forward, _backward)


def project(x: jax.Array, kernel: jax.Array, n_in: int = 1) -> jax.Array:
    """`linear` for x [..., *I] and kernel [*I, *O]; I are the last `n_in` axes of x -> [..., *O]."""
    lead, inner = x.shape[: x.ndim - n_in], x.shape[x.ndim - n_in :]
    y = linear(x.reshape(math.prod(lead), math.prod(inner)), kernel.reshape(math.prod(inner), *kernel.shape[n_in:]))
    return y.reshape(*lead, *kernel.shape[n_in:])


def project_few(x: jax.Array, kernel: jax.Array, n_in: int = 1) -> jax.Array:
    """`project` for few rows, as in generation: x [..., *I], kernel [*O, *I] -> [..., *O]. Forward only, in x's dtype.

    W is the left factor and is read row by row. As the right factor, XLA:CPU would copy it into another layout every
    time. For one row, W is cut into a batch of products, as XLA splits a single one unevenly over the cores.
    """
    lead, outputs = x.shape[: x.ndim - n_in], kernel.shape[: kernel.ndim - n_in]
    x, w = x.reshape(math.prod(lead), -1), kernel.reshape(math.prod(outputs), -1).astype(x.dtype)
    pieces = execution.PRODUCT_PIECES
    n = pieces if len(x) == 1 and len(w) % pieces == 0 else 1

    def product(x: jax.Array, w: jax.Array, n: int = 1) -> jax.Array:
        xs, batch = jnp.broadcast_to(x, (n, *x.shape)), (((2,), (2,)), ((0,), (0,)))
        return lax.dot_general(w.reshape(n, len(w) // n, -1), xs, batch).reshape(len(w), len(x))  # [O, N]

    (y,) = materialize(lax.platform_dependent(x, w, cpu=functools.partial(product, n=n), default=product))
    return y.T.reshape(*lead, *outputs)
