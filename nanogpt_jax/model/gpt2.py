"""GPT-2 (Radford et al. 2019): Flax modules for a block, and the pure functions over them.

The parameters are one nested dict, named as OpenAI named them, with the layers stacked along a first axis L:

    wte [V', C]  wpe [T, C]  ln_f {scale, bias} [C]
    h.ln_1, h.ln_2  {scale, bias} [L, C]
    h.attn.c_attn   {kernel [L, C, 3, H, D], bias [L, 3, H, D]}     queries, keys and values in one product
    h.attn.c_proj   {kernel [L, H, D, C],    bias [L, C]}
    h.mlp.c_fc      {kernel [L, C, 4C],      bias [L, 4C]}
    h.mlp.c_proj    {kernel [L, 4C, C],      bias [L, C]}

V' is the vocabulary padded to a multiple of 128. The output head is wte again (tied). Generation
uses the same blocks with a cache: decoding.py.
"""

# B batch, T time, C channels (n_embd), H heads, D head dim, V vocab, L layers, S cache length

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.model import attention
from nanogpt_jax.model.dropout import dropout
from nanogpt_jax.model.kernels.linear import linear, project, project_few
from nanogpt_jax.model.kernels.norm_gelu import gelu, layer_norm
from nanogpt_jax.model.losses import without_padding

Params = dict[str, Any]
INIT_STD = 0.02


class Linear(nn.Module):
    """x [B, ..., *I] -> [B, ..., *O]. Kernel [*I, *O] ~ N(0, std²), transposed for generation; bias zero."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias: bool
    std: float = INIT_STD
    transposed: bool = False  # for generation: few rows, kernel [*O, *I]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.outputs, *self.inputs) if self.transposed else (*self.inputs, *self.outputs)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape)
        y = (project_few if self.transposed else project)(x, kernel, len(self.inputs))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.outputs)  # float32, and so are its gradient's sums
            y = (y + jnp.broadcast_to(bias, y.shape)).astype(y.dtype)
        return y


class LayerNorm(nn.Module):
    """x [..., C] -> [..., C] with mean 0 and variance 1 along C, then scaled and shifted."""

    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        C = x.shape[-1:]
        bias = self.param("bias", nn.initializers.zeros, C) if self.bias else None
        return layer_norm(x, self.param("scale", nn.initializers.ones, C), bias)


class SelfAttention(nn.Module):
    """Multi-head causal self-attention. x [B, T, C] -> [B, T, C], and its keys and values [B, T, H, D].

    With a cache (k, v [B·H, S, D]) row b writes its T new positions at start[b] .. start[b] + T - 1. Every query looks
    at its own position and all before it. Returns the extended cache. With `watch`, an attention.Watched instead.
    """

    cfg: ModelConfig
    watch: bool = False

    @nn.compact
    def __call__(self, x, cache=None, start: Any = None, train: bool = False, documents=None):
        cfg, (B, T, C) = self.cfg, x.shape
        heads = (cfg.n_head, cfg.head_dim)
        decoding = cache is not None
        qkv = Linear((C,), (3, *heads), cfg.bias, transposed=decoding, name="c_attn")(x)
        q, k, v = (x.squeeze(2) for x in jnp.split(qkv, 3, axis=2))  # Q = X·Wq, K = X·Wk, V = X·Wv: each [B, T, H, D]
        if self.watch:
            y, kept = attention.watched(q, k, v, documents)
        elif cache is None:
            drop = {"dropout_rate": cfg.dropout, "dropout_key": self.make_rng("dropout")} if train else {}
            y, kept = attention.BACKENDS[cfg.attention](q, k, v, documents=documents, **drop), (k, v)
        else:
            q, k, v = (x.swapaxes(1, 2).reshape(B * cfg.n_head, T, cfg.head_dim) for x in (q, k, v))
            position = jnp.repeat(start[:, None] + jnp.arange(T)[None], cfg.n_head, axis=0)  # [B·H, T]
            row = jnp.arange(B * cfg.n_head)[:, None]
            kept = k, v = [old.at[row, position].set(new) for old, new in zip(cache, (k, v), strict=True)]
            y = attention.cached(q, k, v, position).reshape(B, cfg.n_head, T, cfg.head_dim).swapaxes(1, 2)
        std = INIT_STD / (2 * cfg.n_layer) ** 0.5
        return Linear(heads, (C,), cfg.bias, std, decoding, name="c_proj")(y), kept


class MLP(nn.Module):
    """x [B, T, C] -> 4C hidden units with GPT-2's tanh GELU -> [B, T, C]."""

    cfg: ModelConfig
    decoding: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, C, std = self.cfg, self.cfg.n_embd, INIT_STD / (2 * self.cfg.n_layer) ** 0.5
        x = gelu(Linear((C,), (4 * C,), cfg.bias, transposed=self.decoding, name="c_fc")(x))
        return Linear((4 * C,), (C,), cfg.bias, std, self.decoding, name="c_proj")(x)


class Block(nn.Module):
    """One transformer block, pre-LN: x + attention(ln_1 x), then x + mlp(ln_2 x)."""

    cfg: ModelConfig
    watch: bool = False

    @nn.compact
    def __call__(self, x, cache=None, start=None, train: bool = False, documents=None):
        def drop(x: jax.Array) -> jax.Array:
            return dropout(x, self.cfg.dropout, self.make_rng("dropout")) if train else x

        y = LayerNorm(self.cfg.bias, name="ln_1")(x)
        y, kept = SelfAttention(self.cfg, self.watch, name="attn")(y, cache, start, train, documents)
        x = x + drop(y)
        x = x + drop(MLP(self.cfg, cache is not None, name="mlp")(LayerNorm(self.cfg.bias, name="ln_2")(x)))
        return x, kept


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """GPT-2's initial weights: N(0, 0.02²), the two projections back into the residual stream scaled by 1/√(2L)."""
    cfg = dataclasses.replace(cfg, attention="reference")  # changes no weight; other back-ends refuse the x below
    wte_key, wpe_key, h_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, cfg.n_embd))
    return {
        "wte": jax.random.normal(wte_key, (cfg.padded_vocab_size, cfg.n_embd)) * INIT_STD,
        "wpe": jax.random.normal(wpe_key, (cfg.block_size, cfg.n_embd)) * INIT_STD,
        "h": jax.vmap(lambda k: Block(cfg).init(k, x)["params"])(jax.random.split(h_key, cfg.n_layer)),
        "ln_f": LayerNorm(cfg.bias).init(h_key, x)["params"],
    }


def param_shapes(cfg: ModelConfig) -> Params:
    """The parameters as jax.ShapeDtypeStructs."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def embed(cfg: ModelConfig, params: Params, tokens: jax.Array, position: jax.Array) -> jax.Array:
    """tokens [B, T] int32, position [1 or B, T] -> [B, T, C]: the sum of a token's and a position's embedding."""
    return (params["wte"][tokens] + params["wpe"][position]).astype(cfg.dtype)


def separate(cfg: ModelConfig, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """tokens [B, T] -> each position's document and its place in that document, both [B, T] int32.

    A document begins with the end-of-text token before it, as the prompt of a new text does. So the part of a document
    in a window is computed as if nothing else were there.
    """
    begins, place = tokens == cfg.end_of_text, jnp.arange(tokens.shape[1])[None]
    return jnp.cumsum(begins, axis=1), place - lax.cummax(jnp.where(begins, place, 0), axis=1)


def last_norm(cfg: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """x [..., C] -> [..., C]: ln_f, between the last block and the head."""
    return LayerNorm(cfg.bias).apply({"params": params["ln_f"]}, x)  # pyright: ignore


def head(cfg: ModelConfig, params: Params, x: jax.Array, decoding: bool = False) -> jax.Array:
    """x [N, C] -> logits [N, V'] float32; -inf for the padding of the vocabulary."""
    x = last_norm(cfg, params, x)
    logits = project_few(x, params["wte"]) if decoding else linear(x, params["wte"].T)
    return without_padding(logits.astype(jnp.float32), cfg.vocab_size)


def hidden(cfg: ModelConfig, params: Params, tokens: jax.Array, dropout_key=None, watch=False) -> tuple[jax.Array, Any]:
    """tokens [B, T] int32 -> [B, T, C]: each position's vector after the last block. With `watch`, also what each
    block met and made: its input [L, B, T, C] and an attention.Watched of [L, B, ...]; else None."""
    documents, position = separate(cfg, tokens) if cfg.separate_documents else (None, jnp.arange(tokens.shape[1])[None])
    x = attention.by_sequence(embed(cfg, params, tokens, position))
    keys, train = None, dropout_key is not None and cfg.dropout > 0
    if dropout_key is not None and train:
        keys = jax.random.split(dropout_key, cfg.n_layer + 1)
        x, keys = dropout(x, cfg.dropout, keys[0]), keys[1:]

    def layer(x, scanned):
        block, key = scanned
        rngs = {"dropout": key} if train else None
        y, kept = Block(cfg, watch).apply({"params": block}, x, train=train, documents=documents, rngs=rngs)  # pyright: ignore
        return y, (x, kept) if watch else None

    # "dots" saves matrix products and recomputes elementwise operations; "block" saves only the inputs of blocks
    policy = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "block": None}
    if cfg.remat != "none":
        layer = jax.checkpoint(layer, policy=policy[cfg.remat], prevent_cse=cfg.scan_unroll > 1)
    return lax.scan(layer, x, (params["h"], keys), unroll=cfg.scan_unroll)


def forward(cfg: ModelConfig, params: Params, tokens: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
    """tokens [B, T] int32, T <= block_size -> logits [B, T, V'] float32. With a key, dropout is on."""
    B, T = tokens.shape
    assert cfg.block_size >= T, f"{T} tokens do not fit into a context of {cfg.block_size}"
    x, _ = hidden(cfg, params, tokens, dropout_key)
    return head(cfg, params, x.reshape(B * T, cfg.n_embd)).reshape(B, T, -1)
