"""A finished or running run, opened: the one way in for sampling, evaluation, export and classifiers.

Opening needs no JAX, so that missing or damaged files are reported at once. Only `load` reads parameters.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from nanogpt_jax import config
from nanogpt_jax.config import Config, UserError, parse
from nanogpt_jax.data import tokenizer
from nanogpt_jax.data.tokenizer import Tokenizer
from nanogpt_jax.host import messages
from nanogpt_jax.run import places
from nanogpt_jax.run.metrics import DIVERGED, read_metrics
from nanogpt_jax.run.places import checkpoint_steps
from nanogpt_jax.run.run_dir import IMPORTED, how_to_replay

Kind = TypeVar("Kind", bound=Config)


@dataclass(frozen=True)
class Run(Generic[Kind]):
    path: Path
    cfg: Kind
    tokenizer: Tokenizer

    def load(self, checkpoint: str = "best", shapes: Any = None) -> tuple[Any, int]:
        """The parameters of a checkpoint (best, latest or a step) and its step, on the first device. Takes seconds.

        `shapes`: jax.ShapeDtypeStructs of the parameters, if they are not a language model's.
        """
        from nanogpt_jax.model import gpt2
        from nanogpt_jax.run.checkpoint import load_params

        return load_params(self.path, shapes or gpt2.param_shapes(self.cfg.model), checkpoint)


def open_run(path: Path, kind: type[Kind] = Config) -> Run[Kind]:
    """Open a run. UserError if it is none of this kind, has no checkpoint, or if its files do not fit together."""
    cfg = config.read_json(existing(path) / "config.json", kind)
    found = tokenizer.load(path / "tokenizer")
    hint = f"if {path / 'config.json'} was changed, bring the old one back"
    tokenizer.check_fit(found, cfg.model.vocab_size, f"{path} is damaged: its tokenizer", hint)
    if not checkpoint_steps(path):
        raise UserError(_without_checkpoint(path, cfg))
    return Run(path, cfg, found)


def _without_checkpoint(path: Path, cfg: Config) -> str:
    """Why there is nothing to open, as metrics.jsonl tells it."""
    broke = next((row["step"] for row in read_metrics(path / "metrics.jsonl")[-1:] if row.get(DIVERGED)), None)
    if broke is None:
        return f"{path} has no checkpoint yet"
    replay = how_to_replay(path, cfg)
    why = f"\n       to see which operation broke, and on which text: {replay}" if replay else ""
    return f"{path} has no checkpoint: it diverged at step {broke}, before the first was saved{why}"


def existing(run: Path) -> Path:
    """`run`, if it is a directory; config.read_json says whether it is a run."""
    if os.path.isdir(run):  # Path's own raise errors for a name that no file system takes
        return run
    if os.path.exists(run):
        raise UserError(f"{run} is a file; a run is a directory, like runs/default")
    near = config.suggestion(str(run), [str(p) for p in Path("runs").glob("*/")])
    near = near or config.suggestion(run.name, [p.name for p in Path("runs").glob("*/")])
    raise UserError(f"no run {run}" + (near or f"\n       train one first: {config.program('train')}"))


def newest(folder: Path) -> Path:
    """The newest language model with a checkpoint in `folder`; runs that were never trained come last."""

    def rank(run: Path) -> tuple[bool, float]:
        last = checkpoint_steps(run)[-1]
        return last > 0 or (run / IMPORTED).exists(), places.saved_at(run, last)

    found = [p.parent for p in folder.glob("*/config.json") if not p.parent.name.startswith(".")]  # an import under way
    runs = [run for run in found if _has_checkpoints(run)]
    for run in sorted(runs, key=rank, reverse=True):
        if not parse.is_classifier(run):
            return run
    raise UserError(f"no run with a checkpoint in {folder}/\n       train one first: {config.program('train')}")


def _has_checkpoints(run: Path) -> bool:
    """A note if they are elsewhere and cannot be seen now."""
    try:
        return bool(checkpoint_steps(run))
    except UserError as e:
        if (run / "checkpoints" / places.POINTER).exists():
            print(f"note: {messages.first_line(e)}", file=sys.stderr)
            return False
        raise
