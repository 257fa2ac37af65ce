"""Members that share a program, trained at once if that is faster, else in turn.

Each member is a run of its own, with the loop, the lock and the checkpoints of `train.py`; `loop.driven` leaves the
calls to us, and a call of the vmapped step takes those of all.
"""

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import jax

from nanogpt_jax.distributed.mesh import make_mesh, room, start
from nanogpt_jax.host import messages
from nanogpt_jax.host.progress import Part, Progress
from nanogpt_jax.host.signals import StopRequest
from nanogpt_jax.model import memory
from nanogpt_jax.run.places import checkpoint_steps
from nanogpt_jax.sweeping import faster, in_turn
from nanogpt_jax.sweeping.faster import ONE, Verdict
from nanogpt_jax.sweeping.in_turn import Ready, Steps
from nanogpt_jax.sweeping.members import Member
from nanogpt_jax.sweeping.record import Record
from nanogpt_jax.sweeping.vmapped import Together, devices, make_vmapped
from nanogpt_jax.training import loop
from nanogpt_jax.training.dials import program_of
from nanogpt_jax.training.loop import Diverged, Driven, Outcome

MOST = 32  # members at once


def train_members(
    members: Sequence[Ready],
    stop: StopRequest,
    on_start: Callable[[list[Member]], Part],
    steps: Steps,
    record: Record,
    asked: str,
) -> Iterator[tuple[Member, Outcome | Diverged]]:
    """Train the members -> each as it ends, and how: together if they can be and that is faster, else in turn.

    `asked`: auto, on, or off.
    """
    for group in [list(members)] if asked == "off" else _groups(members):
        size = 1 if asked == "off" else _size(group, steps)
        if size > 1 and not (asked == "on" or _is_faster(group, size, stop, steps, record)):
            size = 1
        for some in [group] if size == 1 else [group[i : i + size] for i in range(0, len(group), size)]:
            if size == 1 or len(some) % len(devices(len(some))) or len(some) == 1:
                yield from in_turn.train_members(some, stop, on_start, steps)
            elif not stop.received:
                record.together |= {one.member.name: len(some) for one in some}
                record.write()
                part = on_start([one.member for one in some])
                yield from _train(some, stop, steps, part)


def _groups(members: Sequence[Ready]) -> list[list[Ready]]:
    """Those that can be trained together: they share a program, stand at the same step and stop at the same ones."""
    found: dict[Any, list[Ready]] = {}
    for one in members:
        t, at = one.cfg.train, _at(one)
        rest = one.member.name if at >= t.steps or t.wandb else ""  # nothing to do; or W&B, which has one run at a time
        key = (program_of(one.cfg), t.steps, t.eval_every, t.save_every, t.steps_per_dispatch, t.recompile, at, rest)
        found.setdefault(key, []).append(one)
    return list(found.values())


def _at(one: Ready) -> int:
    """The step that a member stands at."""
    return max(checkpoint_steps(one.member.command.run_dir), default=0)


def _size(group: Sequence[Ready], steps: Steps) -> int:
    """How many are trained at once, if they are: what memory holds, in parts of about the same size."""
    if len(group) == 1:
        return 1
    platform, D = start(), len(devices(len(group)))
    cfg, _, step = in_turn.placed(group[0], steps, ONE)
    each = room(make_mesh(replace(ONE, data=D))) // memory.needed(cfg, step.how, platform)
    most = D * min(int(each), max(MOST // D, 1))
    if most < 2:
        return 1
    size = math.ceil(len(group) / math.ceil(len(group) / most))
    return max(size - size % D, D)


def _is_faster(group: Sequence[Ready], size: int, stop: StopRequest, steps: Steps, record: Record) -> bool:
    """Whether members are faster together, by the record or, if the work is long enough, by a trial, which is said."""
    one = group[0]
    told = repr((program_of(one.cfg), one.cfg.train.recompile, [device.device_kind for device in jax.devices()]))
    key = hashlib.sha256(told.encode()).hexdigest()[:8]
    if key not in record.measured:
        left = (one.cfg.train.steps - _at(one)) * len(group)
        try:
            found = faster.measure(one, size, stop, steps, left)
        except (RuntimeError, MemoryError) as e:  # of XLA, or JAX's for what it cannot vmap
            print(f"together does not run here, so in turn: {messages.first_line(e)}", file=sys.stderr)
            return False
        if not found:
            return False
        print(found, file=sys.stderr, flush=True)
        record.measured[key] = asdict(found)
        record.write()
    return Verdict(**record.measured[key]).is_together


def _train(
    group: Sequence[Ready], stop: StopRequest, steps: Steps, part: Part
) -> Iterator[tuple[Member, Outcome | Diverged]]:
    """Train members that stand at the same step, call by call -> each as it ends. A signal stops all after the same."""
    total, at, seen = group[0].cfg.train.steps, _at(group[0]), StopRequest()
    with (
        Progress("step", total, at, patience=0, now="compiling the step", part=part) as bar,
        contextlib.ExitStack() as opened,
    ):
        loops = [opened.enter_context(contextlib.closing(_loop(one, seen, steps, bar))) for one in group]
        answers: dict[int, Any] = dict.fromkeys(range(len(group)))
        program: Together | None = None
        while answers:
            seen.received, calls = stop.received, {}
            for i, answer in answers.items():
                try:
                    calls[i] = loops[i].send(answer)
                except StopIteration as end:
                    yield group[i].member, end.value
                except Diverged as e:
                    yield group[i].member, e
            if calls and not program:
                cfg, task, home = in_turn.placed(group[0], steps, ONE)
                program = Together(make_vmapped(cfg, task, home, len(group), steps), home, list(calls.values()), stop)
                answers = dict.fromkeys(calls, program)
            else:
                answers = program(calls) if program and calls else {}


def _loop(one: Ready, stop: StopRequest, steps: Steps, bar: Progress) -> Driven:
    with in_turn.opened(one, steps, ONE) as (cfg, task, state, step, run):
        return (yield from loop.driven(cfg, task, state, step, run, stop, _Named(bar, one.member.name)))


class _Named(Progress):
    """A member's share in the one bar of its group."""

    def __init__(self, bar: Progress, name: str):
        self._of_all, self._name = bar, name

    def begin(self, phase: str = "", now: str = "") -> None:
        self._of_all.begin(phase, now)

    def update(self, done: float, now: str = "", measured: float | None = None) -> None:
        self._of_all.update(done, f"{self._name}: {now}" if now else "", measured)

    def say(self, text: str) -> None:
        self._of_all.say(f"{self._name}: {text}")

    def note(self, text: str) -> None:
        self._of_all.note(f"{self._name}: {text}")
