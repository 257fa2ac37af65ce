"""Initial weights: the numbers that `jax.random.normal` draws, bit for bit, in one pass over the result.

On a CPU JAX computes the rounds of its generator in a loop, with all counters of a matrix in memory: 2.8 times as slow
(28 million numbers on two cores: 0.25 s, here 0.09), and it takes twice the memory of the matrix besides.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nanogpt_jax.model.dropout import numbers

ROTATIONS = np.array([(13, 15, 26, 6), (17, 29, 16, 24)] * 2 + [(13, 15, 26, 6)], np.uint32)
KEYS = np.array([(1, 2), (2, 0), (0, 1), (1, 2), (2, 0)])  # which are added behind each four rounds


@functools.partial(jax.jit, static_argnames=("shape", "std"), inline=True)  # shapes are asked for often: traced once
def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> jax.Array:
    """Numbers ~ N(0, std²), float32 of `shape`; each depends on the key and its own place alone."""
    if str(jax.random.key_impl(key)) != "threefry2x32" or math.prod(shape) >= 2**32:
        return jax.random.normal(key, shape) * std  # a user's own choice of generator; a counter of more than 32 bits
    bits = threefry(jax.random.key_data(key), numbers(shape))
    ones = lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)  # 23 random bits: [1, 2)
    least = np.nextafter(np.float32(-1), np.float32(0))  # the inverse of erf is infinite at -1
    uniform = jnp.maximum(least, (ones - 1) * (1 - least) + least)
    return np.float32(np.sqrt(2)) * lax.erf_inv(uniform) * std


def threefry(key: jax.Array, counter: jax.Array) -> jax.Array:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): key [2] uint32, counter uint32 -> random bits of its shape.

    The counter's upper half is zero, and the two halves of the result are joined by ^, as in JAX.
    """

    def four_rounds(xy, scanned):
        (x, y), (rotations, (one, other)) = xy, scanned
        for r in rotations:
            x = x + y
            y = x ^ (y << r | y >> (32 - r))
        return (x + one, y + other), None

    keys = jnp.stack([key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)])
    added = keys[KEYS] + np.array([(0, i) for i in range(1, 6)], np.uint32)
    start = jnp.broadcast_to(keys[0], counter.shape), counter + keys[1]
    (x, y), _ = lax.scan(four_rounds, start, (ROTATIONS, added), unroll=5)  # no loop: written out when it is compiled
    return x ^ y
