"""Linear layer, layer norm and GELU, each with a backward rule of its own.

The gradients are the usual ones. What is ours is what is kept for them, and when they are computed. Left alone, XLA:CPU
turns dW = xᵀ·g into a product with a transposed copy of g and recomputes everything elementwise that leads to g inside
that strided copy; and it writes to memory whatever JAX keeps between the passes. A barrier makes each cotangent exist
once, in order; and a layer norm keeps its input and two numbers a row, a GELU its input and its output.
"""

# N rows, I inputs, O outputs, C channels

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

EPSILON = 1e-5  # GPT-2's, in the layer norm
PIECES = 8  # of a matrix that is read for one row; 16 are as good on two cores, 4 are not
GELU_SCALE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


def _once(*xs: Any) -> tuple[Any, ...]:
    """`xs` themselves, arrays or None; on a CPU they are computed here, and not again in each of their uses."""
    return lax.platform_dependent(*xs, cpu=lambda *xs: lax.optimization_barrier(xs), default=lambda *xs: xs)


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [N, I] in the compute dtype, kernel [I, *O] float32 -> [N, *O] in the dtype of x.

    O may be several axes: [C, 3, H, D] makes queries, keys and values with the head axis explicit.
    """
    return _forward(x, kernel)[0]


def _dot(a: jax.Array, b: jax.Array, contract: tuple, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=dtype or a.dtype)


def _turned(x: jax.Array) -> jax.Array:
    """xᵀ for x [N, I]; on one CPU the other order in memory too, which it has at once and by itself.

    XLA:CPU would turn it inside whatever uses it or leads to it, where it takes three to six times as long.
    """

    def turn(x: jax.Array) -> jax.Array:
        return _once(with_layout_constraint(x.T, Layout((0, 1))))[0]

    if jax.sharding.get_abstract_mesh().size > 1:  # a constraint that XLA cannot split: it would gather all of x
        return x.T
    return lax.platform_dependent(x, cpu=turn, default=jnp.transpose)


def _forward(x: jax.Array, kernel: jax.Array):
    return _dot(x, kernel.astype(x.dtype), ((1,), (0,))), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = saved
    x, g = _once(x, g)
    # Flat: XLA:CPU has no such products with several output axes, and would turn w round for its own.
    g, w = g.reshape(len(g), -1), kernel.reshape(len(kernel), -1).astype(g.dtype)
    # dW is summed over N in float32, whatever the compute dtype; the narrower factor is the one that is turned for it.
    # Where both are alike that is g: the head wants its dW turned (wte), which then costs nothing but two small copies.
    is_tall = w.shape[0] >= w.shape[1]
    narrow, wide = (g, x) if is_tall else (x, g)
    dkernel = _dot(_turned(narrow), wide, ((1,), (0,)), kernel.dtype)
    if is_tall or g.dtype != kernel.dtype:
        # Where dW is turned in its turn, XLA:CPU would turn the product round: slower, and not there for bfloat16.
        (dkernel,) = _once(dkernel)
    dkernel = _turned(dkernel) if is_tall else dkernel
    return _dot(g, w, ((1,), (1,))), dkernel.reshape(kernel.shape)


linear.defvjp(_forward, _backward)


def project(x: jax.Array, kernel: jax.Array, n_in: int = 1) -> jax.Array:
    """`linear` for x [..., *I] and kernel [*I, *O], where I are the last `n_in` axes of x -> [..., *O]."""
    lead, inner = x.shape[: x.ndim - n_in], x.shape[x.ndim - n_in :]
    y = linear(x.reshape(math.prod(lead), math.prod(inner)), kernel.reshape(math.prod(inner), *kernel.shape[n_in:]))
    return y.reshape(*lead, *kernel.shape[n_in:])


def project_few(x: jax.Array, kernel: jax.Array, n_in: int = 1) -> jax.Array:
    """`project` for few rows, as in generation: x [..., *I], kernel [*O, *I] -> [..., *O]. Forward only, in x's dtype.

    W is the left factor, read row by row: as the right one, XLA:CPU copies all of it into another order every time.
    For one row it is cut into pieces, a batch of products: of one product XLA's own split leaves a core to wait.
    """
    lead, outputs = x.shape[: x.ndim - n_in], kernel.shape[: kernel.ndim - n_in]
    x, w = x.reshape(math.prod(lead), -1), kernel.reshape(math.prod(outputs), -1).astype(x.dtype)
    n = PIECES if len(x) == 1 and len(w) % PIECES == 0 else 1

    def product(x: jax.Array, w: jax.Array, n: int = 1) -> jax.Array:
        xs, batch = jnp.broadcast_to(x, (n, *x.shape)), (((2,), (2,)), ((0,), (0,)))
        return lax.dot_general(w.reshape(n, len(w) // n, -1), xs, batch).reshape(len(w), len(x))  # [O, N]

    (y,) = _once(lax.platform_dependent(x, w, cpu=functools.partial(product, n=n), default=product))
    return y.T.reshape(*lead, *outputs)


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """(x - mean) / √(variance + 1e-5) · scale + bias over the last axis: [..., C] -> [..., C] in the dtype of x.

    Computed in float32; the variance is a mean of squared distances, since E[x²] - E[x]² cancels badly.

    Flat, [N, C] like the linear layers' input, and with a product or difference of two arrays of that size as the last
    operation: XLA:CPU computes such a one once, and one of a single array again in each of its uses.
    """
    return _layer_norm(x, scale, bias)[0]


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None):
    wide = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    mean = wide.mean(-1, keepdims=True)
    per_std = lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + EPSILON)
    mean, per_std = _once(mean, per_std)
    y = (wide - mean) * (per_std * scale)
    y = y if bias is None else y + bias
    return y.astype(x.dtype).reshape(x.shape), (x, mean, per_std, scale, bias)


def _layer_norm_backward(saved, g: jax.Array):
    x, mean, per_std, scale, bias = saved
    x, g = _once(x, g)
    x, mean, per_std = lax.optimization_barrier((x, mean, per_std))  # a GPU would compute the two from x again
    normed = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) - mean) * per_std
    wide = g.astype(jnp.float32).reshape(normed.shape)
    scaled = wide * scale
    along, across = (scaled * normed).mean(-1, keepdims=True), scaled.mean(-1, keepdims=True)
    dx = (scaled - across) * per_std - normed * (along * per_std)
    return dx.astype(x.dtype).reshape(x.shape), (wide * normed).sum(0), None if bias is None else wide.sum(0)


layer_norm.defvjp(_layer_norm, _layer_norm_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x/2 · (1 + tanh(u)) with u = √(2/π) (x + 0.044715 x³), of each entry: [...] -> [...] in the dtype of x.

    GPT-2's form of the Gaussian error linear unit (Hendrycks and Gimpel 2016), computed in float32. Written as
    x / (1 + e^-2u), which is the same: XLA:CPU computes a division once, and products again in each use.
    """
    wide = x.astype(jnp.float32)
    return (wide / (1 + jnp.exp(-_twice_u(wide)))).astype(x.dtype)


def _twice_u(x: jax.Array) -> jax.Array:
    return 2 * GELU_SCALE * (x + GELU_CUBE * x * x * x)


def _gelu(x: jax.Array):
    y = gelu(x)
    return y, (x, y if x.dtype == jnp.float32 else None)  # kept anyway, as the input of the next linear layer


def _gelu_backward(saved: tuple[jax.Array, jax.Array | None], g: jax.Array):
    """dy/dx = s + x·s·(1 - s)·2u', s = 1 / (1 + e^-2u), which is y/x; numbers of 16 bits are too coarse for that."""
    x, y, g = _once(*saved, g)
    wide = x.astype(jnp.float32)
    s = jax.nn.sigmoid(_twice_u(wide)) if y is None else jnp.where(abs(wide) < 1e-9, 0.5, y / wide)
    slope = s + wide * (s - s * s) * (2 * GELU_SCALE + 6 * GELU_SCALE * GELU_CUBE * wide * wide)
    return ((g * slope).astype(x.dtype),)


gelu.defvjp(_gelu, _gelu_backward)
