"""What a step changes, how it is created, and where it lies."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nanogpt_jax.config import Config
from nanogpt_jax.distributed import processes
from nanogpt_jax.distributed.sharding import laid_out
from nanogpt_jax.model.gpt2 import Params
from nanogpt_jax.training.task import Objective


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. `step` counts the updates made."""

    step: jax.Array  # [] int32
    params: Params
    opt_state: optax.OptState


def first_state(
    tx: optax.GradientTransformation, objective: Objective, seed: int, given: Params | None = None, positions: int = 0
) -> TrainState:
    """The state at step 0. Weights depend on the seed alone.

    `given` weights replace them; a shorter context takes their first `positions`. Those that `given` lacks are new.
    """
    params = objective.init(jax.random.key(seed))
    if given is not None:
        params = {**params, **given, "wpe": given["wpe"][:positions]}
    return TrainState(jnp.int32(0), params, tx.init(params))


def state_shapes(tx: optax.GradientTransformation, objective: Objective, mesh: Mesh) -> TrainState:
    """A state of jax.ShapeDtypeStructs, with the sharding of each leaf on `mesh`."""
    return laid_out(mesh, jax.eval_shape(lambda: first_state(tx, objective, 0)), objective.rules)


def layout(shapes: TrainState) -> TrainState:
    """The sharding of each leaf."""
    return jax.tree.map(lambda x: x.sharding, shapes)


def init_state(
    cfg: Config, tx: optax.GradientTransformation, objective: Objective, shapes: TrainState, given: Params | None = None
) -> TrainState:
    """`first_state`, created sharded as in `shapes` (`state_shapes`): no device ever holds more than its part."""
    born = functools.partial(first_state, tx, objective, cfg.train.seed, positions=cfg.model.block_size)
    first = jax.jit(lambda given: born(given=given), out_shardings=layout(shapes))
    return processes.together("the first state", first)(given)
