"""Whether members are trained faster together or in turn: measured in the first seconds, on states thrown away."""

# M members, K steps in a call

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from nanogpt_jax.config import MeshConfig
from nanogpt_jax.host.signals import StopRequest
from nanogpt_jax.model import execution
from nanogpt_jax.sweeping import in_turn
from nanogpt_jax.sweeping.in_turn import Ready, Steps
from nanogpt_jax.sweeping.vmapped import make_vmapped, stacked
from nanogpt_jax.training.compiled import CompiledStep
from nanogpt_jax.training.state import TrainState, init_state
from nanogpt_jax.training.step import TrainStep
from nanogpt_jax.training.task import Task

ONE = MeshConfig()  # the mesh of a member in a group
WORTH = 0.95  # in turn is taken if it is at least so fast beside together: it is exact, and each member ends soon
SECOND = 1.2  # times as fast is a long run in turn once it has its second program (model/kernels/README.md)
# Least work in turn for a trial. On one CPU in seconds of its cores, as other load changes those little: a trial takes
# about 25, mostly to compile, which is 2 %. Elsewhere by the clock, and 5 %, as together is more likely to be faster.
ON_ONE_CPU, ELSEWHERE = 1250, 300
ROUNDS, CALL = 8, 0.2  # calls of each way in alternation, the first to warm up; seconds of a call, at least


@dataclass(frozen=True)
class Verdict:
    """What a trial has found."""

    members: int
    rounds: Sequence[tuple[float, float]]  # seconds of a step of one member: together, in turn
    second: bool  # in turn, a run is long enough for the second program of training/compiled.py

    @property
    def together(self) -> float:
        """The median, as other load disturbs both ways alike, and now and then one of them."""
        return statistics.median(seconds for seconds, _ in self.rounds)

    @property
    def in_turn(self) -> float:
        return statistics.median(seconds for _, seconds in self.rounds)

    @property
    def is_together(self) -> bool:
        return self.together < WORTH * self.in_turn / (SECOND if self.second else 1)

    def __str__(self) -> str:
        more = f", and {SECOND} times as fast with its second program" if self.second else ""
        return (
            f"{self.members} members together: {1e3 * self.together:.3g} ms a member-step, in turn "
            f"{1e3 * self.in_turn:.3g}{more}: {'together' if self.is_together else 'in turn'}"
        )


def measure(
    one: Ready, M: int, stop: StopRequest, steps: Steps, work: float = math.inf, rounds: int = ROUNDS
) -> Verdict | None:
    """The speed of a member alone, and of M such together.

    None if `work`, in steps of one, is too little for a trial, or after a signal.
    """
    cfg, task, step = in_turn.placed(one, steps)
    alone = _Tried(step, init_state(step.born, cfg.train.seed), task, stop)
    if stop.received:
        return None
    alone.seconds(1)
    began = time.process_time()
    single, of_cores = alone.seconds(1), time.process_time() - began
    is_one_cpu = jax.default_backend() == "cpu" and len(jax.devices()) == 1
    if of_cores * work < ON_ONE_CPU if is_one_cpu else single * work < ELSEWHERE:
        return None
    second = step.how.recompile and single * cfg.train.steps > execution.RECOMPILE_LEFT
    cfg, task, step = in_turn.placed(one, steps, ONE)
    many = make_vmapped(cfg, task, step, M, steps)
    state = stacked([init_state(step.born, cfg.train.seed)] * M)
    together = _Tried(many, jax.device_put(state, many.layout), task, stop, M)
    n = [min(max(round(CALL / single / some), 1), step.how.steps_per_dispatch) for some in (1, M)]
    found = []
    for _ in range(rounds):
        if stop.received:
            return None
        found.append((together.seconds(n[1]) / M, alone.seconds(n[0])))
    return Verdict(M, found[1:], second)


class _Tried:
    """A compiled step, with states that it may spoil."""

    def __init__(self, step: TrainStep, state: TrainState, task: Task, stop: StopRequest, M: int = 0):
        """`M`: it is the step of so many members."""
        rows = task.batch(np.arange(step.how.steps_per_dispatch), slice(None))
        self._rows = jax.device_put(np.stack([rows] * M) if M else rows, step.layout)
        self._state, self._dials = state, step.dials(0)
        self._program = CompiledStep(step, state, self._rows, stop=stop)

    def seconds(self, n: int) -> float:
        """Of a step, in a call of n."""
        began = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._program(self._state, self._rows, n, self._dials))
        return (time.perf_counter() - began) / n
