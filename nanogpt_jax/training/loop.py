"""Step, log, evaluate, save, in that order, until the last step or a signal."""

# B batch, W int32 numbers of a row, K steps in a call

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_jax.config import Config, UserError, read_json
from nanogpt_jax.data import batches
from nanogpt_jax.distributed import processes
from nanogpt_jax.distributed.sharding import laid_out
from nanogpt_jax.host import memory, runtime
from nanogpt_jax.host.progress import Part, Progress
from nanogpt_jax.host.signals import StopRequest
from nanogpt_jax.model import execution, gpt2, sizes
from nanogpt_jax.run.checkpoint import load_first_params
from nanogpt_jax.run.metrics import DIVERGED, SKIPPED
from nanogpt_jax.run.places import Folder
from nanogpt_jax.run.recording import Recording
from nanogpt_jax.run.run_dir import how_to_replay
from nanogpt_jax.training.compiled import CompiledStep
from nanogpt_jax.training.state import TrainState, init_state
from nanogpt_jax.training.step import TrainStep
from nanogpt_jax.training.task import Task

MOST_SKIPPED = 32  # steps in a row: so many are no spike


class Diverged(UserError):
    """A loss, a gradient, a weight or the optimizer's state is not finite, or too many steps were skipped in a row."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the step, the seconds, the signal if there was one, and the last validation metrics."""

    step: int
    seconds: float
    signal: signal.Signals | None
    validation: dict[str, float]

    @property
    def loss(self) -> str:
        """The validation loss in words, beside the best possible one if that is known."""
        best = self.validation.get("val/best_possible")
        return f"{self.validation['val/loss']:.4f}" + ("" if best is None else f", the best possible {best:.4f},")


def start_state(cfg: Config, step: TrainStep, run: Recording) -> TrainState:
    """The state of the run's newest complete checkpoint, laid out as `step` takes it; without one, a new state.

    A new state has the best weights of the run train.init_from, if one is named. They are read now, and never again.
    """
    shapes = step.state
    trees = run.restore({"params": shapes.params, "opt_state": shapes.opt_state})
    if trees is not None:
        at = processes.put(np.array(run.step, np.int32), shapes.step.sharding)
        return TrainState(at, trees["params"], trees["opt_state"])
    given, first = None, Path(cfg.train.init_from)
    if cfg.train.init_from != "scratch":
        theirs = gpt2.param_shapes(read_json(first / "config.json").model)
        given = load_first_params(first, laid_out(step.layout.mesh, theirs))  # pyright: ignore[reportArgumentType]
    return init_state(step.born, cfg.train.seed, given)


def calls(start: int, steps: int, most: int, every: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first step, number of steps) from `start` to `steps`: at most `most`, never across a multiple of `every`."""
    while start < steps:
        n = min([most, steps - start] + [e - start % e for e in every if e])
        yield start, n
        start += n


def fit(
    cfg: Config, task: Task, state: TrainState, step: TrainStep, run: Recording, stop: StopRequest,
    part: Part | None = None,
) -> Outcome:  # fmt: skip
    """Train from `state` to cfg.train.steps. The state is donated; the last checkpoint has the final one. `part`: of
    what the run is one, for its bar."""
    left, alone = cfg.train.steps - run.step, processes.count() == 1
    with (
        Progress("step", cfg.train.steps, run.step, patience=0, now="compiling the step", part=part) as progress,
        contextlib.closing(driven(cfg, task, state, step, run, stop, progress)) as loop,
    ):
        try:
            state, rows = next(loop)
            program = CompiledStep(step, state, rows, steps_left=left, stop=stop if alone else None)
            call = loop.send(program)
            while True:
                call = loop.send(program(*call))
        except StopIteration as end:
            return end.value


# yields state, rows; is sent the program for them; from then on yields state, rows, n, dials; is sent state, metrics
Driven = Generator[tuple[Any, ...], Any, Outcome]


def driven(
    cfg: Config,
    task: Task,
    state: TrainState,
    step: TrainStep,
    run: Recording,
    stop: StopRequest,
    progress: Progress,
) -> Driven:
    """The loop of `fit`, which leaves compiling and calling to its driver: that may take the calls of many at once."""
    t, start, clock = cfg.train, run.step, time.monotonic()
    if 0 < task.patience <= run.stale:  # it had ended early
        return Outcome(start, 0.0, None, {})
    log = run.log  # opened now: what is wrong with it is told before the first step
    agreed = processes.AgreedStop(stop, step.layout.mesh)  # pyright: ignore[reportArgumentType]
    reader = _Reader(cfg, task, run, progress)
    ahead = batches.prefetch(_on_device(cfg, task, step, start), depth=2)
    if note := _slow(cfg):
        progress.note(note)
    validation: dict[str, float] = {}
    at, saved, program = start, None, None
    try:
        for first, n, rows in ahead:
            if agreed.poll():
                break
            if program is None:
                program = yield state, rows
                if agreed.poll():
                    break
                processes.meet("the compiled step")
                if note := _large(cfg, program):
                    progress.note(note)
                reader.begin()
            if news := program.news():
                progress.note(f"step {at}: {news}")
            state, metrics = yield state, rows, n, step.dials(first)
            if saved == first:
                memory.trim()  # its save held arrays where a step's memory lay: the next would hold a second block
            reader.add(first, n, metrics)
            at = first + n

            is_last, is_best, loss = at == t.steps, False, None
            if is_last or (t.eval_every and at % t.eval_every == 0):
                reader.drain()
                memory.trim()
                with reader.paused():
                    scores = task.evaluate(state.params)
                reader.check(at, {f"validation {name}": value for name, value in scores.items()})
                validation = {f"val/{name}": value for name, value in scores.items()}
                log.write(at, validation)
                progress.say(f"step {at}: {task.summary.format(**scores)}{_beside(cfg, run, at)}")
                loss = task.criterion(scores)
                is_best = run.judge(loss)
                is_last = is_last or 0 < task.patience <= run.stale
            if is_last or is_best or (t.save_every and at % t.save_every == 0):
                reader.save(state, at, loss)
                saved = at
            if is_last:
                break
        reader.drain()
        if agreed.received:
            reader.save(state, at, None)
        run.checkpoints.wait()
    finally:
        ahead.close()
    return Outcome(at, time.monotonic() - clock, agreed.received, validation)


def _on_device(cfg: Config, task: Task, step: TrainStep, start: int) -> Iterator[tuple[int, int, jax.Array]]:
    """(first step, number of steps, their rows [K, B, W] on the devices) of each call."""
    t, K = cfg.train, step.how.steps_per_dispatch
    for first, n in calls(start, t.steps, K, (t.eval_every, t.save_every)):

        def rows_of(mine: Any, first: int = first, n: int = n) -> np.ndarray:
            rows = task.batch(np.arange(first, first + n), mine)
            return np.concatenate([rows, np.zeros((K - n, *rows.shape[1:]), np.int32)])

        yield first, n, processes.place_rows(step.layout, (K, t.batch_size, task.row_length), rows_of)


def _slow(cfg: Config) -> str:
    """A note if a step takes a CPU minutes."""
    if jax.default_backend() != "cpu":
        return ""
    minutes = sizes.product_flops(cfg) / execution.CORE_FLOPS / runtime.cores() / 60
    if minutes < 1:
        return ""
    return (
        f"note: at {execution.CORE_FLOPS / 1e9:.0f} GFLOP/s a core, a step takes {minutes:.0f} minutes on this "
        f"machine; with train.batch_size below {cfg.train.batch_size} it takes less"
    )


def _large(cfg: Config, program: CompiledStep) -> str:
    """A note if a step takes more memory than is free: the system may kill the process without a message."""
    needs, free = program.temporary_memory / 1e9, memory.free() / 1e9
    if not needs > free > 0:
        return ""
    return (
        f"note: a step takes {needs:.1f} GB of memory, and about {free:.1f} are free; "
        f"with train.micro_batch below {cfg.train.micro_batch or cfg.train.batch_size} it takes less"
    )


def _beside(cfg: Config, run: Recording, at: int) -> str:
    """Whether the run is normal at its evaluation after step `at`; "" if nothing is known of such runs."""
    try:
        from nanogpt_jax.normal.verdict import beside
    except ImportError:  # the room was removed
        return ""
    return beside(cfg, run.directory, at) if processes.is_first() else ""


def _start(cfg: Config, run: Recording, loss: float) -> str:
    """A note if `loss`, that of step 1, is not that of new weights."""
    try:
        from nanogpt_jax.normal.verdict import start
    except ImportError:
        return ""
    return start(cfg, run.directory, loss) if processes.is_first() else ""


@jax.jit
def are_finite(tree: Any) -> jax.Array:
    """Whether every number in `tree` is finite -> [] bool."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(x).all() for x in floats]).all()


def not_finite(
    cfg: Config, start: int, step: int, saved: list[Folder], what: str, replay: str = "", other: str = ""
) -> Diverged:
    """The error for a run that has diverged by `step`. It names the remaining checkpoints, and the command `replay`.

    `other`: a remedy, instead of the usual one.
    """
    o = cfg.optim
    remedy = other or (
        f"try a lower optim.learning_rate than {o.learning_rate:g}, or more optim.warmup_steps than {o.warmup_steps}"
    )
    if 0 < start == step - 1 and not other:
        remedy = f"the first step after checkpoint {start}: if that is damaged, delete its folder {saved[-1]}"
    elif saved:
        kept = " and ".join(path.name for path in saved)
        remedy = f"kept in {saved[0].parent} from before: {kept}\n       {remedy}, in another --run-dir"
    else:
        remedy = f"nothing was saved before\n       {remedy}"
    remedy += f"\n       to see which operation broke, and on which text: {replay}" if replay else ""
    return Diverged(f"step {step}: {what}; the run stops here, and this is not saved\n       {remedy}")


class _Reader:
    """Reads the metrics of each call: as soon as they are ready, at the latest during the next call."""

    def __init__(self, cfg: Config, task: Task, run: Recording, progress: Progress):
        self._cfg, self._tokens, self._run, self._progress = cfg, task.tokens_per_step, run, progress
        self._pending: deque[tuple[int, int, dict[str, jax.Array]]] = deque()
        self._clock = time.monotonic()
        self._counted = 0  # steps since the clock was read
        self._told = False  # whether a skipped step was

    def begin(self) -> None:
        """Restart the clocks, so that compile time does not count in the speed or the time left."""
        self._clock = time.monotonic()
        self._progress.begin(now="loss ...")

    def add(self, first: int, n: int, metrics: dict[str, jax.Array]) -> None:
        self._pending.append((first, n, metrics))
        while self._pending and (len(self._pending) > 1 or metrics["loss"].is_ready()):  # pyright: ignore[reportAttributeAccessIssue]
            self._read()

    def drain(self) -> None:
        while self._pending:
            self._read()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here does not count in the speed."""
        began = time.monotonic()
        yield
        self._clock += time.monotonic() - began

    def check(self, step: int, values: dict[str, float]) -> None:
        """UserError if one of `values`, measured at `step`, is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise self._diverged(step, f"the {name} is {value}")

    def save(self, state: TrainState, step: int, loss: float | None) -> None:
        """Save the state if it is finite. A finite loss and gradient do not mean that the update was finite."""
        self.drain()
        for name, tree in (("parameters", state.params), ("optimizer's state", state.opt_state)):
            if not are_finite(tree):
                raise self._diverged(step, f"there are nan or inf in the {name}")
        memory.trim()
        self._run.save(step, {"params": state.params, "opt_state": state.opt_state}, loss)

    def _diverged(self, step: int, what: str, other: str = "", in_a_row: int = 0) -> Diverged:
        run = self._run
        run.log.write(step, {DIVERGED: 1.0} | ({SKIPPED: in_a_row} if in_a_row else {}))
        replay = how_to_replay(run.directory, self._cfg)
        return not_finite(self._cfg, run.step, step, run.checkpoints.saved(), what, replay, other)

    def _skipped(self, step: int, in_a_row: int, loss: float, norm: float) -> None:
        """Tell of the first skipped step; UserError if it is one of too many in a row."""
        its, z = f"loss {loss:.4g}, gradient norm {norm:.4g}", self._cfg.optim.skip_spikes
        if not self._told:
            self._told = True
            self._progress.note(f"step {step}: skipped by optim.skip_spikes={z:g} ({its}); later ones are counted")
        if in_a_row >= MOST_SKIPPED:
            other = f"try a larger optim.skip_spikes than {z:g}, or 0" if math.isfinite(loss + norm) else ""
            what = f"skipped, and so were the {in_a_row - 1} steps before it ({its})"
            raise self._diverged(step, what, other, in_a_row)

    def _read(self) -> None:
        first, n, metrics = self._pending.popleft()
        values = jax.device_get(metrics)
        t = self._cfg.train
        self._counted += n
        now = time.monotonic()
        speed = self._counted * self._tokens / max(now - self._clock, 1e-9)
        for i in range(n):
            step = first + i + 1
            row = {name: float(x[i]) for name, x in values.items()}
            loss, norm, in_a_row = row.pop("loss"), row["grad_norm"], int(row.pop("in_a_row", 0))
            if in_a_row:
                self._skipped(step, in_a_row, loss, norm)
            else:
                self.check(step, {"loss": loss, "gradient norm": norm})
            if step == 1 and (note := _start(self._cfg, self._run, loss)):
                self._progress.note(f"step 1: {note}")
            if step % t.log_every == 0 or step == t.steps:
                self._run.log.write(step, {"train/loss": loss, **row, "tokens_per_second": round(speed, 1)})
                words = f"loss {loss:.4f}  {speed:,.0f} tokens/s"
                words += f"  {skipped:.0f} skipped" if (skipped := row.get("skipped", 0)) else ""
                self._progress.update(step, words, measured=first + n)
                self._clock, self._counted = now, 0
