"""The step as a compiled program, and beside it, where the run is long, a quicker one."""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from nanogpt_jax import runtime
from nanogpt_jax.distributed import memory
from nanogpt_jax.training.signals import StopRequest
from nanogpt_jax.training.step import Metrics, TrainState

MOST_TEMPORARY = 2**30  # bytes; the second program takes two to three times as many, and gives larger models 1 % only
COST = 8  # bytes for each line of a program, squared: 6.2 to 8.5 were measured, from 6,000 to 31,000 lines


class Program:
    """A jitted step, compiled for these arguments; on one CPU a second time, where the run is worth it.

    XLA:CPU gives arrays the same memory where the one is not needed any more when the other is made, in the order in
    which it wrote the operations down. Two cores take them in another order, and then one waits until the other has
    read what still lies there. The second program has memory for every array apart: the same operations and the same
    bits, 1.0 to 1.4 times as fast. JAX cannot keep it in its cache, since XLA stores no program with several blocks of
    temporary memory; so the first one works while it is compiled. XLA also takes much memory for it, 0.7 gigabytes
    for the defaults, 3.6 for six layers of 384 channels, as it notes the life of every array with each array: so it is
    made only where that is less than a third of what is free, and for no model with much temporary memory.
    """

    def __init__(self, step: Any, *arguments: Any, stop: StopRequest | None = None):
        """Returns when the program is there; without one, and not to be called, where `stop` was received before."""
        self._lowered: Any = step.lower(*arguments)
        compiling = _aside(self._lowered.compile)  # Python hears no signal while its main thread is inside XLA
        while not (stop and stop.received) and not wait([compiling], timeout=0.1).done:
            pass
        self._program: Any = compiling.result() if compiling.done() else None
        self._next: Future[Any] | None = None
        device, *others = jax.tree.leaves(arguments[0])[0].devices()
        self._can_improve = self._is_one_cpu = device.platform == "cpu" and not others
        if not self._is_one_cpu:
            self._lowered = None
        # What compiling took, before the step takes memory of its own: 136 MiB less at the peak of GPT-2's 124M.
        memory.give_back()

    def __call__(self, *arguments: Any) -> tuple[TrainState, Metrics]:
        return self._program(*arguments)

    @property
    def temporary_memory(self) -> int:
        """Bytes that a step takes and gives back, on one CPU; 0 elsewhere."""
        return self._program.memory_analysis().temp_size_in_bytes if self._is_one_cpu else 0

    def improve(self, at_once: bool = False) -> None:
        """Begin to compile the second program, once. `at_once`: wait for it and take it."""
        if self._can_improve:
            self._can_improve = False
            self._next = _aside(self._compile_apart)
            if at_once:
                wait([self._next])
                self.renew()

    def renew(self) -> bool:
        """Take the second program, if it is there by now -> whether it was taken."""
        if not self._next or not self._next.done():
            return False
        second = None if self._next.exception() else self._next.result()  # an XLA without that option: the first only
        self._program = second or self._program
        self._next = self._lowered = None
        memory.give_back()
        return second is not None

    def _compile_apart(self) -> Any:
        cost = COST * self._program.as_text().count("\n") ** 2
        if self.temporary_memory > MOST_TEMPORARY or cost > memory.free() / 3:
            return None
        warnings.filterwarnings("ignore", r"(?s)Error writing persistent compilation cache.*Multiple temp buffer")
        return self._lowered.compile(compiler_options={"xla_multiheap_size_constraint_per_heap": 1})  # bytes


def _aside(work: Callable[[], Any]) -> Future[Any]:
    """`work` in a thread that nobody waits for when the command has ended."""
    executor = ThreadPoolExecutor(1, runtime.SPARE)
    future = executor.submit(work)
    executor.shutdown(wait=False)
    return future
