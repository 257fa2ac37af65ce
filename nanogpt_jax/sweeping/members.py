"""The members of a sweep: configurations times seeds, each an ordinary training command with its own run directory."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt_jax import config
from nanogpt_jax.config import Command, Config, UserError, parse, settings
from nanogpt_jax.sweeping import halve, ranges
from nanogpt_jax.sweeping.ranges import SEED, Range

FRESH = 1000  # the seeds of --confirm begin so far behind the first: no sweep has so many
LONGEST_NAME, LONGEST_VALUE = 150, 40  # characters; a file system allows 255 bytes


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str  # of its directory in the sweep's
    values: Mapping[str, Any]  # its configuration: the settings that are swept
    seed: int
    share: int  # it trains for 1/share of the steps: more than 1 in the first rounds of --halve
    command: Command  # what `train.py` would read, given the same settings


@dataclass(frozen=True)
class Sweep:
    """What was asked for."""

    path: Path  # runs/NAME
    words: tuple[str, ...]  # the config file, if there is one
    settings: Mapping[str, str]  # for every member, as typed
    ranges: tuple[Range, ...]  # without train.seed
    configurations: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...]
    sample: int | None
    halve: bool
    confirm: int
    together: str = "auto"  # or on, off: whether members are trained at once

    @property
    def keys(self) -> list[str]:
        return [one.key for one in self.ranges]

    def members(
        self, configurations: Sequence[Mapping[str, Any]], seeds: Sequence[int], share: int = 1
    ) -> list["Member"]:
        """Each configuration with each seed. UserError that names the member if one is invalid."""
        return [member(self, values, seed, share) for values in configurations for seed in seeds]

    def fresh_seeds(self) -> list[int]:
        """As many as --confirm asks for, none of which was used."""
        behind = ((self.seeds[0] + FRESH + i) % 2**32 for i in range(self.confirm + len(self.seeds)))
        return [seed for seed in behind if seed not in self.seeds][: self.confirm]


def member(sweep: Sweep, values: Mapping[str, Any], seed: int, share: int = 1) -> Member:
    """One member. What it trains is what `train.py` would, given the same settings: the same parser reads them."""
    name = name_of(values, seed, share)
    given = {**sweep.settings, **{key: ranges.shown(value) for key, value in values.items()}, SEED: str(seed)}
    argv = [*sweep.words, *(f"--{key}={value}" for key, value in given.items()), f"--run-dir={sweep.path / name}"]
    try:
        command = config.load(argv)
        if share > 1:
            command = replace(command, cfg=halve.shortened(command.cfg, share))
    except UserError as e:
        raise _named(name, e, sweep) from None
    return Member(name, values, seed, share, command)


def named(name: str, error: UserError) -> UserError:
    """The error, saying which member it is about."""
    return type(error)(f"{error}\n       in the member {name}: nothing was trained")


def _named(name: str, error: UserError, sweep: Sweep) -> UserError:
    """Only if the settings that all members share are not what is wrong."""
    try:
        config.load([*sweep.words, *(f"--{key}={value}" for key, value in sweep.settings.items())])
    except UserError as shared:
        if str(shared) == str(error):
            return error
    return named(name, error)


def given(command: Command) -> dict[str, Any]:
    """The settings of a member that do not follow from the run train.init_from."""
    taken = (command.cfg.train.init_from, str(command.run_dir))
    return {key: value for key, value in settings.items(command.cfg) if command.origin[key] not in taken}


def name_of(values: Mapping[str, Any], seed: int, share: int = 1) -> str:
    """The name of a run directory: "learning_rate=0.02,seed=1337"; different for different members."""
    names = ranges.short_names([*values, SEED])
    parts = [f"{names[key]}={_tame(ranges.shown(value))}" for key, value in values.items()]
    name = ",".join([*parts, f"{names[SEED]}={seed}", *([f"1of{share}"] if share > 1 else [])])
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{_hash(name)}"


def _tame(text: str) -> str:
    """A value as a part of a file's name. If that changes it, a hash keeps it different from others."""
    tame = re.sub(r"[^A-Za-z0-9.+_-]+", "-", text)[:LONGEST_VALUE]
    return tame if tame == text else f"{tame}-{_hash(text)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def best_toml(one: Member, about: Sequence[str]) -> str:
    """The settings of a member that are no defaults, as a config file for train.py. `about`: comments at its top."""
    default, lines, section = dict(settings.items(Config())), [f"# {' '.join(line.split())}" for line in about], ""
    for key, value in given(one.command).items():
        if value == default[key]:
            continue
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append(f"\n[{section}]")
        lines.append(f"{key.split('.')[1]} = {parse.to_toml(value)}")
    return "\n".join(lines) + "\n"
