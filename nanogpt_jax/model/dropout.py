"""Dropout (Srivastava et al. 2014) with masks that cost next to nothing.

A mask is a hash of each entry's index and the key. Nothing is drawn in order and nothing is stored. So it fuses into
what it multiplies, any part of it can be computed alone, and it is the same in the backward pass, after a resumption
and on any number of devices. JAX's own generator is made for more than this, and is too slow for it on a CPU.
"""

import functools
import math

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate), which preserves the mean."""
    kept = keep(rate, words(key), numbers(x.shape))
    return jnp.where(kept, x / (1 - rate), 0)


def words(key: jax.Array) -> jax.Array:
    """The key of a mask as [2] uint32."""
    return jax.random.bits(key, (2,), jnp.uint32)


def numbers(shape: tuple[int, ...], first: jax.typing.ArrayLike = 0, strides: tuple[int, ...] = ()) -> jax.Array:
    """The index of each entry, uint32 of `shape`: in order, or from `first` with `strides` in a larger array.

    Indices wrap around at 2³².
    """
    strides = strides or tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    axes = [jax.lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(s) for i, s in enumerate(strides)]
    return functools.reduce(jnp.add, axes, jnp.uint32(first))


def keep(rate: float, words: jax.Array, numbers: jax.Array) -> jax.Array:
    """A mask in the shape of `numbers`: true with probability 1 - rate."""
    hashed = _mix(_mix(numbers ^ words[0]) ^ words[1])
    return hashed >= jnp.uint32(round(rate * 2**32))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every output bit depends on every input bit (lowbias32, C. Wellons, 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
