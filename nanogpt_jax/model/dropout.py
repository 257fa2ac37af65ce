"""Dropout (Srivastava et al. 2014) with masks that cost next to nothing.

A mask is a hash of each entry's number and the key: nothing is drawn in order and nothing is stored, so it fuses into
what it multiplies, comes out the same in the backward pass, after a resumption and on any number of devices, and any
part of it can be had alone. JAX's own generator, made for more than this, took up to a third of a step on a CPU.
"""

import functools
import math

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes a `rate` share of x and scales up the rest, so that the mean stays."""
    kept = keep(rate, words(key), numbers(x.shape))
    return jnp.where(kept, x / (1 - rate), 0)


def words(key: jax.Array) -> jax.Array:
    """A key as [2] uint32: what a mask depends on."""
    return jax.random.bits(key, (2,), jnp.uint32)


def numbers(shape: tuple[int, ...], first: jax.typing.ArrayLike = 0, strides: tuple[int, ...] = ()) -> jax.Array:
    """The number of each entry, uint32 of `shape`: in order, or from `first` with `strides` in a larger array.

    Beyond 2³² entries they begin again.
    """
    strides = strides or tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    axes = [jax.lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(s) for i, s in enumerate(strides)]
    return functools.reduce(jnp.add, axes, jnp.uint32(first))


def keep(rate: float, words: jax.Array, numbers: jax.Array) -> jax.Array:
    """Which of the entries stay: true with probability 1 - rate, in the shape of `numbers`."""
    hashed = _mix(_mix(numbers ^ words[0]) ^ words[1])
    return hashed >= jnp.uint32(round(rate * 2**32))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 whose every output bit hangs on every input bit (lowbias32, C. Wellons, 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
