"""A sweep from its first member to its last: the rounds, what is missing of each, and the time that is left."""

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nanogpt_jax.data.dataset import Dataset
from nanogpt_jax.host.progress import Part, duration
from nanogpt_jax.host.signals import StopRequest
from nanogpt_jax.model import sizes
from nanogpt_jax.sweeping import halve, in_turn, ranges, results, together
from nanogpt_jax.sweeping.members import Member, Sweep
from nanogpt_jax.sweeping.record import Record
from nanogpt_jax.sweeping.results import CONFIRM, SWEEP, Figure, Row, Stage
from nanogpt_jax.training.loop import Diverged, Outcome


@dataclass
class Study:
    """A sweep under way."""

    sweep: Sweep
    record: Record
    stop: StopRequest
    on_change: Callable[[list[Stage]], None]  # called with all tables so far, whenever a member has ended
    stages: list[Stage] = field(default_factory=list)
    total: int = 0  # members in all
    done: int = 0
    interrupted: signal.Signals | None = None
    saved: list[str] = field(default_factory=list)  # of the members that a signal has stopped
    _known: dict[str, float | None] = field(default_factory=dict)  # member -> its figure, None if it diverged
    _opened: dict[str, Dataset] = field(default_factory=dict)  # data, by its settings
    _steps: in_turn.Steps = field(default_factory=dict)
    _work: float = 0.0  # of the members that are missing, in FLOPs,
    _spent: float = 0.0  # and of those that were trained here,
    _seconds: float = 0.0  # in so many seconds

    @property
    def figure(self) -> Figure:
        return results.figure_of(self.sweep.keys)

    def conduct(self) -> list[Stage]:
        """Train what is missing, in all stages -> their tables. After a signal, those that there are."""
        sweep = self.sweep
        self._plan()
        configurations = list(sweep.configurations)
        while configurations and not self.interrupted:
            share = halve.share(len(configurations)) if sweep.halve else 1
            name = f"round {len(self.stages) + 1}" if sweep.halve else SWEEP
            rows = self._stage(name, configurations, list(sweep.seeds), share)
            if share == 1:
                break
            configurations = [dict(row.values) for row in rows[: math.ceil(len(rows) / 2)] if row.finite]
        best_two = [dict(row.values) for row in self.stages[-1].rows if row.finite][:2]
        if sweep.confirm and not self.interrupted and len(best_two) == 2:
            self._stage(CONFIRM, best_two, sweep.fresh_seeds(), 1)
        return self.stages

    def standing(self) -> str:
        return f"{self.done} of {self.total} members are done"

    def _plan(self) -> None:
        """Check every member that can be known now, before the first is trained, and count them all."""
        sweep, n = self.sweep, len(self.sweep.configurations)
        numbers = halve.rounds(n) if sweep.halve else [n]
        shares = [halve.share(n) if sweep.halve else 1 for n in numbers]
        full = sweep.members(sweep.configurations, sweep.seeds)
        first = sweep.members(sweep.configurations, sweep.seeds, shares[0]) if shares[0] > 1 else full
        if missing := self._missing(first):
            in_turn.ready(full if first is not full else missing, self._opened)
            in_turn.check_data([one for one in first if one.name in self._known], self._opened)
        self.record.write()
        fresh = min(2, n) * sweep.confirm
        self.total = sum(numbers) * len(sweep.seeds) + fresh
        mean = sum(map(_flops, full)) / len(full)  # of one that is not known yet
        later = sum(n / share for n, share in zip(numbers[1:], shares[1:], strict=True))
        self._work = sum(map(_flops, first)) + mean * (later * len(sweep.seeds) + fresh)

    def _stage(self, name: str, configurations: Sequence[dict], seeds: list[int], share: int) -> list[Row]:
        """Train what is missing of a stage -> its table, which is the last of `stages` from now on."""
        members = self.sweep.members(configurations, seeds, share)
        missing = self._missing(members)
        there = [one for one in members if one.name in self._known]
        self.done += len(there)
        self._work -= sum(map(_flops, there))
        self.stages.append(self._table(name, members, seeds, share))
        ready, how = in_turn.ready(missing, self._opened), self.sweep.together
        for one, ended in together.train_members(ready, self.stop, self._begin, self._steps, self.record, how):
            self._end(one, ended)
            self.stages[-1] = self._table(name, members, seeds, share)
            self.on_change(self.stages)
        self.interrupted = self.stop.received if self._missing(members) else None
        return self.stages[-1].rows

    def _missing(self, members: Sequence[Member]) -> list[Member]:
        return [one for one in members if not self._look(one)]

    def _look(self, one: Member) -> bool:
        """Whether a member has ended, by its directory and the record; each is read until it has."""
        if one.name not in self._known:
            value = results.of_member(one, self.figure)
            if value is not None or one.name in self.record.diverged:
                self._known[one.name] = value
        return one.name in self._known

    def _table(self, name: str, members: Sequence[Member], seeds: list[int], share: int) -> Stage:
        rows = results.table(members, self._known)
        stage = Stage(name, share, seeds, rows)
        before = [one for one in self.stages if one.name != name][-1:]
        if not before or not name.startswith("round"):
            return stage
        known = {ranges.label(row.values): row.mean for row in before[0].rows}
        pairs = [(known[ranges.label(row.values)], row.mean) for row in rows]
        pairs = [(a.value, b.value) for a, b in pairs if a and b]
        found = halve.correlation([a for a, _ in pairs], [b for _, b in pairs])
        return Stage(name, share, seeds, rows, found, len(pairs))

    def _begin(self, members: list[Member]) -> Part:
        left = f", about {duration(self._work / self._spent * self._seconds)} left for all" if self._spent else ""
        last = self.done + len(members)
        which = f"member {last}" if len(members) == 1 else f"members {self.done + 1} to {last}"
        which += f" of {self.total}"
        names = " ".join(one.name for one in members)
        print(f"{which}: {names}{left}", file=sys.stderr, flush=True)
        self._clock = time.monotonic()
        its = sum(map(_flops, members))
        return Part(which, max(0.0, self._work / its - 1))

    def _end(self, one: Member, ended: Outcome | Diverged) -> None:
        if isinstance(ended, Diverged):
            told = str(ended).partition(";")[0]
            self.record.diverged[one.name] = told
            self.record.write()
            self._look(one)
        elif ended.signal:
            steps = one.command.cfg.train.steps
            self.saved.append(f"{ended.signal.name}: saved step {ended.step} of {steps} in {one.command.run_dir}")
            return
        else:
            assert self._look(one), f"{one.name} was trained and has no result"
            told = f"{self._known[one.name]:.4f} {self.figure.unit}"
            self._spent += _flops(one)
            now = time.monotonic()
            self._seconds, self._clock = self._seconds + now - self._clock, now  # those trained together share it
        self.done += 1
        self._work -= _flops(one)
        print(f"{one.name}: {told}", file=sys.stderr, flush=True)


def _flops(one: Member) -> float:
    """What a member costs, by which the time left is estimated."""
    return sizes.product_flops(one.command.cfg) * one.command.cfg.train.steps
