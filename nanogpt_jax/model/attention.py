"""Scaled dot-product attention: softmax(QKᵀ/√d_k)V (Vaswani et al. 2017, equation 1), behind one signature.

Each position asks a question (query); every position it may look at offers a label (key) and a content (value). The
softmax of the scores gives weights in (0, 1) that sum to 1, and the output is the weighted mean of the values. In
"El gato persigue al ratón" the causal mask lets *persigue* look at *El*, *gato* and itself, never at *ratón*.

A back-end is a function (q, k, v, *, documents, dropout_rate, dropout_key) over [B, T, H, D] and an entry in BACKENDS.
Position t looks at 0..t. With documents [B, T] int32, a query looks only at positions with its own number.
"""

# B batch, T time of the queries, S of the keys if there is a cache, H heads, D head dim

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanogpt_jax.model.dropout import dropout
from nanogpt_jax.model.kernels import blocked_attention


def causal_mask(T: int, documents: jax.Array | None = None) -> jax.Array:
    """[1 or B, 1, T, T] bool: position t may look at positions 0..t, or at those of its own document [B, T]."""
    causal = jnp.tril(jnp.ones((T, T), bool))[None, None]
    return causal if documents is None else causal & (documents[:, None, :, None] == documents[:, None, None, :])


def scaled_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """QKᵀ/√d_k [B, H, T, S] float32, before the mask: √d_k keeps the variance of the scores independent of D."""
    return jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(QKᵀ/√d_k): [B, H, T, S], each row a distribution over what its query may look at."""
    mask = causal_mask(q.shape[1]) if mask is None else mask
    return jax.nn.softmax(jnp.where(mask, scaled_scores(q, k), jnp.finfo(jnp.float32).min), axis=-1)


def reference(q, k, v, *, documents=None, dropout_rate=0.0, dropout_key=None) -> jax.Array:
    """The equation, literally: the weights [B, H, T, T] are in memory, and dropout applies to them."""
    weights = attention_weights(q, k, causal_mask(q.shape[1], documents))
    if dropout_key is not None:
        weights = dropout(weights, dropout_rate, dropout_key)
    return weighted_mean(weights, v)


def weighted_mean(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights [B, H, T, S], v [B, S, H, D] -> [B, T, H, D]."""
    # Weights on the left: jnp.einsum would put V there, a product that XLA:CPU computes more slowly.
    y = jax.lax.dot_general(weights.astype(v.dtype), v.swapaxes(1, 2), (((3,), (2,)), ((0, 1), (0, 1))))
    return y.swapaxes(1, 2)


class Watched(NamedTuple):
    """What attention computed, to be looked at."""

    scores: jax.Array  # [B, H, T, T] float32, before the mask
    weights: jax.Array  # [B, H, T, T] float32
    value_norms: jax.Array  # [B, H, T] float32, the length of each value vector


def watched(q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None) -> tuple[jax.Array, Watched]:
    """`reference` without dropout, and what it computed on the way."""
    weights = attention_weights(q, k, causal_mask(q.shape[1], documents))
    norms = jnp.linalg.norm(v.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    return weighted_mean(weights, v), Watched(scaled_scores(q, k), weights, norms)


HEADS = ((0,), (0,))  # the batch axis of lax.dot_general: N, the heads of all sequences


def cached(q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array) -> jax.Array:
    """The equation for few queries and a cache. The heads of all sequences form one axis, N = B·H.

    q [N, T, D], k and v [N, S, D], position [N, T] int32, the last that a query may look at -> [N, T, D].

    With keys as the left factor, values as the right one, and B and H as one axis, XLA:CPU reads the cache in its
    layout; else it would transpose all of it at every step.
    """
    scores = jax.lax.dot_general(k, q, (((2,), (2,)), HEADS), preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    may_look = jnp.arange(k.shape[1])[None, None] <= position[:, :, None]
    scores = jnp.where(may_look, scores.swapaxes(1, 2), jnp.finfo(jnp.float32).min)  # [N, T, S]
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jax.lax.dot_general(weights, v, (((2,), (1,)), HEADS))


def by_sequence(x: jax.Array) -> jax.Array:
    """x [B, ...], split over devices by its sequences alone, if a mesh splits them.

    Else XLA would split its channels over `fsdp`, as the parameters' are, and send activations instead of weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names and axis not in mesh.manual_axes)
    if mesh.size <= 1 or not axes:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(axes))


def _on_each_device(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend(q, k, v, documents)`, called by each device of the mesh for its own sequences and heads.

    For kernels that XLA cannot split over devices: never splash's, and not cuDNN's beside an axis that is split by
    hand, as "data" is with micro-batches (training/gradients.py).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return attend
    data = tuple(axis for axis in ("data", "fsdp") if axis not in mesh.manual_axes)
    rows, split = jax.sharding.PartitionSpec(data), jax.sharding.PartitionSpec(data, None, "tensor")
    return jax.shard_map(attend, in_specs=(split, split, split, rows), out_specs=split, check_vma=False)


def _jax_nn(implementation: str) -> Callable[..., jax.Array]:
    """`jax.nn.dot_product_attention`; cudnn is flash attention, which never holds the [T, S] weights."""

    def attend(q, k, v, documents) -> jax.Array:
        kind = {"is_causal": True} if documents is None else {"mask": causal_mask(q.shape[1], documents)}
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **kind)  # pyright: ignore

    def backend(q, k, v, *, documents=None, dropout_rate=0.0, dropout_key=None) -> jax.Array:
        assert dropout_key is None, f"{implementation} attention has no dropout; config.validate refuses it"
        return (_on_each_device(attend) if implementation == "cudnn" else attend)(q, k, v, documents)

    return backend


def blocked(q, k, v, *, documents=None, dropout_rate=0.0, dropout_key=None) -> jax.Array:
    """The equation in blocks that stay in a CPU's cache: kernels/blocked_attention.py."""
    return blocked_attention.attend(q, k, v, documents, dropout_rate, dropout_key)


def splash(q, k, v, *, documents=None, dropout_rate=0.0, dropout_key=None, interpret=False) -> jax.Array:
    """JAX's Pallas kernel for TPUs: works in on-chip memory, skips masked blocks and never stores the weights."""
    assert dropout_key is None, "splash attention has no dropout; config.validate refuses it"
    if q.shape[1] % 128:  # the kernel's block
        return BACKENDS["xla"](q, k, v, documents=documents)
    from jax.experimental.pallas.ops.tpu import splash_attention

    def attend(q, k, v, documents):
        _, T, H, D = q.shape
        causal = splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * H)
        kernel: Any = splash_attention.make_splash_mha(causal, head_shards=1, q_seq_shards=1, interpret=interpret)
        q, k, v = (x.swapaxes(1, 2) for x in (q * D**-0.5, k, v))
        numbers = None if documents is None else splash_attention.SegmentIds(documents, documents)
        return jnp.swapaxes(jax.vmap(kernel)(q, k, v, numbers), 1, 2)

    return _on_each_device(attend)(q, k, v, documents)


BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference,
    "blocked": blocked,
    "xla": _jax_nn("xla"),
    "cudnn": _jax_nn("cudnn"),
    "splash": splash,
}
