"""Where numbers go: metrics.jsonl always, TensorBoard and Weights & Biases if asked for."""

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from nanogpt_jax.config import TrainConfig, UserError
from nanogpt_jax.host import files
from nanogpt_jax.run.places import checkpoint_steps

DIVERGED = "diverged"  # in the line of the step that ended a run, because something was not finite
SKIPPED = "skipped_in_a_row"  # in the same line, if skipped steps ended it: how many, with that one


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. Damaged ones are left out: a crash may cut the last one short."""
    rows = []
    for line in files.read(path).splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


class MetricsLog:
    """Appends to RUN/metrics.jsonl, one JSON object a line, each with its `step`."""

    def __init__(self, run_dir: Path, cfg: TrainConfig, step: int):
        """Drops lines after `step`: those steps will be taken again."""
        self._run_dir, self._path = run_dir, run_dir / "metrics.jsonl"
        try:
            kept = [row for row in read_metrics(self._path) if row["step"] <= step]
            files.write(self._path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0))
        except OSError as e:
            raise self._failed(e) from None
        self._tensorboard = _tensorboard(run_dir, step) if cfg.tensorboard else None
        self._wandb = _wandb(run_dir) if cfg.wandb else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line. Numbers that are not finite become null, as JSON has no others."""
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, **known}).encode() + b"\n"
        try:
            while line:  # a full disk takes a part, and then says why it takes no more
                line = line[os.write(self._file, line) :]
        except OSError as e:  # the next start drops the incomplete line
            raise self._failed(e) from None
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def _failed(self, error: OSError) -> UserError:
        steps = checkpoint_steps(self._run_dir)
        last = f"from checkpoint {steps[-1]}" if steps else "from the start, as there is no checkpoint yet"
        return UserError(
            f"cannot write {self._path}: {error.strerror or error}; the run stops here\n"
            f"       see to that (a full disk: free some space); the same command then goes on {last}"
        )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


class Silent:
    """A log that keeps nothing."""

    def write(self, step: int, values: dict[str, float]) -> None:
        pass


def _tensorboard(run_dir: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("train.tensorboard=true needs pip install 'nanogpt-jax[tensorboard]'") from None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)


def _wandb(run_dir: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("train.wandb=true needs pip install 'nanogpt-jax[wandb]'") from None
    # Needs no account: without one, W&B writes its files into the run directory, for `wandb sync` later.
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    return wandb.init(project="nanogpt-jax", id=wandb_id(run_dir), dir=str(run_dir), resume="allow", mode=mode)  # pyright: ignore


def wandb_id(run_dir: Path) -> str:
    """A run's id in W&B, the same if it is resumed: its path below runs/, as members of two sweeps may share a name;
    elsewhere, its name. With a dash for what W&B allows in no id."""
    *above, name = run_dir.resolve().parts
    below = above[len(above) - above[::-1].index("runs") :] if "runs" in above else []
    return re.sub(r"[/\\#?%:]", "-", "-".join([*below, name]))
