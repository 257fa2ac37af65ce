"""What training asks about a kind of model. A language model is one value of it, and a classifier another."""

# B batch, W int32 numbers of a row

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from nanogpt_jax.model.gpt2 import Params

Scores = dict[str, float]


@dataclass(frozen=True)
class Objective:
    """What a step asks: first weights, and the loss of a batch."""

    init: Callable[[jax.Array], Params]  # key -> first weights
    loss: Callable[[Params, jax.Array, jax.Array | None], jax.Array]  # params, rows [B, W], dropout key -> nats []
    row_length: int  # W


@dataclass(frozen=True)
class Task(Objective):
    """What a run asks besides: batches, and how good the model is by now."""

    batch: Callable[[np.ndarray], np.ndarray]  # steps [n] -> rows [n, B, W] int32
    evaluate: Callable[[Params], Scores]  # of the whole validation split
    summary: str  # the scores in words, for str.format
    criterion: Callable[[Scores], float]  # what the best checkpoint has least of
    tokens_per_step: float
    patience: int = 0  # evaluations without a better one after which the run ends; 0: never
