"""The members that are missing, trained one after the other in this process, each as `train.py` would train it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt_jax import config
from nanogpt_jax.config import Config, MeshConfig, UserError
from nanogpt_jax.data import batches, dataset
from nanogpt_jax.data.dataset import Dataset
from nanogpt_jax.distributed.mesh import common_room, make_mesh, start
from nanogpt_jax.host import files
from nanogpt_jax.host.progress import Part
from nanogpt_jax.host.signals import StopRequest
from nanogpt_jax.model import execution
from nanogpt_jax.run import run_dir
from nanogpt_jax.run.places import checkpoint_steps
from nanogpt_jax.run.plan import execution_here
from nanogpt_jax.run.recording import Recording
from nanogpt_jax.sweeping.members import Member, named
from nanogpt_jax.training import dials, loop, optim
from nanogpt_jax.training.language_model import language_model
from nanogpt_jax.training.loop import Diverged, Outcome
from nanogpt_jax.training.state import TrainState
from nanogpt_jax.training.step import TrainStep, make_train_step
from nanogpt_jax.training.task import Task

Steps = dict[Any, TrainStep]  # those of earlier members, by their program


@dataclass(frozen=True)
class Ready:
    """A member that can be trained."""

    member: Member
    cfg: Config  # with the vocabulary
    data: Dataset


def ready(members: Sequence[Member], opened: dict[str, Dataset]) -> list[Ready]:
    """Opens the data of each, prepared on first use, and checks all that can be checked before training.

    `opened` keeps data by its settings: members share it, and a pipe can be read only once. UserError that names the
    member if one cannot be trained.
    """
    found = []
    for one in members:
        command = one.command
        try:
            if (kind := files.kind_of(command.run_dir)) not in ("", "folder", "link"):
                raise UserError(f"{command.run_dir} is a {kind}, and a run is a directory\n       take it away")
            key = repr(command.cfg.data)
            if key not in opened:
                opened[key] = dataset.open_data(command.cfg.data)
            data, first = opened[key], command.cfg.train.init_from
            run_dir.check_tokenizer(command, data)
            cfg = config.with_vocabulary(
                command.cfg, data.tokenizer.n_vocab, data.tokenizer.end_of_text, command.origin
            )
            batches.check_length(data.train, cfg.model.block_size)
            if first != "scratch" and not checkpoint_steps(Path(first)) and not checkpoint_steps(command.run_dir):
                where = command.origin["train.init_from"]
                raise UserError(f"train.init_from={first} has no checkpoint yet ({where})")
            execution_here(cfg)
        except UserError as e:
            raise named(one.name, e) from None
        found.append(Ready(one, cfg, data))
    return found


def check_data(done: Sequence[Member], opened: dict[str, Dataset]) -> None:
    """UserError if members that are done were trained on other data than theirs is now, if it is open."""
    for one in done:
        data, place = opened.get(repr(one.command.cfg.data)), one.command.run_dir
        if data is None or not (place / "data.json").exists():
            continue
        try:
            is_same = run_dir.trained_on(place, lambda: "bring the old one back") == data.fingerprint
        except UserError as e:
            raise named(one.name, e) from None
        if not is_same:
            title = one.command.cfg.data.title
            raise UserError(
                f"the data of {place} has changed: {title} gives other tokens now than it was trained on\n"
                "       bring the old text back, or choose another --name: losses of different texts are no comparison"
            )


def train_members(
    members: Sequence[Ready], stop: StopRequest, on_start: Callable[[list[Member]], Part], steps: Steps
) -> Iterator[tuple[Member, Outcome | Diverged]]:
    """Train the members -> each as it ends, and how. After a signal, the one under way has saved, and is the last.

    A member's directory is as `train.py` leaves it: what is there of it is resumed, and its losses are the same, bit
    for bit.
    """
    for one in members:
        if stop.received:
            return
        part = on_start([one.member])
        try:
            outcome = _train(one, stop, steps, part)
        except Diverged as e:
            yield one.member, e
            continue
        yield one.member, outcome
        if outcome.signal:
            return


def _train(one: Ready, stop: StopRequest, steps: Steps, part: Part) -> Outcome:
    """What `train.py` does, without a sample of text at the end."""
    with opened(one, steps) as (cfg, task, state, step, run):
        return loop.fit(cfg, task, state, step, run, stop, part)


@contextlib.contextmanager
def opened(
    one: Ready, steps: Steps, mesh: MeshConfig | None = None
) -> Iterator[tuple[Config, Task, TrainState, TrainStep, Recording]]:
    """A member's directory, claimed and prepared, and what `loop.fit` takes of it."""
    with run_dir.claim(one.member.command) as directory:
        run_dir.prepare(directory, one.member.command, one.cfg, one.data)
        cfg, task, step = placed(one, steps, mesh)
        with Recording(directory, cfg.train) as run:
            yield cfg, task, loop.start_state(cfg, step, run), step, run


def placed(one: Ready, steps: Steps, mesh: MeshConfig | None = None) -> tuple[Config, Task, TrainStep]:
    """How a member runs here, on its own mesh or on another.

    JAX keeps what a jitted function has compiled, so a member that takes an earlier one's step compiles nothing.
    """
    cfg, devices = replace(one.cfg, mesh=mesh or one.cfg.mesh), start()
    where = make_mesh(cfg.mesh)
    cfg, how = execution.choose(cfg, devices, where.size, common_room(where))
    task = language_model(cfg, where, one.data)
    program = (how, *dials.program_of(cfg))
    if program in steps:
        return cfg, task, replace(steps[program], dials=dials.make_dials(cfg, how.steps_per_dispatch))
    tx = optim.make_optimizer(cfg.optim, cfg.train.steps)
    steps[program] = make_train_step(cfg, tx, where, task, how)
    return cfg, task, steps[program]
