"""What a step changes, how it is created, and where it lies."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nanogpt_jax.distributed import processes
from nanogpt_jax.distributed.sharding import laid_out
from nanogpt_jax.model.gpt2 import Params
from nanogpt_jax.training.dials import key_data
from nanogpt_jax.training.task import Objective


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. `step` counts the updates made."""

    step: jax.Array  # [] int32
    params: Params
    opt_state: optax.OptState


def first_state(
    tx: optax.GradientTransformation,
    objective: Objective,
    key: jax.Array,
    given: Params | None = None,
    positions: int = 0,
) -> TrainState:
    """The state at step 0. Weights depend on the key alone.

    `given` weights replace them; a shorter context takes their first `positions`. Those that `given` lacks are new.
    """
    params = objective.init(key)
    if given is not None:
        params = {**params, **given, "wpe": given["wpe"][:positions]}
    return TrainState(jnp.int32(0), params, tx.init(params))


def state_shapes(tx: optax.GradientTransformation, objective: Objective, mesh: Mesh) -> TrainState:
    """A state of jax.ShapeDtypeStructs, with the sharding of each leaf on `mesh`."""
    return laid_out(mesh, jax.eval_shape(lambda: first_state(tx, objective, jax.random.key(0))), objective.rules)


def layout(shapes: TrainState) -> TrainState:
    """The sharding of each leaf."""
    return jax.tree.map(lambda x: x.sharding, shapes)


def make_born(tx: optax.GradientTransformation, objective: Objective, shapes: TrainState, positions: int) -> Any:
    """`first_state`, jitted: (key data [2] uint32, given weights or None) -> a state that is sharded as in `shapes`."""

    @functools.partial(jax.jit, out_shardings=layout(shapes))
    def born(key: jax.Array, given: Params | None) -> TrainState:
        return first_state(tx, objective, jax.random.wrap_key_data(key), given, positions)

    return born


def init_state(born: Any, seed: int, given: Params | None = None) -> TrainState:
    """The state at step 0 of a run, created sharded: no device ever holds more than its part."""
    return processes.together("the first state", born)(key_data(seed), given)
