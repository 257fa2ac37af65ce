"""What a sweep has found: for each configuration its losses by seed, their mean and standard error; and who is best.

Figures are read from the run directories alone, so a sweep that was killed and went on gives the same table. A run's
figure is that of its last step, not its lowest: the lowest of many evaluations would be flattered.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_jax import config
from nanogpt_jax.config import Config, UserError
from nanogpt_jax.config.settings import differences, types_of
from nanogpt_jax.evaluation import statistics
from nanogpt_jax.evaluation.compare import CLEAR
from nanogpt_jax.evaluation.statistics import Estimate
from nanogpt_jax.run.metrics import read_metrics
from nanogpt_jax.run.places import checkpoint_steps
from nanogpt_jax.sweeping import ranges
from nanogpt_jax.sweeping.members import Member
from nanogpt_jax.sweeping.ranges import Range

DIVERGED = "diverged"
SWEEP, CONFIRM = "sweep", "confirm"  # stages; those of --halve are rounds
# Settings by which the validation text or its tokens change. Of other tokens, only bits a byte can be compared.
TOKENS, TEXTS = "data.tokenizer", ("data.source", "data.mixture", "data.val_fraction", "data.field")


@dataclass(frozen=True)
class Figure:
    """What configurations are compared by; less of it is better."""

    key: str  # in metrics.jsonl
    unit: str


def figure_of(keys: Sequence[str]) -> Figure:
    """For a sweep over these settings."""
    return Figure("val/bits_per_byte", "bits a byte") if TOKENS in keys else Figure("val/loss", "nats a token")


@dataclass(frozen=True)
class Row:
    """A configuration, and what its members reached."""

    values: Mapping[str, Any]
    by_seed: Mapping[int, float | None]  # seed -> figure, None if it diverged; without those that are missing

    @property
    def finite(self) -> dict[int, float]:
        return {seed: value for seed, value in self.by_seed.items() if value is not None}

    @property
    def n_diverged(self) -> int:
        return len(self.by_seed) - len(self.finite)

    @property
    def mean(self) -> Estimate | None:
        """Of the members that did not diverge; None if there are none."""
        return statistics.mean(list(self.finite.values())) if self.finite else None

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts the best first. One that diverges more often is worse, whatever its other members reached."""
        share = self.n_diverged / len(self.by_seed) if self.by_seed else math.inf
        return share, self.mean.value if self.mean else math.inf


def table(members: Sequence[Member], known: Mapping[str, float | None]) -> list[Row]:
    """A row for each configuration, the best first; equal ones in the order of the grid.

    `known`: member -> its figure, None if it diverged.
    """
    rows: dict[str, Row] = {}
    for one in members:
        label = ranges.label(one.values)
        before = rows.get(label, Row(one.values, {}))
        rows[label] = Row(one.values, {**before.by_seed, **({one.seed: known[one.name]} if one.name in known else {})})
    return sorted(rows.values(), key=lambda row: row.rank)


def of_member(one: Member, figure: Figure) -> float | None:
    """Its figure at its last step; None if it has not come so far. A run that was trained further later has it too.

    UserError if the run in its directory is another one, or has lost its metrics.
    """
    directory, steps = one.command.run_dir, one.command.cfg.train.steps
    if max(checkpoint_steps(directory), default=0) < steps:
        return None
    again = "or take that directory away: the same command then trains the member again"
    known = Config.EXECUTION | {"model.vocab_size", "model.end_of_text", "data.source", "data.mixture", TOKENS}
    changed = differences(config.read_json(directory / "config.json"), one.command.cfg, frozenset(types_of()) - known)
    if changed:
        lines = "".join(f"\n       {key}: {old} there, {new} asked for" for key, old, new in changed)
        raise UserError(f"{directory} is another run than this sweep's{lines}\n       bring the old one back, {again}")
    found = [row[figure.key] for row in _rows(directory) if _has(row, steps, figure.key)]
    if not found:
        raise UserError(
            f"{directory} has checkpoint {steps}, and its metrics.jsonl no {figure.key} of that step: it is damaged\n"
            f"       bring the old one back, {again}"
        )
    return float(found[-1])


def _rows(directory: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(directory / "metrics.jsonl")
    except OSError as e:
        raise UserError(f"cannot read {directory / 'metrics.jsonl'}: {e.strerror or e}") from None


def _has(row: Mapping[str, Any], step: int, key: str) -> bool:
    return row["step"] == step and isinstance(row.get(key), int | float)


@dataclass(frozen=True)
class Stage:
    """One table of a sweep."""

    name: str  # SWEEP, "round 1" and so on, CONFIRM
    share: int  # its members trained for 1/share of the steps
    seeds: list[int]
    rows: list[Row]  # the best first
    correlation: float | None = None  # of the ranks with the round before
    n_correlated: int = 0  # configurations in both


@dataclass(frozen=True)
class Verdict:
    """The best configuration against the second, on the seeds that both have."""

    best: Row
    second: Row | None
    ahead: Estimate | None  # by how much the best is lower, paired by seed; None without a pair
    pairs: int

    @property
    def is_clear(self) -> bool:
        return self.ahead is not None and self.ahead.value > 0 and self.ahead.errors >= CLEAR


def verdict(rows: Sequence[Row]) -> Verdict | None:
    """Of rows, the best first; None if nothing was reached."""
    reached = [row for row in rows if row.finite]
    if not reached:
        return None
    best, second = reached[0], reached[1] if len(reached) > 1 else None
    common = [seed for seed in best.finite if second and seed in second.finite]
    if not second or not common:
        return Verdict(best, second, None, 0)
    ahead = statistics.mean([second.finite[seed] - best.finite[seed] for seed in common])
    return Verdict(best, second, ahead, len(common))


def words(found: Verdict | None, figure: Figure, more: str = "--seeds") -> str:
    """Who is best, and whether that is more than chance. `more`: the flag that gives more seeds."""
    if found is None:
        return "no member has reached its last step"
    best = ranges.label(found.best.values)
    if found.second is None:
        return f"best: {best}: {_estimate(found.best.mean)} {figure.unit}; there is no other to compare it with"
    second, pairs = ranges.label(found.second.values), f"{found.pairs} pair{'s' if found.pairs != 1 else ''}"
    if found.best.rank[0] < found.second.rank[0]:
        return f"best: {best}, since {found.second.n_diverged} of {len(found.second.by_seed)} of {second} diverged"
    if found.ahead is None:
        return f"no clear winner: {best} is ahead of {second}, and no seed is common to both"
    if found.ahead.error is None:
        by = f"by {found.ahead.value:.4f} {figure.unit} with one seed"
        return f"no clear winner: {best} is ahead of {second} {by}, which says nothing of chance; give {more} 3"
    by = f"by {found.ahead.value:.4f} ± {found.ahead.error:.4f} {figure.unit}, paired by seed ({pairs})"
    if found.is_clear:
        return f"best: {best} is better than {second} {by}: {found.ahead.errors:.1f} standard errors"
    errors = f"{found.ahead.errors:.1f} standard errors; below {CLEAR:.0f} that may be chance"
    return f"no clear winner: {best} is ahead of {second} {by}: {errors}"


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return DIVERGED
    return f"{found.value:.4f}" + ("" if found.error is None else f" ± {found.error:.4f}")


def warnings(asked: Sequence[Range], best: Row | None, rows: Sequence[Row]) -> list[str]:
    """What is to be known before the best is believed."""
    lines = []
    tried, reached = ({ranges.label(row.values) for row in of} for of in (rows, [row for row in rows if row.finite]))
    is_alone = len(reached) == 1 < len(tried)  # the edge of a range says nothing then
    if best and is_alone:
        shown = ranges.label(best.values)
        lines.append(f"{shown} is the best for want of others, as all of them diverged: try more values around it")
    for one in asked if best and not is_alone else ():
        numbers = [value for value in one.values if type(value) in (int, float)]
        value = best.values[one.key] if best else None
        if len(numbers) < 2 or value not in (min(numbers), max(numbers)) or value == min(numbers) == 0:
            continue  # nothing lies below 0 for a setting that may be 0
        beyond = "lower" if value == min(numbers) else "higher"
        shown = f"{one.key}={ranges.shown(value)}"
        lines.append(f"the best {shown} lies on the edge of its range: {beyond} values may be better")
    if n := sum(row.n_diverged for row in rows):
        lines.append(
            f"{n} member{'s' if n > 1 else ''} diverged; their configurations come behind those with fewer such"
        )
    if texts := [one.key for one in asked if one.key in TEXTS]:
        lines.append(f"{' and '.join(texts)} changes the validation text: such losses are not of the same thing")
    return lines


# ---- shown ----------------------------------------------------------------------------------------------------------


def cells(rows: Sequence[Row], keys: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Heads and texts of a table of rows: settings, mean, standard error, n, and the value of each seed."""
    names = ranges.short_names(keys)
    heads = [*names.values(), "mean", "± s.e.", "n", *(f"seed {seed}" for seed in seeds)]
    lines = []
    for row in rows:
        mean, error = row.mean, row.mean.error if row.mean else None
        figures = ["" if mean is None else f"{mean.value:.4f}", "" if error is None else f"{error:.4f}"]
        lines.append(
            [*(ranges.shown(row.values[key]) for key in keys), *figures, str(len(row.finite)), *_values(row, seeds)]
        )
    return heads, lines


def _values(row: Row, seeds: Sequence[int]) -> list[str]:
    found = [row.by_seed.get(seed, math.nan) for seed in seeds]
    return [DIVERGED if x is None else "" if math.isnan(x) else f"{x:.4f}" for x in found]


def text(rows: Sequence[Row], keys: Sequence[str], seeds: Sequence[int]) -> str:
    """The table for a terminal."""
    heads, lines = cells(rows, keys, seeds)
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    aligned = [
        "  ".join(
            x.ljust(w) if i < len(keys) else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [heads, *lines]
    ]
    return "\n".join(line.rstrip() for line in aligned)


def as_csv(stages: Sequence[Stage], keys: Sequence[str]) -> str:
    """Every figure with all its digits: a line for each configuration in each stage."""
    seeds = sorted({seed for stage in stages for seed in stage.seeds})
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    heads = ["stage", "share_of_steps", *keys, "mean", "standard_error", "n", DIVERGED]
    write([*heads, *(f"seed_{seed}" for seed in seeds)])
    for stage in stages:
        for row in stage.rows:
            mean = row.mean
            figures = [mean.value if mean else "", "" if mean is None or mean.error is None else mean.error]
            single = [row.by_seed.get(seed, "") for seed in seeds]
            shown = [DIVERGED if value is None else value for value in single]
            told = [ranges.shown(row.values[key]) for key in keys]
            write([stage.name, 1 / stage.share, *told, *figures, len(row.finite), row.n_diverged, *shown])
    return out.getvalue()
