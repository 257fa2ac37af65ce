"""Step, log, evaluate, save, in that order, until the last step or a signal."""

import math
import operator
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanogpt_jax import runtime
from nanogpt_jax.config import Config, UserError
from nanogpt_jax.data import batches
from nanogpt_jax.data.prepare import Dataset
from nanogpt_jax.distributed import memory
from nanogpt_jax.distributed.sharding import BATCH, shard
from nanogpt_jax.evaluation.loss import evaluate, make_score
from nanogpt_jax.model import gpt2
from nanogpt_jax.model.gpt2 import Params
from nanogpt_jax.training.checkpoint import Checkpointer
from nanogpt_jax.training.metrics import MetricsLog, Progress
from nanogpt_jax.training.program import Program
from nanogpt_jax.training.signals import StopRequest
from nanogpt_jax.training.step import TrainState, step_flops

# Seconds that a run has taken, and that are left, before the step is compiled a second time, which keeps one core for 3
# to 25: one that is only tried out is left alone, and a short one would not get them back.
BEGUN, LONG = 10, 60

Check = Callable[[int, dict[str, float]], None]  # (step, values by name): an error if one is not finite

PER_CORE = 50e9  # operations a second that a core of a processor with AVX2 does in large products, if not slow


@dataclass(frozen=True)
class Task:
    """What is trained on and how it is measured: all that `fit` asks about a kind of model."""

    row: int  # int32 numbers that the step takes for each sequence
    batch: Callable[[np.ndarray], np.ndarray]  # steps [n] -> rows [n, B, row]
    evaluate: Callable[[Params], dict[str, float]]  # of the whole validation split
    say: str  # the scores in words, for str.format
    loss: Callable[[dict[str, float]], float]  # of the scores, what the best checkpoint has least of
    tokens_per_step: float
    patience: int = 0  # evaluations without a better one after which the run ends; 0: never


def language_model(cfg: Config, mesh: Mesh, data: Dataset) -> Task:
    """Next-token prediction."""
    t, T = cfg.train, cfg.model.block_size
    score = make_score(cfg.model, mesh)

    def batch(steps: np.ndarray) -> np.ndarray:
        return batches.batch(data.train, seed=t.seed, step=steps, batch_size=t.batch_size, block_size=T)

    def scores(params: Params) -> dict[str, float]:
        return evaluate(score, params, data.val, mesh, block_size=T, n_bytes=data.manifest["val"]["bytes"])

    return Task(
        row=T + 1,
        batch=batch,
        evaluate=scores,
        say="validation loss {loss:.4f}, {bits_per_byte:.4f} bits per byte",
        loss=operator.itemgetter("loss"),
        tokens_per_step=t.batch_size * T,
    )


@dataclass(frozen=True)
class Outcome:
    """How a run ended: at which step, after how long, by which signal if by one, and the last validation metrics."""

    step: int
    seconds: float
    signal: signal.Signals | None
    validation: dict[str, float]


def headline(cfg: Config, run_dir: Path, data: Dataset, mesh: Mesh, step: int) -> str:
    """What is about to be trained, on what, and where it goes: two lines."""
    m, t = cfg.model, cfg.train
    begin = f"going on in {run_dir} from step {step}" if step else f"training in {run_dir}"
    return (
        f"{begin}: GPT-2 of {gpt2.n_params(m):,} parameters (n_layer={m.n_layer} n_head={m.n_head} n_embd={m.n_embd} "
        f"block_size={m.block_size}) on {mesh.size} {jax.default_backend()}\n"
        f"{t.steps} steps of {t.batch_size * m.block_size:,} tokens; {cfg.data.title}: {len(data.train):,} tokens to "
        f"train on, {len(data.val):,} to validate, vocabulary {m.vocab_size}"
    )


def choose_steps_per_dispatch(cfg: Config, platform: str) -> int:
    """More than 1 if a step is under 40 GFLOP: then the call itself costs something.

    The defaults' step takes a CPU 35 ms, and an H100 less than a millisecond, of which the call would be half.
    """
    if cfg.train.steps_per_dispatch:
        return cfg.train.steps_per_dispatch
    return {"cpu": 8, "gpu": 32}.get(platform, 1) if step_flops(cfg) < 40e9 else 1


def dispatches(start: int, steps: int, most: int, every: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first step, number of steps) from `start` to `steps`: at most `most`, never across a multiple of `every`."""
    while start < steps:
        n = min([most, steps - start] + [e - start % e for e in every if e])
        yield start, n
        start += n


def fit(
    cfg: Config,
    mesh: Mesh,
    state: TrainState,
    train_step: Any,
    steps_per_dispatch: int,
    task: Task,
    checkpoints: Checkpointer,
    log: MetricsLog,
    meta: dict[str, Any],
    stop: StopRequest,
) -> Outcome:
    """Train from `state` to cfg.train.steps. The state is donated; what it became is in the last checkpoint."""
    t, K = cfg.train, steps_per_dispatch
    start, clock = int(state.step), time.monotonic()
    layout = shard(mesh, P(None, *BATCH))

    def tokens_of(first: int, n: int) -> jax.Array:
        stack = np.zeros((K, t.batch_size, task.row), np.int32)
        stack[:n] = task.batch(np.arange(first, first + n))
        return jax.device_put(stack, layout)

    plan = dispatches(start, t.steps, K, (t.eval_every, t.save_every))
    ahead = batches.prefetch(((first, n, tokens_of(first, n)) for first, n in plan), depth=2)
    progress = Progress(start, t.steps)
    if jax.default_backend() == "cpu" and (minutes := step_flops(cfg) / PER_CORE / runtime.cores() / 60) >= 1:
        progress.note(
            f"note: at {PER_CORE / 1e9:.0f} GFLOP/s a core, a step takes {minutes:.0f} minutes on this machine; "
            f"with train.batch_size below {t.batch_size} it takes less"
        )

    def check(step: int, values: dict[str, float]) -> None:
        """UserError if one of `values`, what was measured at `step`, is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise not_finite(cfg, start, step, checkpoints, f"the {name} is {value}")

    def save(state: TrainState, step: int, val_loss: float | None) -> None:
        """Save a state that is finite: a step's loss and gradients tell nothing of what its update made."""
        reader.drain()
        for name, tree in (("parameters", state.params), ("optimizer's state", state.opt_state)):
            if not are_finite(tree):
                raise not_finite(cfg, start, step, checkpoints, f"there are nan or inf in the {name}")
        memory.give_back()
        checkpoints.save(state, step, meta, val_loss)

    reader = _Reader(cfg, check, task.tokens_per_step, log, progress)
    validation: dict[str, float] = {}
    step, program, began = start, None, 0.0
    try:
        for first, n, tokens in ahead:
            if stop.received:
                break
            if program is None:
                program = Program(train_step, state, tokens, np.int32(n), stop=stop)
                if stop.received:
                    break
                needs, free = program.temporary_memory / 1e9, memory.free() / 1e9
                if needs > free > 0:  # the system may end the process without a word
                    size = t.micro_batch or t.batch_size
                    progress.note(
                        f"note: a step takes {needs:.1f} GB of memory, and about {free:.1f} are free; "
                        f"with train.micro_batch below {size} it takes less"
                    )
                reader.begin()
                began = time.monotonic()
            if program.renew():
                progress.note(f"step {step}: a second, quicker program of the step takes over")
            state, metrics = program(state, tokens, np.int32(n))
            reader.add(first, n, metrics)
            step = first + n
            spent = time.monotonic() - began
            if spent > BEGUN and spent / (step - start) * (t.steps - step) > LONG:
                program.improve()

            is_last = step == t.steps
            val_loss = None
            if is_last or (t.eval_every and step % t.eval_every == 0):
                reader.drain()
                memory.give_back()
                paused = time.monotonic()
                scores = task.evaluate(state.params)
                check(step, {f"validation {name}": value for name, value in scores.items()})
                validation = {f"val/{name}": value for name, value in scores.items()}
                log.write(step, validation)
                progress.say(f"step {step}: {task.say.format(**scores)}")
                val_loss = task.loss(scores)
                reader.pause(time.monotonic() - paused)
            best = meta["best_val_loss"]
            is_best = val_loss is not None and (best is None or not best <= val_loss)  # an old run's may be nan
            if is_best:
                meta = {**meta, "best_val_loss": val_loss, "stale": 0}
            elif val_loss is not None:
                meta = {**meta, "stale": meta["stale"] + 1}
                is_last = is_last or 0 < task.patience <= meta["stale"]
            if is_last or is_best or (t.save_every and step % t.save_every == 0):
                save(state, step, val_loss)
            if is_last:
                break
        reader.drain()
        if stop.received:
            save(state, step, None)
        checkpoints.wait()
    finally:
        ahead.close()
        progress.close()
    return Outcome(step, time.monotonic() - clock, stop.received, validation)


@jax.jit
def are_finite(tree: Any) -> jax.Array:
    """Whether every number in `tree` is finite -> [] bool."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(x).all() for x in floats]).all()


def not_finite(cfg: Config, start: int, step: int, checkpoints: Checkpointer, what: str) -> UserError:
    """The error for a run that has diverged by `step`. It names the checkpoints that there are."""
    o, saved = cfg.optim, checkpoints.saved()
    remedy = (
        f"try a lower optim.learning_rate than {o.learning_rate:g}, or more optim.warmup_steps than {o.warmup_steps}"
    )
    if 0 < start == step - 1:
        remedy = f"the first step after checkpoint {start}: if that is damaged, delete its folder {saved[-1]}"
    elif saved:
        kept = " and ".join(path.name for path in saved)
        remedy = f"kept in {saved[0].parent} from before: {kept}\n       {remedy}, in another --run-dir"
    else:
        remedy = f"nothing was saved before\n       {remedy}"
    return UserError(f"step {step}: {what}; the run stops here, and this is not saved\n       {remedy}")


class _Reader:
    """Reads the metrics of a dispatch when it is done, at the latest while the device works on the next one."""

    def __init__(self, cfg: Config, check: Check, tokens_per_step: float, log: MetricsLog, progress: Progress):
        self._cfg, self._check, self._tokens, self._log, self._progress = cfg, check, tokens_per_step, log, progress
        self._pending: deque[tuple[int, int, dict[str, jax.Array]]] = deque()
        self._clock = time.monotonic()
        self._counted = 0  # steps since the clock was read

    def begin(self) -> None:
        """Start the clocks anew: what compiling took says nothing of the speed or the time left."""
        self._clock = time.monotonic()
        self._progress.begin()

    def add(self, first: int, n: int, metrics: dict[str, jax.Array]) -> None:
        self._pending.append((first, n, metrics))
        while self._pending and (len(self._pending) > 1 or metrics["loss"].is_ready()):  # pyright: ignore[reportAttributeAccessIssue]
            self._read()

    def drain(self) -> None:
        while self._pending:
            self._read()

    def pause(self, seconds: float) -> None:
        """Take `seconds`, spent on something else, out of the measured speed."""
        self._clock += seconds

    def _read(self) -> None:
        first, n, metrics = self._pending.popleft()
        values = jax.device_get(metrics)
        t = self._cfg.train
        self._counted += n
        now = time.monotonic()
        speed = self._counted * self._tokens / max(now - self._clock, 1e-9)
        for i in range(n):
            step = first + i + 1
            loss, norm, rate = (float(values[name][i]) for name in ("loss", "grad_norm", "learning_rate"))
            self._check(step, {"loss": loss, "gradient norm": norm})
            if step % t.log_every == 0 or step == t.steps:
                row = {"train/loss": loss, "grad_norm": norm, "learning_rate": rate}
                self._log.write(step, {**row, "tokens_per_second": round(speed, 1)})
                self._progress.update(step, loss, speed, first + n)
                self._clock, self._counted = now, 0
