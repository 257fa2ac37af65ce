"""Runs that differ in their seed alone, as one group; what tells groups apart, and whether one is better.

A group is made from the settings of its own runs. So its mean is the same whatever else is shown.
"""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from nanogpt_jax.comparing.runs import BITS, DATA, EXTENDED, NATS, RECIPE, Run
from nanogpt_jax.evaluation import statistics
from nanogpt_jax.evaluation.compare import CLEAR
from nanogpt_jax.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Group:
    number: int  # by rank, from 1
    runs: tuple[Run, ...]  # by seed

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == "finished"]

    def by_seed(self, unit: str) -> dict[int, float]:
        """Seed -> final validation loss."""
        return self._over_seeds(lambda run: run.final(unit))

    def final(self, unit: str) -> Estimate | None:
        """The mean final loss over seeds and its standard error; None if no run is finished."""
        return _mean(self.by_seed(unit).values())

    def best(self, unit: str) -> Estimate | None:
        """The same of each run's best evaluation, which is flattered by the choice."""
        return _mean(
            self._over_seeds(
                lambda run: (
                    min((loss for _, loss in run.validation[unit]), default=None) if run in self.finished else None
                )
            ).values()
        )

    def _over_seeds(self, value: Callable[[Run], float | None]) -> dict[int, float]:
        """Runs of one seed count once, by their mean: they are no independent values."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            if (its := value(run)) is not None:
                found.setdefault(run.seed, []).append(its)
        return {seed: math.fsum(values) / len(values) for seed, values in found.items()}

    @property
    def speed(self) -> Estimate | None:
        """Tokens a second, of all runs that logged them."""
        return _mean([run.speed for run in self.runs if run.speed])

    @property
    def seconds(self) -> Estimate | None:
        """Of training, until the last step."""
        return _mean([s for run in self.finished if (s := run.seconds(run.step)) is not None])


@dataclass(frozen=True)
class Difference:
    """One setting that differs: its values, and who has which."""

    key: str
    is_of_groups: bool  # one value a group; else a value differs within a group
    values: dict[str, list[int] | list[str]]  # value -> numbers of groups, or names of runs


@dataclass(frozen=True)
class Verdict:
    """The best group of one validation text against the second."""

    best: Group
    second: Group
    gap: Estimate  # the second's mean final loss less the best's
    pairs: int  # seeds that both have, by which the gap is paired; 0: it is not
    of: int  # groups that were compared

    @property
    def is_clear(self) -> bool:
        return self.gap.errors >= CLEAR


@dataclass(frozen=True)
class Comparison:
    groups: list[Group]  # of one validation text beside each other, the best first; those without a finished run last
    unit: str  # NATS, or BITS if tokenizers differ
    differences: list[Difference]
    verdicts: list[Verdict]
    texts: int  # different validation texts among groups with a loss


def compare(runs: list[Run]) -> Comparison:
    """At least one run, in any order: the result does not depend on it."""
    members: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.name)):
        members.setdefault(run.recipe, []).append(run)
    unit = BITS if len({run.tokenizer for run in runs if run.validation[NATS]}) > 1 else NATS

    def rank(group: Group) -> tuple[Any, ...]:
        final = group.final(unit)
        return final is None, group.runs[0].text, final.value if final else 0.0, group.runs[0].recipe

    ranked = sorted((Group(0, tuple(of)) for of in members.values()), key=rank)
    groups = [Group(number, group.runs) for number, group in enumerate(ranked, 1)]
    of_text: dict[str, list[Group]] = {}
    for group in groups:
        if group.final(unit):
            of_text.setdefault(group.runs[0].text, []).append(group)
    verdicts = [_verdict(of, unit) for of in of_text.values() if len(of) > 1]
    return Comparison(groups, unit, _differences(groups), verdicts, len(of_text))


def typed(value: Any) -> str:
    """A setting's value as one types it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def labels(found: Comparison) -> dict[int, str]:
    """Group -> what tells it apart: "learning_rate=0.01 name=adamw". "" if nothing does."""
    wanted = [one for one in found.differences if one.is_of_groups and one.key in {*RECIPE, DATA, EXTENDED}]
    names = [one.key.split(".")[-1] for one in wanted]
    words: dict[int, list[str]] = {group.number: [] for group in found.groups}
    for one, name in zip(wanted, names, strict=True):
        for value, numbers in one.values.items():
            for number in numbers:
                words[int(number)].append(f"{name if names.count(name) == 1 else one.key}={value}")
    return {number: " ".join(each) for number, each in words.items()}


def _mean(values: Collection[float]) -> Estimate | None:
    return statistics.mean(list(values)) if values else None


def _differences(groups: list[Group]) -> list[Difference]:
    found = []
    every = [(group, run) for group in groups for run in group.runs]
    for key in groups[0].runs[0].settings:
        values: dict[str, list[tuple[Group, Run]]] = {}
        for group, run in every:
            values.setdefault(typed(run.settings[key]), []).append((group, run))
        if len(values) == 1 or (key == DATA and _is_explained(every)):
            continue
        numbers = {value: sorted({group.number for group, _ in have}) for value, have in values.items()}
        is_of_groups = sum(map(len, numbers.values())) == len(groups)
        found.append(
            Difference(key, True, dict(numbers))
            if is_of_groups
            else Difference(key, False, {value: [run.name for _, run in have] for value, have in values.items()})
        )
    return found


def _is_explained(every: list[tuple[Group, Run]]) -> bool:
    """Whether the settings of the data differ too wherever its fingerprint does."""
    prints: dict[str, set[str]] = {}
    for _, run in every:
        spelt = json.dumps({key: value for key, value in run.settings.items() if key in RECIPE and key[:5] == "data."})
        prints.setdefault(spelt, set()).add(run.settings[DATA])
    return all(len(each) == 1 for each in prints.values())


def _verdict(groups: list[Group], unit: str) -> Verdict:
    best, second = groups[:2]
    a, b = best.by_seed(unit), second.by_seed(unit)
    common = sorted(a.keys() & b.keys())
    if len(common) > 1:
        return Verdict(best, second, statistics.mean([b[seed] - a[seed] for seed in common]), len(common), len(groups))
    means = statistics.mean(list(a.values())), statistics.mean(list(b.values()))
    errors = [mean.error for mean in means]
    error = None if None in errors else math.hypot(*(e for e in errors if e is not None))
    return Verdict(best, second, Estimate(means[1].value - means[0].value, error), 0, len(groups))
