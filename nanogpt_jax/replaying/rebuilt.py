"""The state before a step and its batch, as they were when the run took it.

A batch is a function of the seed and the step. A state follows from the checkpoint before it by the run's own compiled
program: the same instructions give the same bits on the same machine. What the run has logged on the way is compared.
"""

# B batch, T time, K steps in a call

import sys
from dataclasses import dataclass, replace

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from nanogpt_jax import config
from nanogpt_jax.config import Config, MeshConfig, UserError
from nanogpt_jax.data.dataset import Dataset
from nanogpt_jax.distributed.mesh import make_mesh, room, start
from nanogpt_jax.host import messages
from nanogpt_jax.host.progress import Progress
from nanogpt_jax.model import execution
from nanogpt_jax.model.execution import Execution
from nanogpt_jax.replaying.past import Past, schedules
from nanogpt_jax.run.checkpoint import Damaged, load_trees
from nanogpt_jax.training import loop
from nanogpt_jax.training.dials import Dials, make_dials
from nanogpt_jax.training.language_model import language_model
from nanogpt_jax.training.optim import make_optimizer
from nanogpt_jax.training.state import TrainState, init_state
from nanogpt_jax.training.step import TrainStep, make_train_step
from nanogpt_jax.training.task import Task


@dataclass(frozen=True)
class Compared:
    """The losses and gradient norms of the steps that were taken again, beside those that the run has logged."""

    steps: int = 0  # that were logged
    equal: int = 0  # of these, to the last bit
    worst: float = 0.0  # the largest difference of a loss


@dataclass(frozen=True)
class Rebuilt:
    cfg: Config  # resolved for this machine; its train.steps are those of the step's schedule
    how: Execution
    tx: optax.GradientTransformation
    task: Task
    step: int
    start: int  # the step from which it was rebuilt
    before: TrainState  # numpy arrays
    rows: np.ndarray  # [B, T+1] int32
    metrics: dict[str, float]  # of the step by the compiled program: those of training/step.py
    dials: Dials  # its learning rate, and the other numbers of the optimizer
    wrong_after: tuple[str, ...]  # what is not finite after the step: parameters, optimizer's state
    compared: Compared
    is_own_mesh: bool  # whether it is computed on as many devices as the run's


def rebuild(past: Past, data: Dataset, step: int) -> Rebuilt:
    """Step `step`, with all that went into it. UserError if it cannot be reached."""
    platform = start()
    mesh, is_own = _mesh(past.cfg)
    cfg = replace(past.cfg, mesh=MeshConfig(**{axis: mesh.shape[axis] for axis in ("data", "fsdp", "tensor")}))
    cfg, how = execution.choose(cfg, platform, mesh.size, room(mesh))
    task = language_model(cfg, mesh, data)

    *_, (_, _, steps) = schedules(past, step - 1, step)
    tx = make_optimizer(cfg.optim, steps)
    last = make_train_step(_lasting(cfg, steps), tx, mesh, task, how)
    first, state = _begin(past, cfg, last, step)
    found: dict[int, dict[str, float]] = {}
    with Progress("step", step, first) as progress:
        for begin, end, its_steps in schedules(past, first, step - 1):
            one = replace(last, dials=make_dials(_lasting(cfg, its_steps), how.steps_per_dispatch))  # the same program
            for at, n in loop.calls(begin, end, how.steps_per_dispatch, ()):
                state, values = _take(one, state, task, at, n)
                found |= values
                _check(past, values)
                progress.update(at + n)
    before = jax.device_get(state)
    state, values = _take(last, state, task, step - 1, 1)
    parts = {"parameters": state.params, "optimizer's state": state.opt_state}
    wrong = tuple(name for name, tree in parts.items() if not loop.are_finite(tree))
    return Rebuilt(
        _lasting(cfg, steps), how, tx, task, step, first, before, _rows(task, step - 1, 1)[0], values[step],
        last.dials(step - 1), wrong,
        _compare(past, {**found, **values}), is_own,
    )  # fmt: skip


def _lasting(cfg: Config, steps: int) -> Config:
    return replace(cfg, train=replace(cfg.train, steps=steps))


def _mesh(cfg: Config) -> tuple[Mesh, bool]:
    """The run's mesh, if there are as many devices here; else one device. One process in any case."""
    own = MeshConfig(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    try:
        return make_mesh(own), True
    except UserError:
        return make_mesh(MeshConfig()), False


def _begin(past: Past, cfg: Config, program: TrainStep, step: int) -> tuple[int, TrainState]:
    """The newest state before `step` that can be had: of a checkpoint, or the first one, from the seed."""
    shapes, refused = program.state, None
    for at in reversed([at for at in past.checkpoints if at < step]):
        try:
            trees = load_trees(past.path, {"params": shapes.params, "opt_state": shapes.opt_state}, at)
        except Damaged as e:
            refused = e
            print(f"note: {messages.first_line(e)}; what is before it is taken", file=sys.stderr)
            continue
        return at, TrainState(jax.device_put(np.int32(at), shapes.step.sharding), trees["params"], trees["opt_state"])  # pyright: ignore
    if cfg.train.init_from != "scratch":
        raise UserError(
            f"{past.path} has no usable checkpoint before step {step}, and its first weights were taken from "
            f"train.init_from={cfg.train.init_from}, which may have changed since"
            + (f"\n       {refused}" if refused else "")
            + (
                f"\n       the first step that can be replayed is {min(past.checkpoints) + 1}"
                if past.checkpoints
                else ""
            )
        )
    return 0, init_state(program.born, cfg.train.seed)


def _take(
    program: TrainStep, state: TrainState, task: Task, first: int, n: int
) -> tuple[TrainState, dict[int, dict[str, float]]]:
    """n steps from step `first` on, counted from 0 -> the state, and the metrics by the step's number."""
    K = program.how.steps_per_dispatch
    rows = _rows(task, first, n)
    rows = np.concatenate([rows, np.zeros((K - n, *rows.shape[1:]), np.int32)])
    state, metrics = program.jitted(state, jax.device_put(rows, program.layout), np.int32(n), program.dials(first))
    values = jax.device_get(metrics)
    return state, {first + i + 1: {name: float(x[i]) for name, x in values.items()} for i in range(n)}


def _rows(task: Task, first: int, n: int) -> np.ndarray:
    return task.batch(np.arange(first, first + n), slice(None))


def _check(past: Past, values: dict[int, dict[str, float]]) -> None:
    """UserError if a step on the way is not finite: what comes after it says nothing."""
    for step, its in values.items():
        if not all(map(np.isfinite, its.values())) and not its.get("in_a_row"):  # a skipped step has changed nothing
            again = f"{config.program('replay')} {config.word(past.path)} --step {step}"
            raise UserError(f"on the way there, step {step} is not finite already\n       look at that one: {again}")


def _compare(past: Past, found: dict[int, dict[str, float]]) -> Compared:
    pairs = [(past.recorded[step], found[step]) for step in found if step in past.recorded]
    gaps = [{name: _gap(value, its[name]) for name, value in logged.items()} for logged, its in pairs]
    equal = [not any(gap.values()) for gap in gaps]
    return Compared(len(pairs), sum(equal), max((gap.get("loss", 0.0) for gap in gaps), default=0.0))


def _gap(logged: float, now: float) -> float:
    """How far apart the two are. The log does not say which of nan and inf a number was: 0 if neither is finite."""
    finite = np.isfinite(logged), np.isfinite(now)
    return abs(logged - now) if all(finite) else np.inf if any(finite) else 0.0
