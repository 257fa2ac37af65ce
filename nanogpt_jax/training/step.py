"""The heart: state and rows in, state and metrics out.

`update` says what a step is, and is pure. `make_train_step` says where it lies and how many go in a call.
"""

# B batch, W int32 numbers of a row (T+1 for a language model), G micro-batches, K steps in a call

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanogpt_jax.config import Config, UserError
from nanogpt_jax.distributed.mesh import batch_ways
from nanogpt_jax.distributed.sharding import BATCH, shard, shardings
from nanogpt_jax.model.execution import Execution
from nanogpt_jax.model.gpt2 import Params
from nanogpt_jax.model.kernels.halves import of_halves
from nanogpt_jax.training.optim import make_schedule, with_frozen

Metrics = dict[str, jax.Array]
Init = Callable[[jax.Array], Params]  # key -> first weights
Loss = Callable[[Params, jax.Array, jax.Array | None], jax.Array]  # (params, rows [B, W], dropout key) -> mean nats []
Gradients = Callable[[Params, jax.Array, jax.Array | None], tuple[jax.Array, Params]]  # the same -> loss and gradients


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. `step` counts the updates made."""

    step: jax.Array  # [] int32
    params: Params
    opt_state: optax.OptState


def update(
    tx: optax.GradientTransformation, gradients: Gradients, state: TrainState, rows: jax.Array, key: jax.Array | None
) -> tuple[TrainState, Metrics]:
    """One step on rows [B, W]. Pure, and it asks for no device: `jax.vmap` takes it over a leading axis of states.

    Metrics, [] float32: loss (nats a token, before the update), grad_norm (before clipping).
    """
    loss, grads = gradients(state.params, rows, key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, opt_state)  # pyright: ignore[reportArgumentType]
    return state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}


def first_state(
    tx: optax.GradientTransformation, init: Init, seed: int, given: Params | None = None, positions: int = 0
) -> TrainState:
    """The state at step 0. Weights depend on the seed alone.

    Or they are `given`, of which a shorter context takes the first `positions`; what is not among them stays fresh.
    """
    params = init(jax.random.key(seed))
    if given is not None:
        params = {**params, **given, "wpe": given["wpe"][:positions]}
    return TrainState(jnp.int32(0), params, tx.init(params))


def state_shapes(tx: optax.GradientTransformation, init: Init, mesh: Mesh) -> TrainState:
    """A state of jax.ShapeDtypeStruct, each with where it lies on `mesh`: what restoring a checkpoint asks for."""
    shapes = jax.eval_shape(lambda: first_state(tx, init, 0))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings(mesh, shapes)
    )


def init_state(
    cfg: Config, tx: optax.GradientTransformation, init: Init, mesh: Mesh, given: Params | None = None
) -> TrainState:
    """`first_state`, born sharded: no device ever holds more than its part."""
    layout = jax.tree.map(lambda x: x.sharding, state_shapes(tx, init, mesh))
    born = functools.partial(first_state, tx, init, cfg.train.seed, positions=cfg.model.block_size)
    return jax.jit(born, out_shardings=layout)(given)


def make_train_step(
    cfg: Config, tx: optax.GradientTransformation, mesh: Mesh, init: Init, loss: Loss, how: Execution
) -> Callable[[TrainState, jax.Array, jax.typing.ArrayLike], tuple[TrainState, Metrics]]:
    """(state, rows [K, B, W] int32, n <= K) -> the state n steps later, and metrics of [K] float32 each.

    The loop's length n is a run-time value, so one program serves a full call, the last short one and a single step,
    and every step is computed by the same instructions wherever a run was cut: that makes resuming exact. The state is
    donated.
    """
    K, t = how.steps_per_dispatch, cfg.train
    gradients, schedule = make_gradients(cfg, mesh, loss, how), make_schedule(cfg.optim, t.steps)
    layout = jax.tree.map(lambda x: x.sharding, state_shapes(tx, init, mesh))
    dropout_key = jax.random.key(t.seed ^ 0xD409)  # apart from the key of the initial weights

    def one_step(state: TrainState, rows: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(dropout_key, state.step) if cfg.model.dropout else None
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for kernels that XLA cannot split
            new, metrics = update(tx, gradients, state, rows, key)
        return new, {**metrics, "learning_rate": jnp.asarray(schedule(state.step), jnp.float32)}

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(layout, shard(mesh, P(None, *BATCH)), None),
        out_shardings=(layout, shard(mesh)),
    )
    def train_step(state: TrainState, rows: jax.Array, n: jax.Array):
        if K == 1:  # nothing to loop over, and a loop would make a GPU ask the host whether to go on
            state, metrics = one_step(state, rows[0])
            return state, jax.tree.map(lambda x: x[None], metrics)

        def body(i, carry):
            state, history = carry
            state, metrics = one_step(state, rows[i])
            return state, jax.tree.map(lambda all, new: all.at[i].set(new), history, metrics)

        history = {name: jnp.zeros(K, jnp.float32) for name in ("loss", "grad_norm", "learning_rate")}
        return lax.fori_loop(0, n, body, (state, history))

    return train_step


def make_gradients(cfg: Config, mesh: Mesh, loss: Loss, how: Execution) -> Gradients:
    """The mean loss of rows [B, W] and its gradients: at once, in halves, or a micro-batch at a time."""
    B, micro = cfg.train.batch_size, cfg.train.micro_batch or cfg.train.batch_size
    if micro % (ways := batch_ways(mesh)):
        name = "train.micro_batch" if cfg.train.micro_batch else "train.batch_size"
        raise UserError(f"{name}={micro} must be a multiple of mesh data * fsdp = {ways}")
    of_rows: Any = jax.value_and_grad(loss)
    if micro < B:
        of_rows = _accumulated(of_rows, B // micro, mesh)
    elif how.halves:
        of_rows = of_halves(of_rows)

    def gradients(params: Params, rows: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Params]:
        loss, grads = of_rows(params, rows, key)
        return loss, with_frozen(cfg.optim, grads, 0.0)

    return gradients


def _accumulated(of_rows: Gradients, G: int, mesh: Mesh) -> Gradients:
    """`of_rows` for G micro-batches one after the other: the mean over all is exact."""

    def gradients(params: Params, rows: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Params]:
        # Row g of micro-batch m is row g*G + m of the batch: each device cuts up the rows that it already holds.
        rows = rows.reshape(len(rows) // G, G, -1).swapaxes(0, 1)
        rows = lax.with_sharding_constraint(rows, shard(mesh, P(None, *BATCH)))
        keys = None if key is None else jax.random.split(key, G)
        # D groups of rows add up their own gradients, which meet once, behind the loop, and not once a micro-batch. (A
        # dropout mask numbers the rows of all groups, so there they go together. So they do if all three axes of the
        # mesh split: XLA ends the process when one of those is to be split by hand, "Check failed" in its partitioner.)
        D = mesh.shape["data"] if key is None and 1 in mesh.shape.values() else 1

        def total(params: Params, rows: jax.Array, keys: jax.Array | None):
            def add(total, scanned):
                return jax.tree.map(jnp.add, total, of_rows(params, *scanned)), None

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (jnp.float32(0), params))
            sums, _ = lax.scan(add, zeros, (rows, keys))
            return jax.tree.map(lambda x: x[None], sums)  # [1, ...]; over D groups [D, ...]

        if D > 1:
            split = (P(), P(None, "data"), P())
            total = jax.shard_map(
                total, mesh=mesh, axis_names={"data"}, in_specs=split, out_specs=P("data"), check_vma=False
            )
        return jax.tree.map(lambda x: x.sum(0) / (G * D), total(params, rows, keys))

    return gradients
