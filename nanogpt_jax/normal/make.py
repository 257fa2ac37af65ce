"""Makes a reference of finished runs: `nanogpt-jax normal --make CONFIG RUN RUN ...`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax import config
from nanogpt_jax.config import Config, UserError, settings
from nanogpt_jax.host import files
from nanogpt_jax.normal import judge, reference
from nanogpt_jax.normal.reference import LEARNT, LEAST, Reference, Series
from nanogpt_jax.run import origin
from nanogpt_jax.run.metrics import read_metrics
from nanogpt_jax.run.opened import existing


@dataclass(frozen=True)
class Logged:
    """A run, as its files tell it."""

    path: Path
    cfg: Config
    rows: list[dict[str, Any]]
    data: dict[str, Any]  # reference.facts
    extended: bool


def read(path: Path) -> Logged:
    """UserError if it is not a language model's run."""
    cfg = config.read_json(existing(path) / "config.json")
    try:
        manifest = json.loads(files.read(path / "data.json"))
    except (OSError, ValueError, RecursionError):
        manifest = {}
    extended = bool(origin.read(path).get("extended"))
    return Logged(path, cfg, read_metrics(path / "metrics.jsonl"), reference.facts(manifest), extended)


def make(name: str, runs: Sequence[Logged]) -> Reference:
    """The reference of the config `name`. UserError if a run is of another recipe, not finished, or logs too little."""
    cfg = config.load([] if name == "default" else [name]).cfg
    recipe = {key: value for key, value in settings.items(cfg) if key in LEARNT}
    if len({run.cfg.train.seed for run in runs}) < max(len(runs), LEAST):
        raise UserError(f"a reference needs at least {LEAST} runs, each of another seed, but got {len(runs)}")
    for run in runs:
        own = dict(settings.items(run.cfg))
        for key, value in recipe.items():
            if own[key] != value and not key.startswith("data."):
                raise UserError(f"{run.path} has {key}={own[key]}, and {name} has {value}")
        if not run.data or run.data != runs[0].data or run.extended:
            raise UserError(f"{run.path} was extended, or has other data than {runs[0].path}, or no data.json")
    every = np.arange(1, cfg.train.steps + 1)
    of = {key: [judge.points(run.rows, key, cfg.train.steps) for run in runs] for key in KEYS}
    for run, (steps, _), (evaluated, _) in zip(runs, of["train/loss"], of["val/loss"], strict=True):
        if len(steps) != len(every) or not np.array_equal(evaluated, of["val/loss"][0][0]) or not evaluated.size:
            raise UserError(
                f"{run.path} is not finished, has not logged every step, or evaluates at other steps than "
                f"{runs[0].path}\n       train it with --train.log-every=1 and one --train.eval-every for all"
            )
    values = {key: np.array([value for _, value in of[key]]) for key in KEYS}
    return Reference(
        name=name, settings=recipe, data=runs[0].data, seeds=[run.cfg.train.seed for run in runs],
        versions={key: value for key, value in origin.read(runs[0].path).get("versions", {}).items() if key in SHOWN},
        loss=_series(values["train/loss"]), norm=_series(np.log(values["grad_norm"])),
        evaluated=of["val/loss"][0][0], validation=values["val/loss"],
        rates=_lines(every, values["learning_rate"][0]),
    )  # fmt: skip


KEYS = ("train/loss", "grad_norm", "val/loss", "learning_rate")
SHOWN = ("python", "nanogpt-jax", "jax", "numpy")


def _series(values: np.ndarray) -> Series:
    """Of each step's number in each run, [n, steps]."""
    steps = values.shape[1]
    knots, blocks = (reference.firsts(steps, ratio) for ratio in (reference.KNOT, reference.BLOCK))
    mean = _grouped(values.mean(0, keepdims=True), knots)[0].round(4)
    edges = np.append(knots, steps + 1)
    middle = np.log((edges[:-1] + edges[1:] - 1) / 2)
    off = values - np.interp(np.log(np.arange(1, steps + 1)), middle, mean)
    runs, length = _grouped(off, blocks), np.diff(np.append(blocks, steps + 1))
    inside = _grouped((off - np.repeat(runs, length, 1)) ** 2, blocks).mean(0)
    return Series(mean, np.sqrt(inside * length / np.maximum(length - 1, 1)), runs)


def _grouped(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Means [n, groups] of [n, steps]; `first`: the first step of each group, from 1."""
    length = np.diff(np.append(first, values.shape[1] + 1))
    return np.add.reduceat(values, first - 1, axis=1) / length


def _lines(steps: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """As few of the points (step, rate) as straight lines need to be within 0.1 % of the largest rate -> [_, 2]."""
    kept, room = [0], rates.max() * 1e-3
    for last in range(2, len(steps)):
        first = kept[-1]
        straight = np.interp(steps[first : last + 1], steps[[first, last]], rates[[first, last]])
        if np.abs(straight - rates[first : last + 1]).max() > room:
            kept.append(last - 1)
    return np.stack([steps, rates], 1)[[*kept, len(steps) - 1]]
