"""A run, as its directory tells it, and which of its steps are known. No jax here."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_jax import config
from nanogpt_jax.config import Config, UserError
from nanogpt_jax.data import tokenizer
from nanogpt_jax.data.dataset import Dataset
from nanogpt_jax.data.tokenizer import Tokenizer
from nanogpt_jax.evaluation import texts
from nanogpt_jax.run import origin
from nanogpt_jax.run.metrics import DIVERGED, SKIPPED, read_metrics
from nanogpt_jax.run.opened import existing
from nanogpt_jax.run.places import checkpoint_steps
from nanogpt_jax.run.run_dir import IMPORTED

LOGGED = {"loss": "train/loss", "grad_norm": "grad_norm"}  # what of a step is compared, and its name in metrics.jsonl


@dataclass(frozen=True)
class Past:
    """A run that was trained. Step N is the N-th update, as in metrics.jsonl: N - 1 steps lead to the state before."""

    path: Path
    cfg: Config
    tokenizer: Tokenizer
    checkpoints: list[int]
    recorded: dict[int, dict[str, float]]  # step -> its loss and gradient norm, as they were logged; nan: not finite
    reached: int  # the last step that is known to have been taken
    broke: int | None  # the step that ended the run, if one did
    skipped: int  # so many skipped steps in a row ended it, the last of them `broke`; 0: not these
    extended: list[dict[str, int]]  # of origin.json: until at_step, the run was to have from_steps


def read(path: Path) -> Past:
    """UserError if it is no run, or one whose steps cannot be taken again."""
    cfg = config.read_json(existing(path) / "config.json")
    if (path / IMPORTED).exists():
        raise UserError(f"{path} holds an imported model: it took no steps here that could be taken again")
    found = tokenizer.load(path / "tokenizer")
    hint = f"if {path / 'config.json'} was changed, bring the old one back"
    tokenizer.check_fit(found, cfg.model.vocab_size, f"{path} is damaged: its tokenizer", hint)
    rows = [
        row
        for row in read_metrics(path / "metrics.jsonl")
        if type(row["step"]) is int and 0 <= row["step"] <= cfg.train.steps  # else the line is damaged
    ]
    last = max((row for row in rows if row.get(DIVERGED)), key=lambda row: row["step"], default={})
    broke, skipped = last.get("step"), last.get(SKIPPED)
    if type(skipped) is not int or not 0 < skipped <= (broke or 0):
        skipped = 0
    recorded: dict[int, dict[str, float]] = {}
    for row in rows:
        known = {ours: row[its] for ours, its in LOGGED.items() if isinstance(row.get(its, ""), float | None)}
        if known:
            recorded[row["step"]] = {name: math.nan if value is None else value for name, value in known.items()}
    steps = checkpoint_steps(path)
    reached = max([0, *steps, *(row["step"] for row in rows)])
    return Past(path, cfg, found, steps, recorded, reached, broke, skipped, _extended(path))


def _extended(path: Path) -> list[dict[str, int]]:
    """What origin.json says of it, if it is not damaged."""
    found = origin.read(path).get("extended", [])
    is_known = isinstance(found, list) and all(
        isinstance(one, dict) and all(type(one.get(key)) is int for key in ("at_step", "from_steps")) for one in found
    )
    return found if is_known else []


def choose(past: Past, asked: int | None) -> int:
    """The step to replay: `asked`, or the one that ended the run, or the last. UserError if the run never took it.

    If skipped steps ended the run, it is the first of them: all had the same weights, so the others say no more.
    """
    if not past.reached and asked is None:
        raise UserError(f"{past.path} has taken no step yet")
    first = past.broke and past.broke - max(0, past.skipped - 1)
    step = asked or first or past.reached
    steps, last = past.cfg.train.steps, past.broke or past.reached + past.cfg.train.log_every
    if asked is not None and asked > steps:
        raise UserError(f"--step={asked} is beyond the end of {past.path}, which has {steps} steps")
    if step > last:
        how = "broke at" if past.broke else "has got to"
        raise UserError(f"--step={asked}: {past.path} {how} step {past.broke or past.reached}, and took no later one")
    return step


def data_of(past: Past) -> Dataset:
    """The data that the run was trained on; UserError if it is gone or has changed."""
    data = texts.own_data(past.cfg.data, past.path, "without that text, no batch of the run can be made again")
    if data.tokenizer.fingerprint != past.tokenizer.fingerprint:
        raise UserError(
            f"{past.path / 'tokenizer'} is not the tokenizer by which the run's text became tokens\n"
            f"       bring the old one back: {past.cfg.data.title} with data.tokenizer={past.cfg.data.tokenizer}"
        )
    return data


def schedules(past: Past, first: int, last: int) -> list[tuple[int, int, int]]:
    """(from, to, steps in all) of the stretches from `first` to `last`: a run that was extended had another schedule
    before."""
    found: list[tuple[int, int, int]] = []
    ends: list[Any] = [(one["at_step"], one["from_steps"]) for one in past.extended]
    for end, steps in [*ends, (last, past.cfg.train.steps)]:
        if first < min(end, last):
            found.append((first, min(end, last), steps))
            first = min(end, last)
    return found
