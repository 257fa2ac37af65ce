"""GPT-2 with a head over the last token, as in Radford et al. (2018): text in, logits of the labels out.

The parameters are gpt2.py's and `head` {kernel [C, Y], bias [Y]}. Under the causal mask, only the last token looks at
the whole text, so the head reads its vector after `ln_f`; and no token looks at the padding after it.
"""

# B batch, W width of the padded texts, C channels, Y labels

import jax
import jax.numpy as jnp
from jax import lax

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.model import gpt2, losses
from nanogpt_jax.model.gpt2 import Params


def init_params(cfg: ModelConfig, n_labels: int, key: jax.Array) -> Params:
    """GPT-2's initial weights for the same key, and a head ~ N(0, 0.02²) with bias zero."""
    kernel = jax.random.normal(jax.random.fold_in(key, 1), (cfg.n_embd, n_labels)) * gpt2.INIT_STD
    return {**gpt2.init_params(cfg, key), "head": {"kernel": kernel, "bias": jnp.zeros(n_labels)}}


def logits(
    cfg: ModelConfig, params: Params, tokens: jax.Array, lengths: jax.Array, *, freeze=False, dropout_key=None
) -> jax.Array:
    """tokens [B, W] int32 of `lengths` [B] >= 1, padded on the right with anything -> logits [B, Y] float32.

    With a key, dropout is on. With `freeze` the gradient ends at the head, and the body has no dropout.
    """
    x, _ = gpt2.hidden(cfg, params, tokens, None if freeze else dropout_key)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]  # [B, C]
    last = gpt2.LayerNorm(cfg.bias).apply({"params": params["ln_f"]}, last).astype(jnp.float32)  # pyright: ignore
    last = lax.stop_gradient(last) if freeze else last
    return last @ params["head"]["kernel"] + params["head"]["bias"][None]


def unpack(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """rows [B, W+2] int32, as data.py packs them -> tokens [B, W], lengths [B], labels [B]."""
    return rows[:, :-2], rows[:, -2], rows[:, -1]


def mean_loss(
    cfg: ModelConfig,
    params: Params,
    rows: jax.Array,
    dropout_key=None,
    *,
    weights: jax.typing.ArrayLike,
    freeze: bool = False,
) -> jax.Array:
    """Mean over the rows [B, W+2] of weights[label] · cross-entropy in nats -> [] float32; weights [Y]."""
    tokens, lengths, labels = unpack(rows)
    nats = losses.cross_entropy(logits(cfg, params, tokens, lengths, freeze=freeze, dropout_key=dropout_key), labels)
    return (jnp.asarray(weights)[labels] * nats).mean()
