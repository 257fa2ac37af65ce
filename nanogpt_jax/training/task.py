"""What training needs to know of a kind of model. The language model is one `Task`, the classifier another."""

# B batch, W int32 numbers of a row

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from nanogpt_jax.distributed.sharding import Rules
from nanogpt_jax.model.gpt2 import Params

Scores = dict[str, float]


@dataclass(frozen=True)
class Objective:
    """What a step needs: initial weights, the loss of a batch, and the layout of parameters."""

    init: Callable[[jax.Array], Params]  # key -> initial weights
    loss: Callable[[Params, jax.Array, jax.Array | None], jax.Array]  # params, rows [B, W], dropout key -> nats []
    row_length: int  # W
    rules: Rules = field(default=(), kw_only=True)  # as in distributed/sharding.py, for parameters that GPT-2 lacks


@dataclass(frozen=True)
class Task(Objective):
    """What a run needs besides: batches and evaluation."""

    batch: Callable[[np.ndarray, Any], np.ndarray]  # steps [n], which rows: a slice or [m] -> rows [n, m, W] int32
    evaluate: Callable[[Params], Scores]  # of the whole validation split
    summary: str  # the scores in words, for str.format
    criterion: Callable[[Scores], float]  # lowest for the best checkpoint
    tokens_per_step: float
    patience: int = 0  # end the run after so many evaluations without a better one; 0: never
