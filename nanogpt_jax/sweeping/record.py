"""runs/NAME as the place of one sweep: sweep.json says what was asked, which members diverged, and which way each
was trained; a lock guards it.

runs/NAME/sweep.json   this record           runs/NAME/MEMBER/      an ordinary run directory
runs/NAME/sweep.csv    the table             runs/NAME/best.toml    the winner, for train.py
runs/NAME/sweep.html   the page              runs/NAME/lock         held while a process trains here
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from nanogpt_jax.config import Config, UserError, settings
from nanogpt_jax.host import files
from nanogpt_jax.run import run_dir
from nanogpt_jax.sweeping import members, ranges
from nanogpt_jax.sweeping.members import Sweep
from nanogpt_jax.sweeping.ranges import SEED

NAME, LOCK, CSV, PAGE, BEST = "sweep.json", "lock", "sweep.csv", "sweep.html", "best.toml"
COMPARED = ("settings", "over", "sample", "seeds", "halve")
# how a member is run, not what it computes; but its steps are
FREE = Config.EXECUTION - {"train.steps"}


@dataclass
class Record:
    """An open sweep, locked."""

    path: Path
    asked: dict[str, Any]  # JSON
    diverged: dict[str, str] = field(default_factory=dict)  # member -> what was not finite, and when
    together: dict[str, int] = field(default_factory=dict)  # member -> how many were trained at once; others: in turn
    measured: dict[str, Any] = field(default_factory=dict)  # program and devices -> which way is faster: a Verdict

    @property
    def ways(self) -> str:
        """Which members were trained together, in words; "" if none was."""
        n = len(self.together)
        return f"{n} members were trained together, in one program; {self.path / NAME} names them" if n else ""

    def write(self) -> None:
        """UserError if that fails."""
        found = {"diverged": self.diverged, "together": self.together, "measured": self.measured}
        try:
            files.write(self.path / NAME, json.dumps({**self.asked, **found}, indent=2) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {self.path / NAME}: {e.strerror or e}") from None


def asked(sweep: Sweep) -> dict[str, Any]:
    """What makes this sweep another one than others, as JSON."""
    swept = {one.key: list(one.values) for one in sweep.ranges}
    first = sweep.members(sweep.configurations[:1], sweep.seeds[:1])[0]
    shared = {k: v for k, v in members.given(first.command).items() if k not in {*swept, *FREE, SEED}}
    told = {"settings": shared, "over": swept, "sample": sweep.sample, "seeds": list(sweep.seeds), "halve": sweep.halve}
    return json.loads(json.dumps(told))


def check_place(path: Path) -> None:
    """UserError if the directory is something else than a sweep's or a new one. Writes nothing."""
    run_dir.check_name(path)
    if (kind := files.kind_of(path.parent)) not in ("", "folder", "link"):
        raise UserError(f"{path.parent} is a {kind}, and {path} a directory in it\n       take it away")
    if not os.path.lexists(path):
        return
    if not os.path.isdir(path):
        raise UserError(f"{path} is a {files.kind_of(path)}, and a sweep is a directory\n       choose another --name")
    try:
        names = sorted(os.listdir(path))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if "config.json" in names:
        raise UserError(f"{path} is a run, and no sweep\n       choose another --name")
    strangers = [name for name in names if name != LOCK and not files.LEFTOVER.fullmatch(name)]
    if strangers and NAME not in names:
        raise UserError(f"{path} holds other files ({strangers[0]}) and is no sweep\n       choose another --name")


def check(sweep: Sweep) -> dict[str, Any]:
    """What sweep.json says; {} if there is none. UserError if the directory is not for this sweep. Writes nothing."""
    check_place(sweep.path)
    if not os.path.lexists(sweep.path / NAME):
        return {}
    before = _read(sweep.path / NAME)
    _check_same(sweep.path, before, asked(sweep), extends=not sweep.halve)
    return before


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(files.read(path))
        wanted = {"settings": dict, "over": dict, "seeds": list, "diverged": dict}
        if not (set(COMPARED) <= set(found) and all(isinstance(found[key], kind) for key, kind in wanted.items())):
            raise ValueError("it is no record of a sweep")
        return found
    except OSError as e:
        what = f"cannot read {path}: {e.strerror or e}"
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        what = f"{path} is damaged: {e}"
    raise UserError(f"{what}\n       bring the old one back, or choose another --name")


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any], extends: bool) -> None:
    """UserError if `now` asks for another sweep than `before`. More seeds are the same sweep, extended."""
    lines = []
    default = dict(settings.items(Config()))  # of a setting that is newer than the record
    for what, flag, absent in (("settings", "", default), ("over", "--over ", {})):
        for key in [*before[what], *(key for key in now[what] if key not in before[what])]:
            old, new = (_told(each[what].get(key, absent.get(key))) for each in (before, now))
            lines += [f"{flag}{key}: {old} there, {new} now"] if old != new else []
    for what in ("sample", "halve"):
        if before[what] != now[what]:
            lines.append(f"--{what}: {_told(before[what])} there, {_told(now[what])} now")
    seeds = now["seeds"][: len(before["seeds"])] if extends else now["seeds"]
    if before["seeds"] != seeds:
        lines.append(f"seeds: {_told(before['seeds'])} there, {_told(now['seeds'])} now")
    if lines:
        shown = "\n".join(f"       {line}" for line in lines)
        table = f"; the table of the one there is {path / CSV}" if (path / CSV).exists() else ""
        raise UserError(f"{path} holds another sweep\n{shown}\n       choose another --name{table}")


def _told(value: Any) -> str:
    if value is None or value is False:
        return "not given"
    return ",".join(map(ranges.shown, value)) if isinstance(value, list) else ranges.shown(value)


@contextlib.contextmanager
def claim(sweep: Sweep) -> Iterator[Record]:
    """The sweep's directory, created and locked for this process. A start that fails before `Record.write` leaves
    nothing behind. UserError if the directory may not be used."""
    path = sweep.path
    check(sweep)
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / LOCK)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process is training the sweep {path}\n       choose another --name") from None
    except OSError as e:
        raise UserError(f"cannot write in {path}: {e.strerror or e}") from None
    with lock:
        try:
            before = check(sweep)
            files.remove_all_leftovers(path)
            yield Record(
                path, asked(sweep), *(dict(before.get(key, {})) for key in ("diverged", "together", "measured"))
            )
        finally:
            if not os.path.lexists(path / NAME):
                (path / LOCK).unlink(missing_ok=True)
                for folder in missing:
                    with contextlib.suppress(OSError):  # not empty
                        folder.rmdir()
