"""RUN/origin.json: where a run's settings came from, what computed it, and whether it was extended. For people."""

import contextlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from nanogpt_jax import config
from nanogpt_jax.config import Command, Config
from nanogpt_jax.host import files

NAME = "origin.json"


def read(run_dir: Path) -> dict[str, Any]:
    """What origin.json says; {} if there is none, as in older runs, or if it is damaged."""
    try:
        found = json.loads(files.read(run_dir / NAME))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def of_extended(run_dir: Path, cfg: Config, step: int) -> dict[str, Any]:
    """origin.json of a run that goes on from `step`. Other steps in all change the schedule, so they are recorded."""
    origin, before = read(run_dir), config.read_json(run_dir / "config.json", type(cfg)).train.steps
    this = {"at_step": step, "from_steps": before}
    if before != cfg.train.steps and this not in origin.get("extended", []):  # a killed start may have written it
        origin["extended"] = [*origin.get("extended", []), this]
    return origin


def of_new(command: Command) -> dict[str, Any]:
    """Where settings came from that are not defaults, and what computes the run: for people, read by `report`."""
    return {
        "settings": {key: where for key, where in command.origin.items() if where != "default"},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute a run."""
    versions = {"python": platform.python_version()}
    for package in ("nanogpt-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a clone that was never installed
            versions[package] = importlib.metadata.version(package)
    return versions
