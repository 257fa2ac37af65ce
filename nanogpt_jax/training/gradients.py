"""The gradients of a batch: at once, in halves, or a micro-batch at a time. The numbers are the same to rounding."""

# B batch, W int32 numbers of a row, G micro-batches, R groups of rows

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanogpt_jax.config import Config, UserError
from nanogpt_jax.distributed.mesh import batch_ways
from nanogpt_jax.distributed.sharding import BATCH, shard
from nanogpt_jax.model.execution import Execution
from nanogpt_jax.model.gpt2 import Params
from nanogpt_jax.model.kernels.halves import of_halves
from nanogpt_jax.training.optim import with_frozen
from nanogpt_jax.training.task import Objective

# (params, rows [B, W], dropout key or None) -> the mean loss [], its gradients
Gradients = Callable[[Params, jax.Array, jax.Array | None], tuple[jax.Array, Params]]


def make_gradients(cfg: Config, mesh: Mesh, objective: Objective, how: Execution) -> Gradients:
    """The objective's mean loss and its gradients. UserError if the mesh cannot split the rows."""
    B, micro = cfg.train.batch_size, cfg.train.micro_batch or cfg.train.batch_size
    if micro % (ways := batch_ways(mesh)):
        name = "train.micro_batch" if cfg.train.micro_batch else "train.batch_size"
        raise UserError(f"{name}={micro} must be a multiple of mesh data * fsdp = {ways}")
    of_rows: Any = jax.value_and_grad(objective.loss)
    if micro < B:
        of_rows = _accumulated(of_rows, B // micro, mesh)
    elif how.halves:
        of_rows = of_halves(of_rows)

    def gradients(params: Params, rows: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Params]:
        loss, grads = of_rows(params, rows, key)
        return loss, with_frozen(cfg.optim, grads, 0.0)  # pyright: ignore[reportReturnType]

    return gradients


def _accumulated(of_rows: Gradients, G: int, mesh: Mesh) -> Gradients:
    """`of_rows` for G micro-batches in turn: the loss and the gradients are the exact means over the batch."""

    def gradients(params: Params, rows: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Params]:
        # Row r of micro-batch m is row r*G + m of the batch: each device cuts up the rows that it already holds.
        rows = rows.reshape(len(rows) // G, G, -1).swapaxes(0, 1)
        rows = lax.with_sharding_constraint(rows, shard(mesh, P(None, *BATCH)))
        keys = None if key is None else jax.random.split(key, G)
        # R groups of rows sum their own gradients, which are added once, after the loop, and not once a micro-batch.
        # With dropout there is one group, because a mask indexes the rows of the whole batch. So there is if all three
        # axes of the mesh split: splitting one by hand then ends the process, "Check failed" in XLA's partitioner.
        R = mesh.shape["data"] if key is None and 1 in mesh.shape.values() else 1

        # If XLA adds up over devices inside the loop, it must not scatter an embedding's gradient onto `total`. On GPUs
        # and TPUs, until September 2026, it then moves the sum behind the loop, where all devices but the first have
        # lost the earlier micro-batches (openxla/xla#49143; distributed/README.md).
        apart = batch_ways(mesh) > R

        def total(params: Params, rows: jax.Array, keys: jax.Array | None):
            def add(total, scanned):
                new = of_rows(params, *scanned)
                return jax.tree.map(jnp.add, total, lax.optimization_barrier(new) if apart else new), None

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (jnp.float32(0), params))
            sums, _ = lax.scan(add, zeros, (rows, keys))
            return jax.tree.map(lambda x: x[None], sums)  # [1, ...]; over R groups [R, ...]

        if R > 1:
            split = (P(), P(None, "data"), P())
            total = jax.shard_map(
                total, mesh=mesh, axis_names={"data"}, in_specs=split, out_specs=P("data"), check_vma=False
            )
        return jax.tree.map(lambda x: x.sum(0) / (G * R), total(params, rows, keys))

    return gradients
