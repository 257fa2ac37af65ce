"""The step of a member, vmapped over a group of members, whose states are stacked; split over several devices.

Losses are those of a run made alone to rounding: XLA sums a vmapped product in another order.
"""

# M members, K steps in a call, B batch, W int32 numbers of a row

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanogpt_jax.config import Config
from nanogpt_jax.distributed.mesh import AXES
from nanogpt_jax.host.signals import StopRequest
from nanogpt_jax.sweeping.in_turn import Steps
from nanogpt_jax.training import optim
from nanogpt_jax.training.compiled import CompiledStep
from nanogpt_jax.training.dials import program_of
from nanogpt_jax.training.state import TrainState, layout
from nanogpt_jax.training.step import Metrics, TrainStep, make_train_step
from nanogpt_jax.training.task import Task

MEMBERS = "members"  # axis of the mesh


def devices(M: int) -> list[Any]:
    """Those that M members are split over."""
    return jax.devices()[:M]


def make_vmapped(cfg: Config, task: Task, step: TrainStep, M: int, steps: Steps) -> TrainStep:
    """The step of M members, M a multiple of their devices, from the `step` of one on one device.

    States and dials have a leading axis [M], rows are [M, K, B, W], n is common to all; metrics are a list of each
    member's. Nothing is sent between devices.
    """
    key = (MEMBERS, M, step.how, *program_of(cfg))
    if key in steps:
        return steps[key]
    mesh = Mesh(np.array(devices(M)).reshape(-1, 1, 1, 1), (MEMBERS, *AXES), axis_types=(AxisType.Auto,) * 4)
    own = make_train_step(cfg, optim.make_optimizer(cfg.optim, cfg.train.steps), mesh, task, step.how)
    each = jax.vmap(own.jitted.__wrapped__, (0, 0, None, 0), spmd_axis_name=MEMBERS)
    split, whole = NamedSharding(mesh, P(MEMBERS)), NamedSharding(mesh, P())
    placed = {"in_shardings": (split, split, whole, split), "out_shardings": (split, whole)}

    @functools.partial(jax.jit, donate_argnums=0, **placed)
    def train_step(states: TrainState, rows: jax.Array, n: jax.Array, dials: Any) -> tuple[TrainState, list[Metrics]]:
        states, metrics = each(states, rows, n, dials)
        return states, [{name: x[i] for name, x in metrics.items()} for i in range(M)]

    def dials(first: int) -> Any:
        return stacked([own.dials(first)] * M)

    how = replace(step.how, recompile=False)
    steps[key] = replace(own, jitted=train_step, layout=split, how=how, dials=dials)
    return steps[key]


def stacked(trees: Sequence[Any]) -> Any:
    """Of M trees one, each leaf [M, ...], on the host."""
    return jax.tree.map(lambda *each: np.stack(each), *trees)


class Together:
    """The states of a group and its compiled step. To the loop of each member it is a CompiledStep."""

    temporary_memory = 0

    def __init__(self, step: TrainStep, home: TrainStep, begun: Sequence[Any], stop: StopRequest):
        """`home`: the step of one. `begun`: (state, rows) of each. If `stop` comes first, it must not be called."""
        self._layout, self._home = step.layout, layout(home.state)
        self._rows, self._dials = [rows for _, rows in begun], [home.dials(0)] * len(begun)
        self._states = jax.device_put(stacked([state for state, _ in begun]), step.layout)
        self._program: Any = CompiledStep(step, self._states, self._all_rows(), stop=stop)

    def news(self) -> str:
        return ""

    def __call__(self, calls: dict[int, Any]) -> dict[int, tuple["Slice", Metrics]]:
        """The calls of members -> their answers. One that has ended is computed on, on its last rows, and ignored."""
        for i, (_, rows, _, dials) in calls.items():
            self._rows[i], self._dials[i] = rows, dials
        (n,) = {n for _, _, n, _ in calls.values()}  # they stand at the same step
        self._states, metrics = self._program(self._states, self._all_rows(), n, stacked(self._dials))
        return {i: (Slice(self._states, i, self._home), metrics[i]) for i in calls}

    def _all_rows(self) -> jax.Array:
        return jax.device_put(jnp.stack(self._rows), self._layout)


class Slice:
    """A member's part of the stacked states, copied to where its own step has it when it is asked for."""

    def __init__(self, states: TrainState, i: int, home: TrainState):
        self._states, self._i, self._home = states, i, home

    @functools.cached_property
    def _whole(self) -> TrainState:
        shards = len(self._states.step.addressable_shards)
        part, i = divmod(self._i, len(self._states.step) // shards)
        own = jax.tree.map(lambda x: sorted(x.addressable_shards, key=_begin)[part].data, self._states)
        return jax.device_put(_at(own, i), self._home)

    @property
    def params(self) -> Any:
        return self._whole.params

    @property
    def opt_state(self) -> Any:
        return self._whole.opt_state


def _begin(shard: Any) -> int:
    return shard.index[0].start or 0


@jax.jit
def _at(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[i], tree)
