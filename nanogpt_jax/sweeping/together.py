"""Members that share a program, trained at once: each call of a vmapped step takes all of them, on one device or split
over several. Whether that is faster than one after the other is measured, and the faster way taken.

Each member is a run of its own, with the loop, the lock and the checkpoints of `train.py`; `loop.driven` leaves the
calls to us. Losses are those of the run made alone to rounding, as XLA sums a vmapped product in another order.
"""

# M members, D devices, K steps in a call, B batch, W int32 numbers of a row

import contextlib
import functools
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanogpt_jax.config import Config, MeshConfig
from nanogpt_jax.distributed.mesh import AXES, make_mesh, room, start
from nanogpt_jax.host import messages
from nanogpt_jax.host.progress import Progress
from nanogpt_jax.host.signals import StopRequest
from nanogpt_jax.model import execution, memory
from nanogpt_jax.run.places import checkpoint_steps
from nanogpt_jax.sweeping import in_turn
from nanogpt_jax.sweeping.in_turn import Ready, Steps
from nanogpt_jax.sweeping.members import Member
from nanogpt_jax.sweeping.record import Record
from nanogpt_jax.training import loop, optim
from nanogpt_jax.training.compiled import CompiledStep
from nanogpt_jax.training.dials import program_of
from nanogpt_jax.training.loop import Diverged, Driven, Outcome
from nanogpt_jax.training.state import TrainState, init_state, layout
from nanogpt_jax.training.step import Metrics, TrainStep, make_train_step
from nanogpt_jax.training.task import Task

MEMBERS = "members"  # axis of the mesh
ONE = MeshConfig()  # the mesh of a member in a group
MOST = 32  # members at once
WORTH = (
    0.95  # in turn is taken if its speed is at least this share of together's: it is exact, and each member ends soon
)
FROM = {True: 500, False: 100}  # least seconds of work for which a trial of about 10 s is made; True: on one CPU
SECOND = (
    1.2  # times as fast: a long run on a CPU with its second program (model/kernels/README.md), without compiling it
)
ROUNDS, CALL = 4, 0.25  # calls of each way that are timed in alternation, and seconds that one takes at least


@dataclass(frozen=True)
class Verdict:
    """Seconds of a step of one member, by the quickest of some calls."""

    members: int
    together: float
    in_turn: float
    second: bool = False  # in turn, the runs are long enough for the second program of training/compiled.py

    @property
    def is_together(self) -> bool:
        return self.together < WORTH * self.in_turn / (SECOND if self.second else 1)

    def __str__(self) -> str:
        more = f" ({SECOND} times as fast from its second program on)" if self.second else ""
        return (
            f"{self.members} members together: {1e3 * self.together:.3g} ms a step of one, in turn "
            f"{1e3 * self.in_turn:.3g}{more}: {'together' if self.is_together else 'in turn'}"
        )


def train_members(
    members: Sequence[Ready],
    stop: StopRequest,
    on_start: Callable[[list[Member]], None],
    steps: Steps,
    record: Record,
    asked: str,
) -> Iterator[tuple[Member, Outcome | Diverged]]:
    """Train the members -> each as it ends, and how: together if they can be and that is faster, else in turn.

    `asked`: auto, on, or off.
    """
    for group in [[one] for one in members] if asked == "off" else _groups(members):
        at_once = _at_once(group, steps) if len(group) > 1 else 1
        if at_once == 1 or not (asked == "on" or _is_faster(group, at_once, stop, steps, record)):
            yield from in_turn.train_members(group, stop, on_start, steps)
            continue
        for i in range(0, len(group), at_once):
            some = group[i : i + at_once]
            if len(some) % len(_devices(len(some))):
                yield from in_turn.train_members(some, stop, on_start, steps)
            elif not stop.received:
                record.together |= {one.member.name: len(some) for one in some}
                record.write()
                on_start([one.member for one in some])
                yield from _train(some, stop, steps)


def _groups(members: Sequence[Ready]) -> list[list[Ready]]:
    """Those that share a program and stand at the same step, in the order of the first of each."""
    found: dict[Any, list[Ready]] = {}
    for one in members:
        t, at = one.cfg.train, max(checkpoint_steps(one.member.command.run_dir), default=0)
        alone = one.member.name if at >= t.steps else ""  # it has nothing to do
        key = program_of(one.cfg), t.steps, t.eval_every, t.save_every, t.steps_per_dispatch, t.recompile, at, alone
        found.setdefault(key, []).append(one)
    return list(found.values())


def _devices(n: int) -> list[jax.Device]:
    """Those that n members are split over."""
    return jax.devices()[:n]


def _at_once(group: Sequence[Ready], steps: Steps) -> int:
    """How many are trained together, as memory holds them: about as many in each part of the group."""
    platform, D = start(), len(_devices(len(group)))
    cfg, _, step = in_turn.placed(group[0], steps, ONE)
    each = room(make_mesh(replace(ONE, data=D))) // memory.needed(cfg, step.how, platform)
    most = D * min(int(each), max(MOST // D, 1))
    if most < 2:
        return 1
    size = math.ceil(len(group) / math.ceil(len(group) / most))
    size = max(size - size % D, D)
    if size < len(group):
        print(f"groups of at most {size} members, of {len(group)}", file=sys.stderr)
    return size


# ---- which way is faster ---------------------------------------------------------------------------------------------


def _is_faster(group: Sequence[Ready], M: int, stop: StopRequest, steps: Steps, record: Record) -> bool:
    """Whether M members of a group are faster together, by the record or, if the work is long enough, by a trial."""
    cfg = group[0].cfg
    told = repr((program_of(cfg), cfg.train.recompile, [str(device) for device in jax.devices()]))
    key = hashlib.sha256(told.encode()).hexdigest()[:8]
    if key not in record.measured:
        try:
            found = measure(group[0], M, stop, steps, _work(group))
        except (RuntimeError, MemoryError) as e:  # XLA's, and JAX's NotImplementedError
            print(f"together does not run here: {messages.first_line(e)}", file=sys.stderr)
            return False
        if not found:
            return False
        print(found, file=sys.stderr, flush=True)
        record.measured[key] = asdict(found)
        record.write()
    return Verdict(**record.measured[key]).is_together


def _work(group: Sequence[Ready]) -> int:
    """Steps that are left, of all members."""
    at = max(checkpoint_steps(group[0].member.command.run_dir), default=0)
    return (group[0].cfg.train.steps - at) * len(group)


def measure(one: Ready, M: int, stop: StopRequest, steps: Steps, work: float = math.inf) -> Verdict | None:
    """The speed of one member alone, and of M like it together, on states that are thrown away.

    None if `work`, in steps, is too short for a trial, or after a signal.
    """
    cfg, task, step = in_turn.placed(one, steps)
    alone = _Tried(step, init_state(step.born, cfg.train.seed), task, stop)
    if stop.received or (single := alone.seconds(1)) * work < FROM[_is_one_cpu()]:
        return None
    cfg, task, step = in_turn.placed(one, steps, ONE)
    state = jax.tree.map(lambda x: np.stack([x] * M), init_state(step.born, cfg.train.seed))
    many = _vmapped(cfg, task, step, M, steps)
    together = _Tried(many, jax.device_put(state, many.layout), task, stop, M)
    n = [min(max(round(CALL / single / some), 1), step.how.steps_per_dispatch) for some in (1, M)]
    times = []
    for _ in range(ROUNDS):
        if stop.received:
            return None
        times.append((together.seconds(n[1]) / M, alone.seconds(n[0])))
    a, b = map(min, zip(*times[1:], strict=True))
    second = _is_one_cpu() and step.how.recompile and b * cfg.train.steps > execution.RECOMPILE_LEFT
    return Verdict(M, a, b, second)


def _is_one_cpu() -> bool:
    return jax.default_backend() == "cpu" and len(jax.devices()) == 1


class _Tried:
    """A compiled step, and states that it may spoil."""

    def __init__(self, step: TrainStep, state: TrainState, task: Task, stop: StopRequest, M: int = 0):
        """`M`: the step is of so many members."""
        K = step.how.steps_per_dispatch
        rows = task.batch(np.arange(K), slice(None))
        self._rows = jax.device_put(np.stack([rows] * M) if M else rows, step.layout)
        self._state, self._dials = state, step.dials(0)
        self._program = CompiledStep(step, state, self._rows, stop=stop)

    def seconds(self, n: int) -> float:
        """Of a step, in a call of n."""
        began = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._program(self._state, self._rows, n, self._dials))
        return (time.perf_counter() - began) / n


# ---- a group ---------------------------------------------------------------------------------------------------------


def _vmapped(cfg: Config, task: Task, step: TrainStep, M: int, steps: Steps) -> TrainStep:
    """The step of M members: states and dials have a leading axis [M], rows are [M, K, B, W], `n` is common to all.

    The axis is split over the devices, and nothing is sent between them. Metrics are a list of each member's.
    """
    key = (MEMBERS, M, step.how, *program_of(cfg))
    if key not in steps:
        mesh = Mesh(np.array(_devices(M)).reshape(-1, 1, 1, 1), (MEMBERS, *AXES), axis_types=(AxisType.Auto,) * 4)
        tx = optim.make_optimizer(cfg.optim, cfg.train.steps)
        own = make_train_step(cfg, tx, mesh, task, step.how)
        each = jax.vmap(own.jitted.__wrapped__, (0, 0, None, 0), spmd_axis_name=MEMBERS)
        split, whole = NamedSharding(mesh, P(MEMBERS)), NamedSharding(mesh, P())

        def train_step(
            state: TrainState, rows: jax.Array, n: jax.Array, dials: Any
        ) -> tuple[TrainState, list[Metrics]]:
            state, metrics = each(state, rows, n, dials)
            return state, [{name: x[i] for name, x in metrics.items()} for i in range(M)]

        placed = {"in_shardings": (split, split, whole, split), "out_shardings": (split, whole)}
        jitted, how = jax.jit(train_step, donate_argnums=0, **placed), replace(step.how, recompile=False)
        dials = lambda first: _stacked([own.dials(first)] * M)  # noqa: E731  # to compile for
        steps[key] = replace(own, jitted=jitted, layout=split, how=how, dials=dials)
    return steps[key]


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *each: np.stack(each), *trees)


@jax.jit
def _at(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


class _Slice:
    """A member's part of the stacked states, copied when it is asked for."""

    def __init__(self, states: TrainState, i: int, home: TrainState):
        self._states, self._i, self._home = states, i, home

    @functools.cached_property
    def _whole(self) -> TrainState:
        """It lies where the member's own step would have it."""
        shards = len(self._states.step.addressable_shards)
        part, i = divmod(self._i, len(self._states.step) // shards)  # pyright: ignore[reportArgumentType]
        own = jax.tree.map(lambda x: sorted(x.addressable_shards, key=_first)[part].data, self._states)
        return jax.device_put(_at(own, i), self._home)

    @property
    def params(self) -> Any:
        return self._whole.params

    @property
    def opt_state(self) -> Any:
        return self._whole.opt_state


def _first(shard: Any) -> int:
    return shard.index[0].start or 0


class _Together:
    """The stacked states of a group and their compiled step. To the loop of each member it is a CompiledStep."""

    temporary_memory = 0

    def __init__(self, step: TrainStep, home: TrainStep, begun: Sequence[Any], stop: StopRequest):
        """`begun`: (state, rows) of each member. As a CompiledStep, it is not compiled if `stop` comes first."""
        self._layout, self._home = step.layout, layout(home.state)
        self._rows, self._dials = [rows for _, rows in begun], [home.dials(0)] * len(begun)
        self._states = jax.device_put(_stacked([state for state, _ in begun]), step.layout)
        self._program = CompiledStep(step, self._states, self._all_rows(), stop=stop)

    def news(self) -> str:
        return ""

    def _all_rows(self) -> jax.Array:
        return jax.device_put(jnp.stack(self._rows), self._layout)

    def __call__(self, calls: dict[int, Any]) -> dict[int, tuple[_Slice, Metrics]]:
        """The calls of members -> their answers. One that has ended is computed on, on its last rows, and ignored."""
        for i, (_, rows, _, dials) in calls.items():
            self._rows[i], self._dials[i] = rows, dials
        (n,) = {n for _, _, n, _ in calls.values()}  # they stand at the same step
        self._states, metrics = self._program(self._states, self._all_rows(), n, _stacked(self._dials))
        return {i: (_Slice(self._states, i, self._home), metrics[i]) for i in calls}


class _Named(Progress):
    """A member's share in the one bar of its group."""

    def __init__(self, bar: Progress, name: str):
        self._of_all, self._name = bar, name

    def begin(self, phase: str = "", now: str = "") -> None:
        self._of_all.begin(phase, now)

    def update(self, done: float, now: str = "", measured: float | None = None) -> None:
        self._of_all.update(done, now, measured)

    def say(self, text: str) -> None:
        self._of_all.say(f"{self._name}: {text}")

    def note(self, text: str) -> None:
        self._of_all.note(f"{self._name}: {text}")


def _train(group: Sequence[Ready], stop: StopRequest, steps: Steps) -> Iterator[tuple[Member, Outcome | Diverged]]:
    """Train members that stand at the same step, call by call -> each as it ends. A signal stops all after the same."""
    total, seen = group[0].cfg.train.steps, StopRequest()
    begun = max(checkpoint_steps(group[0].member.command.run_dir), default=0)
    with (
        Progress(f"{len(group)} members, step", total, begun, patience=0, now="compiling") as bar,
        contextlib.ExitStack() as all_,
    ):
        loops = [all_.enter_context(contextlib.closing(_loop(one, seen, steps, bar))) for one in group]
        program, answers = None, dict[int, Any].fromkeys(range(len(group)))
        while answers:
            seen.received = stop.received  # all see it before the same call
            calls = {}
            for i, answer in answers.items():
                try:
                    calls[i] = loops[i].send(answer)
                except StopIteration as end:
                    yield group[i].member, end.value
                except Diverged as e:
                    yield group[i].member, e
            if calls and program is None:
                cfg, task, home = in_turn.placed(group[0], steps, ONE)
                program = _Together(_vmapped(cfg, task, home, len(group), steps), home, list(calls.values()), stop)
                answers = dict.fromkeys(calls, program)
            else:
                answers = program(calls) if calls else {}


def _loop(one: Ready, stop: StopRequest, steps: Steps, bar: Progress) -> Driven:
    with in_turn.opened(one, steps, ONE) as (cfg, task, state, step, run):
        return (yield from loop.driven(cfg, task, state, step, run, stop, _Named(bar, one.member.name)))
