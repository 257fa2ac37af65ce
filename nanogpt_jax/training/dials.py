"""Numbers that a compiled step takes as arguments: runs that differ in nothing else share a program."""

# K steps in a call

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_jax.config import Config, OptimConfig
from nanogpt_jax.training.optim import Numbers, make_schedule, numbers_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dials:
    """The numbers of a call."""

    rates: jax.typing.ArrayLike  # [K] float32: learning rates
    numbers: Numbers  # of the optimizer, [] float32 each
    dropout: jax.typing.ArrayLike  # [2] uint32: the run's key


def make_dials(cfg: Config, K: int) -> Callable[[int], Dials]:
    """The first step of a call of K steps -> its dials."""
    rates = rates_of(cfg.optim, cfg.train.steps, K)
    dropout = key_data(cfg.train.seed ^ 0xD409)  # differs from the key of the initial weights
    return lambda first: Dials(rates[first : first + K], numbers_of(cfg.optim), dropout)


@functools.lru_cache(maxsize=64)  # runs that differ in their seed share it
def rates_of(cfg: OptimConfig, steps: int, K: int) -> np.ndarray:
    """The learning rate of each step, and K more: [steps + K] float32. Another peak compiles nothing."""
    table = _table(replace(cfg, learning_rate=1.0), steps)
    return np.asarray(table(np.float32(cfg.learning_rate), np.arange(steps + K)), np.float32)


@functools.lru_cache(maxsize=64)
def _table(cfg: OptimConfig, steps: int) -> Any:
    """The schedule of `cfg`, jitted: (peak [], steps [n]) -> rates [n]."""
    return jax.jit(lambda peak, at: jax.vmap(make_schedule(replace(cfg, learning_rate=peak), steps))(at))


def program_of(cfg: Config) -> tuple[Any, ...]:
    """Equal for runs that share a compiled step: what is left of their settings without dials and what no step sees."""
    o, t = cfg.optim, cfg.train
    optim = (o.name, bool(o.grad_clip), bool(o.skip_spikes), o.freeze_layers, o.freeze_embeddings)
    return cfg.model, cfg.mesh, optim, (t.batch_size, t.micro_batch)


def key_data(seed: int) -> np.ndarray:
    """The data of the key that `jax.random.key` makes of a seed: [2] uint32."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def dropout_key(dials: Dials, step: jax.Array) -> jax.Array:
    """The key of a step's masks."""
    return jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(dials.dropout)), step)
