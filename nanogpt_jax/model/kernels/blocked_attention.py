"""Causal attention in blocks that stay in a CPU's cache, with its own backward pass.

    forward    S = Q·Kᵀ/√d_k    P = exp(S - m) / l    O = P·V        m, l: each row's maximum and sum of exponentials
    backward   P = exp(S - (m + log l))               recomputed from S: only O and m + log l are saved
               dV = Pᵀ·dO       dP = dO·Vᵀ            dS = P ∘ (dP - rowsum(dO ∘ O))
               dQ = dS·K/√d_k   dK = dSᵀ·Q/√d_k

These are the gradients of softmax(QKᵀ/√d_k)V, as in FlashAttention (Dao et al. 2022, algorithm 4). Only the order is
ours: each device takes one head after another, and one block of queries at a time with the keys that they may see. So
only the scores of one block are in memory, every product is of two plain matrices, and blocks behind the mask are never
computed. With dropout, P and dO·Vᵀ are multiplied by the mask.
"""

# B batch, T time, H heads, D head dim; N heads at a time, M times; queries start .. end see the keys before `end`

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nanogpt_jax.model import dropout
from nanogpt_jax.model.execution import block_length


def attend(q, k, v, documents: jax.Array | None = None, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
    """q, k, v [B, T, H, D], documents [B, T] -> [B, T, H, D].

    With a key, dropout at `rate` on the weights, by the same masks as attention.reference.
    """
    words = None if key is None else dropout.words(key)
    return _attend(rate, q, k, v, documents, words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rate: float, q, k, v, documents: jax.Array | None, words: jax.Array | None) -> jax.Array:
    return _forward(rate, q, k, v, documents, words)[0]


def _forward(rate: float, q, k, v, documents: jax.Array | None, words: jax.Array | None):
    shape, scale = q.shape, q.shape[-1] ** -0.5

    def head(number, q, k, v):
        out, log_sum = [], []
        for start, end in _spans(len(q)):
            scores = _scores(q, k, start, end, _row(documents, number, shape))
            top = scores.max(-1, keepdims=True)
            p = jnp.exp(scores - top)
            total = p.sum(-1, keepdims=True)
            p = _drop(rate, words, p, number, start, len(q))
            out.append((_dot("ts,sd->td", p.astype(v.dtype), v[:end]) / total).astype(v.dtype))
            log_sum.append(top + jnp.log(total))
        return jnp.concatenate(out), jnp.concatenate(log_sum)

    q, k, v = _split(q * scale), _split(k), _split(v)
    out, log_sum = _map(head, _numbers(shape), q, k, v)
    return _join(out, shape), (q, k, v, out, log_sum, documents, words)


def _backward(rate: float, saved, g: jax.Array):
    q, k, v, out, log_sum, documents, words = saved
    shape, scale = g.shape, g.shape[-1] ** -0.5
    # else XLA:CPU recomputes everything that leads to g in each use
    g = _split(lax.optimization_barrier(g))

    def head(number, q, k, v, out, log_sum, g):
        row_sum = (g.astype(jnp.float32) * out).sum(-1, keepdims=True)
        dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for start, end in _spans(len(q)):
            mine = slice(start, end)
            p = jnp.exp(_scores(q, k, start, end, _row(documents, number, shape)) - log_sum[mine])
            dp = _drop(rate, words, _dot("td,sd->ts", g[mine], v[:end]), number, start, len(q))
            ds = (p * (dp - row_sum[mine])).astype(q.dtype)
            dq.append(_dot("ts,sd->td", ds, k[:end]) * scale)
            dk = dk.at[:end].add(_dot("ts,td->sd", ds, q[mine]))
            p = _drop(rate, words, p, number, start, len(q))
            dv = dv.at[:end].add(_dot("ts,td->sd", p.astype(g.dtype), g[mine]))
        return jnp.concatenate(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    gradients = _map(head, _numbers(shape), q, k, v, out, log_sum, g)
    return *(_join(x, shape) for x in gradients), None, None


_attend.defvjp(_forward, _backward)


def _spans(T: int) -> list[tuple[int, int]]:
    block = block_length(T)
    return [(start, min(start + block, T)) for start in range(0, T, block)]


def _row(documents: jax.Array | None, number: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """[T]: the documents of the sequence to which a head belongs."""
    return None if documents is None else documents[number // shape[2]]


def _scores(q: jax.Array, k: jax.Array, start: int, end: int, documents: jax.Array | None) -> jax.Array:
    """[end - start, end] float32; the least float32 at masked positions."""
    may_look = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
    if documents is not None:
        may_look &= documents[None, :end] == documents[start:end, None]
    return jnp.where(may_look, _dot("td,sd->ts", q[start:end], k[:end]), jnp.finfo(jnp.float32).min)


def _drop(rate: float, words: jax.Array | None, x: jax.Array, number: jax.Array, start: int, T: int) -> jax.Array:
    """x [t, s] of a head with dropout: rows from query `start` on, masked as in the whole [B, H, T, T]."""
    if words is None:
        return x
    first = number * jnp.uint32(T * T) + jnp.uint32(start * T)
    return jnp.where(dropout.keep(rate, words, dropout.numbers(x.shape, first, (T, 1))), x / (1 - rate), 0)


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


# ---- which heads are computed together: one on one device, which makes products plain; else one of each device ------


def _together(shape: tuple[int, ...]) -> tuple[int, int]:
    """Sequences and heads that go together, as counts: one of each part into which the mesh splits B and H."""
    mesh, (B, _, H, _) = jax.sharding.get_abstract_mesh(), shape
    ways = {axis: 1 if axis in mesh.manual_axes else size for axis, size in mesh.shape.items()}
    return math.gcd(B, ways.get("data", 1) * ways.get("fsdp", 1)), math.gcd(H, ways.get("tensor", 1))


def _map(head: Callable[..., Any], *heads: jax.Array) -> Any:
    """Applies `head` to each of [M, N, ...], N at a time."""
    if heads[0].shape[1] > 1:
        return lax.map(lambda some: jax.vmap(head)(*some), heads)
    mapped = lax.map(lambda one: head(*one), tuple(x[:, 0] for x in heads))
    return jax.tree.map(lambda x: x[:, None], mapped)


def _numbers(shape: tuple[int, ...]) -> jax.Array:
    """[M, N] uint32: the index of each head in [B, H]."""
    B, _, H, _ = shape
    return _split(jnp.arange(B * H, dtype=jnp.uint32).reshape(B, 1, H, 1))[..., 0, 0]


def _split(x: jax.Array) -> jax.Array:
    """[B, T, H, D] -> [M, N, T, D]."""
    B, T, H, D = x.shape
    b, h = _together(x.shape)
    return x.reshape(b, B // b, T, h, H // h, D).transpose(1, 4, 0, 3, 2, 5).reshape(-1, b * h, T, D)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_split`."""
    B, T, H, D = shape
    b, h = _together(shape)
    return x.reshape(B // b, H // h, b, h, T, D).transpose(2, 0, 4, 3, 1, 5).reshape(shape)
