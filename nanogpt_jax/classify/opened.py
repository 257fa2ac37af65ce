"""A classifier's run, opened for predictions. Imports jax only to read parameters, so that errors come at once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax import config
from nanogpt_jax.classify import data
from nanogpt_jax.classify.data import Texts
from nanogpt_jax.classify.rows import Label
from nanogpt_jax.classify.settings import ClassifierConfig
from nanogpt_jax.config import UserError
from nanogpt_jax.host import files
from nanogpt_jax.run.opened import open_run


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run's data. UserError if it is missing or damaged."""
    path = run / "data.json"
    try:
        manifest = json.loads(files.read(path))
        labels, _ = manifest["labels"], manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is missing or damaged ({e})") from None
    if not isinstance(labels, list) or not all(type(label) in (str, int) for label in labels):
        raise UserError(f"{path} is damaged: its labels are {labels!r:.60}")
    return manifest


class Classifier:
    """An opened run: settings, tokenizer, labels and parameters. UserError if it is not a classifier, or damaged."""

    def __init__(self, run: Path, checkpoint: str):
        self._opened, self._checkpoint = open_run(run, ClassifierConfig), checkpoint
        self.run, self.cfg, self.tokenizer = run, self._opened.cfg, self._opened.tokenizer
        self.manifest = read_manifest(run)
        self.labels: list[Label] = self.manifest["labels"]
        if len(self.labels) != self.cfg.classify.n_labels:
            raise UserError(
                f"{run} is damaged: {len(self.labels)} labels, but a model for {self.cfg.classify.n_labels}"
            )

    def load(self) -> None:
        """Read the parameters. Takes seconds, so call it when everything else is checked."""
        import jax

        from nanogpt_jax.classify.task import param_shapes
        from nanogpt_jax.model import execution

        self.cfg = replace(self.cfg, model=execution.resolve(self.cfg.model, jax.default_backend()))
        self.params, self.step = self._opened.load(self._checkpoint, param_shapes(self.cfg))

    def encoder(self) -> data.Encoder:
        return data.Encoder(self.tokenizer, self.cfg.model.block_size, self.cfg.data.keep)

    def log_probabilities(self, texts: Texts) -> np.ndarray:
        """[N, Y] float32. UserError if they are not finite."""
        from nanogpt_jax.classify import task
        from nanogpt_jax.distributed.mesh import make_mesh

        predict = task.predict_step(self.cfg.model, make_mesh(config.MeshConfig()))
        width, at_once = data.width_for([texts], self.cfg.model.block_size), min(32, -(-len(texts) // 8) * 8)
        found = task.log_probabilities(predict, self.params, texts, width, at_once, bar=True)
        if not np.isfinite(found).all():
            raise UserError(f"{self.run} at step {self.step} gives probabilities that are not finite: it has diverged")
        return found
