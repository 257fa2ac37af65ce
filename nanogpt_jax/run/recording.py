"""What training writes, as one open object: checkpoints, metrics, and the best loss so far."""

from pathlib import Path
from typing import Any

from nanogpt_jax.config import TrainConfig
from nanogpt_jax.distributed import processes
from nanogpt_jax.run.checkpoint import Checkpointer
from nanogpt_jax.run.metrics import MetricsLog, Silent


class Recording:
    """A context manager: leaving it waits for a save in progress.

    `step` is where the run goes on from, 0 for a new one. `best_loss` is the lowest so far (None: none yet), and
    `stale` counts the evaluations since.
    """

    def __init__(self, directory: Path, cfg: TrainConfig):
        self.directory, self._cfg = directory, cfg
        self.checkpoints = Checkpointer(directory, cfg.keep)
        self.step, self.best_loss, self.stale = 0, None, 0
        self._log: MetricsLog | None = None

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if self._log:
                self._log.__exit__(*error)
        finally:
            self.checkpoints.__exit__(*error)

    @property
    def log(self) -> MetricsLog | Silent:
        """Opened on first use, which drops the lines after `step`. Of many processes, the first alone writes."""
        if not processes.is_first():
            return Silent()
        self._log = self._log or MetricsLog(self.directory, self._cfg, self.step)
        return self._log

    def restore(self, shapes: dict[str, Any]) -> dict[str, Any] | None:
        """The trees of the newest complete checkpoint, sharded as in `shapes`; None if there is none."""
        found = self.checkpoints.restore(shapes)
        if found is None:
            return None
        self.step, trees, meta = found
        self.best_loss, self.stale = meta.get("best_val_loss"), meta.get("stale", 0)
        return trees

    def judge(self, loss: float) -> bool:
        """Record `loss` -> whether it is the lowest so far."""
        if self.best_loss is None or not self.best_loss <= loss:  # an old run's may be nan
            self.best_loss, self.stale = loss, 0
            return True
        self.stale += 1
        return False

    def save(self, step: int, trees: dict[str, Any], loss: float | None) -> None:
        """Start a save; returns when the trees are copied. The best checkpoint has the lowest `loss`."""
        self.checkpoints.save(step, trees, {"step": step, "best_val_loss": self.best_loss, "stale": self.stale}, loss)
