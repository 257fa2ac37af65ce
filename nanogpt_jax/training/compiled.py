"""The step, compiled; in a long run on one CPU a second time, to a faster program."""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np

from nanogpt_jax.host import memory, runtime
from nanogpt_jax.host.signals import StopRequest
from nanogpt_jax.model import execution
from nanogpt_jax.training.dials import Dials
from nanogpt_jax.training.state import TrainState
from nanogpt_jax.training.step import Metrics, TrainStep


class CompiledStep:
    """A jitted step (state, rows, n, dials), compiled for these arguments.

    XLA:CPU reuses buffers in program order; two cores execute in another order and stall on buffers that are still
    being read. A second program allocates a buffer of its own for every array: the same operations, the same bits,
    often faster. XLA cannot cache a program with several blocks of temporary memory, so each run compiles it anew, in a
    thread, while the first program runs.

    With Execution.recompile this watches the clock and starts to compile once that pays (execution.RECOMPILE_*). As
    compiling takes memory too, it does not start if it would take more than a share of what is free.
    """

    def __init__(
        self,
        step: TrainStep,
        state: TrainState,
        rows: jax.Array,
        *,
        steps_left: int = 0,
        stop: StopRequest | None = None,
    ):
        """Blocks until compiled. If `stop` comes first, returns uncompiled and must not be called."""
        self._lowered: Any = step.jitted.lower(state, rows, np.int32(len(rows)), step.dials(0))
        compiling = _aside(self._lowered.compile)  # Python hears no signal while its main thread is inside XLA
        while not (stop and stop.received) and not wait([compiling], timeout=0.1).done:
            pass
        self._program: Any = compiling.result() if compiling.done() else None
        self._second: Future[Any] | None = None
        self._price = 0  # bytes that compiling it takes; 0 once announced
        device, *others = jax.tree.leaves(state)[0].devices()
        self._is_one_cpu = device.platform == "cpu" and not others
        self._can_improve = step.how.recompile and self._is_one_cpu
        self._lowered = self._lowered if self._can_improve else None
        self._left, self._taken, self._began = steps_left, 0, time.monotonic()
        memory.trim()  # of compiling, before the step allocates its own

    def __call__(self, state: TrainState, rows: jax.Array, n: int, dials: Dials) -> tuple[TrainState, Metrics]:
        if self._can_improve and self._taken:
            spent = time.monotonic() - self._began
            left = spent / self._taken * (self._left - self._taken)
            if spent > execution.RECOMPILE_AFTER and left > execution.RECOMPILE_LEFT:
                self.improve()
        self._taken += n
        return self._program(state, rows, np.int32(n), dials)

    @property
    def temporary_memory(self) -> int:
        """Bytes that a step allocates and frees, on one CPU; 0 elsewhere."""
        return self._program.memory_analysis().temp_size_in_bytes if self._is_one_cpu else 0

    def improve(self, at_once: bool = False) -> None:
        """Start to compile the second program, once. `at_once`: wait for it and switch to it."""
        if self._can_improve:
            self._can_improve = False
            self._second = _aside(self._compile_apart)
            if at_once:
                wait([self._second])
                self.renew()

    def news(self) -> str:
        """Switch to the second program if it is compiled -> a message if that or its compilation is new, else ""."""
        if self._price > execution.RECOMPILE_TOLD:
            gigabytes, self._price = self._price / 1e9, 0
            return (
                f"a faster program of the step is being compiled, in about {gigabytes:.1f} GB of memory; "
                "train.recompile=off does without"
            )
        return "a second, faster program of the step takes over" if self.renew() else ""

    def renew(self) -> bool:
        """Switch to the second program if it is compiled by now -> whether it switched."""
        if not self._second or not self._second.done():
            return False
        failed = self._second.exception()  # an XLA without that option: keep the first program
        second = None if failed else self._second.result()
        self._program = second or self._program
        self._second = self._lowered = None
        memory.trim()
        return second is not None

    def _compile_apart(self) -> Any:
        cost = execution.RECOMPILE_COST * self._program.as_text().count("\n") ** 2
        too_much = cost > memory.free() * execution.RECOMPILE_SHARE
        if self.temporary_memory > execution.RECOMPILE_TEMPORARY or too_much:
            return None
        self._price = cost
        warnings.filterwarnings("ignore", r"(?s)Error writing persistent compilation cache.*Multiple temp buffer")
        return self._lowered.compile(compiler_options={"xla_multiheap_size_constraint_per_heap": 1})  # bytes


def _aside(work: Callable[[], Any]) -> Future[Any]:
    """Runs `work` in a thread that does not outlive the command."""
    executor = ThreadPoolExecutor(1, runtime.SPARE)
    future = executor.submit(work)
    executor.shutdown(wait=False)
    return future
