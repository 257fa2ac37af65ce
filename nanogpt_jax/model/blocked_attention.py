"""Causal attention in blocks that stay in a CPU's cache, with a backward pass of its own.

    forward    S = Q·Kᵀ/√d_k    P = exp(S - m) / l    O = P·V        m, l: each row's maximum and sum of exponentials
    backward   P = exp(S - (m + log l))               from S again: only O and m + log l are kept, never P
               dV = Pᵀ·dO       dP = dO·Vᵀ            dS = P ∘ (dP - rowsum(dO ∘ O))
               dQ = dS·K/√d_k   dK = dSᵀ·Q/√d_k

These are the gradients of softmax(QKᵀ/√d_k)V, as in FlashAttention (Dao et al. 2022, algorithm 4). What is ours is the
order: one sequence after another on each device, and BLOCK queries at a time against the keys that they may see and no
others. So the scores of one block are all that is ever in memory, and nearly half of the products are never formed.
With dropout, P is multiplied by the mask where it meets V and dO·Vᵀ; the row sums stay what they are.
"""

# B batch = N at a time, M times; T time, H heads, D head dim; queries start .. end see the keys before `end`

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from nanogpt_jax.model import dropout

BLOCK = 64  # queries; 128 is no faster at 1024 positions, and wastes more of the diagonal at 256


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
    """q, k, v [B, T, H, D] -> [B, T, H, D]. With a key, dropout at `rate` on the weights: the reference's masks."""
    words = None if key is None else dropout.words(key)
    return _attend(rate, q, k, v, words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rate: float, q: jax.Array, k: jax.Array, v: jax.Array, words: jax.Array | None) -> jax.Array:
    return _forward(rate, q, k, v, words)[0]


def _forward(rate: float, q: jax.Array, k: jax.Array, v: jax.Array, words: jax.Array | None):
    q, k, v = (_split(x) for x in (q, k, v))

    def some(row):
        m, q, k, v = row
        out, log_sum = [], []
        for start, end in _spans(q):
            scores = _scores(q, k, start, end)
            top = scores.max(-1, keepdims=True)
            p = jnp.exp(scores - top)
            total = p.sum(-1, keepdims=True)
            p = drop(p, m, start)
            out.append((_dot("nhts,nhsd->nhtd", p.astype(v.dtype), v[:, :, :end]) / total).astype(v.dtype))
            log_sum.append((top + jnp.log(total))[..., 0])
        return jnp.concatenate(out, 2), jnp.concatenate(log_sum, 2)

    drop = functools.partial(_drop, rate, words, q.shape)
    out, log_sum = lax.map(some, (jnp.arange(len(q), dtype=jnp.uint32), q, k, v))
    return _join(out), (q, k, v, out, log_sum, words)


def _backward(rate: float, saved, g: jax.Array):
    q, k, v, out, log_sum, words = saved
    # XLA:CPU would compute all that leads to g again in each of its uses
    g = _split(lax.optimization_barrier(g))
    row_sum = (g.astype(jnp.float32) * out).sum(-1)

    def some(row):
        m, q, k, v, g, log_sum, row_sum = row
        dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for start, end in _spans(q):
            mine, seen = (slice(None), slice(None), slice(start, end)), (slice(None), slice(None), slice(end))
            p = jnp.exp(_scores(q, k, start, end) - log_sum[mine][..., None])
            dp = drop(_dot("nhtd,nhsd->nhts", g[mine], v[seen]), m, start)
            ds = (p * (dp - row_sum[mine][..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
            dq.append(_dot("nhts,nhsd->nhtd", ds, k[seen]))
            dk = dk.at[seen].add(_dot("nhts,nhtd->nhsd", ds, q[mine]))
            dv = dv.at[seen].add(_dot("nhts,nhtd->nhsd", drop(p, m, start).astype(g.dtype), g[mine]))
        return jnp.concatenate(dq, 2).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    drop = functools.partial(_drop, rate, words, q.shape)
    gradients = lax.map(some, (jnp.arange(len(q), dtype=jnp.uint32), q, k, v, g, log_sum, row_sum))
    return *(_join(x) for x in gradients), None


_attend.defvjp(_forward, _backward)


def _spans(q: jax.Array) -> list[tuple[int, int]]:
    T = q.shape[2]
    return [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


def _scores(q: jax.Array, k: jax.Array, start: int, end: int) -> jax.Array:
    """[N, H, end - start, end] float32; the least number there is where a query may not look."""
    scores = _dot("nhtd,nhsd->nhts", q[:, :, start:end], k[:, :, :end]) * q.shape[-1] ** -0.5
    may_look = jnp.arange(end) <= jnp.arange(start, end)[:, None]
    return jnp.where(may_look, scores, jnp.finfo(jnp.float32).min)


def _drop(rate: float, words: jax.Array | None, shape: tuple[int, ...], x: jax.Array, m: jax.Array, start: int):
    """x [N, H, t, s] of the m-th N sequences, with the mask that these entries have in the whole [B, H, T, T]."""
    if words is None:
        return x
    M, _, H, T, _ = shape
    first = m * jnp.uint32(H * T * T) + jnp.uint32(start * T)
    kept = dropout.keep(rate, words, dropout.numbers(x.shape, first, (M * H * T * T, T * T, T, 1)))
    return jnp.where(kept, x / (1 - rate), 0)


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _split(x: jax.Array) -> jax.Array:
    """[B, T, H, D] -> [M, N, H, T, D]: at a time, one sequence of each device, if they divide the batch."""
    N = math.gcd(len(x), jax.device_count())
    return x.reshape(N, len(x) // N, *x.shape[1:]).transpose(1, 0, 3, 2, 4)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(-1, *x.shape[2:])
