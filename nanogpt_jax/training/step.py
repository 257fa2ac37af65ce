"""The heart: state and rows in, state and metrics out.

`update` is one step, and pure. `make_train_step` places it on the mesh and puts several into one call.
"""

# B batch, W int32 numbers of a row (T+1 for a language model), K steps in a call

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanogpt_jax.config import Config
from nanogpt_jax.distributed.sharding import BATCH, shard
from nanogpt_jax.model.execution import Execution
from nanogpt_jax.training.dials import Dials, dropout_key, make_dials
from nanogpt_jax.training.gradients import Gradients, make_gradients
from nanogpt_jax.training.spikes import counts
from nanogpt_jax.training.state import TrainState, layout, make_born, state_shapes
from nanogpt_jax.training.task import Objective

Metrics = dict[str, jax.Array]
Optimizer = optax.GradientTransformation


def update(
    tx: Optimizer, gradients: Gradients, state: TrainState, rows: jax.Array, key: jax.Array | None, **dials: Any
) -> tuple[TrainState, Metrics]:
    """One step on rows [B, W]. Pure and independent of devices: `jax.vmap` maps it over a leading axis of states.

    `dials` are for `tx`. Metrics, [] float32: loss (nats a token, before the update), grad_norm (before clipping).
    """
    tx, (loss, grads) = optax.with_extra_args_support(tx), gradients(state.params, rows, key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss, **dials)
    state = replace(state, params=optax.apply_updates(state.params, updates), step=state.step + 1, opt_state=opt_state)
    return state, {"loss": loss, "grad_norm": optax.tree.norm(grads), **counts(opt_state)}


@dataclass(frozen=True)
class TrainStep:
    """`jitted` (state, donated; rows [K, B, W] int32; n <= K; dials) -> the state n steps later; metrics, [K] float32.

    The loop's length n is a run-time value, so one program serves full calls, the last short one and single steps.
    Every step is computed by the same instructions, wherever a run was interrupted: that makes resuming exact.
    """

    jitted: Any
    born: Any  # for `init_state`
    state: TrainState  # `state_shapes`
    layout: NamedSharding  # of the rows
    how: Execution
    dials: Any  # the first step of a call -> its Dials


def make_train_step(cfg: Config, tx: Optimizer, mesh: Mesh, objective: Objective, how: Execution) -> TrainStep:
    """`update`, placed on `mesh`, with how.steps_per_dispatch steps in a call."""
    K, whole = how.steps_per_dispatch, shard(mesh)
    shapes, rows_layout = state_shapes(tx, objective, mesh), shard(mesh, PartitionSpec(None, *BATCH))
    gradients, born = make_gradients(cfg, mesh, objective, how), make_born(tx, objective, shapes, cfg.model.block_size)

    def one_step(state: TrainState, rows: jax.Array, dials: Dials, i: Any) -> tuple[TrainState, Metrics]:
        rate, key = jnp.asarray(dials.rates)[i], dropout_key(dials, state.step) if cfg.model.dropout else None
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for kernels that XLA cannot split
            new, metrics = update(tx, gradients, state, rows, key, rate=rate, numbers=dials.numbers)
        return new, {**metrics, "learning_rate": rate}

    placed = {"in_shardings": (layout(shapes), rows_layout, None, whole), "out_shardings": (layout(shapes), whole)}

    @functools.partial(jax.jit, donate_argnums=0, **placed)
    def train_step(state: TrainState, rows: jax.Array, n: jax.Array, dials: Dials):
        if K == 1:  # no loop, in which a GPU would ask the host whether to go on
            state, metrics = one_step(state, rows[0], dials, 0)
            return state, jax.tree.map(lambda x: x[None], metrics)

        def body(i, carry):
            state, history = carry
            state, metrics = one_step(state, rows[i], dials, i)
            return state, jax.tree.map(lambda all, new: all.at[i].set(new), history, metrics)

        history = {x: jnp.zeros(K) for x in ("loss", "grad_norm", "learning_rate", *counts(state.opt_state))}
        return lax.fori_loop(0, n, body, (state, history))

    return TrainStep(train_step, born, shapes, rows_layout, how, make_dials(cfg, K))
