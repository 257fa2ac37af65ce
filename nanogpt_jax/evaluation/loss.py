"""Loss on a whole validation split: every token after the first predicted once, in fixed windows."""

import math
from collections.abc import Callable

import jax
import numpy as np

from nanogpt_jax.config import Config
from nanogpt_jax.data import batches


def eval_rows(cfg: Config, ways: int) -> int:
    """Windows at a time: as many as training takes, at least 4096 tokens, a multiple of the batch's parts."""
    rows = max(cfg.train.micro_batch or cfg.train.batch_size, 4096 // cfg.model.block_size)
    return -(-rows // ways) * ways


def evaluate(
    eval_step: Callable[..., jax.Array], params: object, tokens: np.ndarray, cfg: Config, rows: int, n_bytes: int
) -> dict[str, float]:
    """{"loss": nats a token, "perplexity", "bits_per_byte"} of the split `tokens`, which encodes `n_bytes` of UTF-8.

    Sums are taken in float64 on the host, so the figure does not depend on the number of windows at a time.
    """
    sums = [
        eval_step(params, inputs, weights)
        for inputs, weights in batches.validation(tokens, block_size=cfg.model.block_size, batch_size=rows)
    ]
    nats = math.fsum(float(s) for s in sums)
    loss = nats / (len(tokens) - 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": nats / math.log(2) / n_bytes}
