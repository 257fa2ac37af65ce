"""Where a run keeps its checkpoints: in RUN/checkpoints, in a folder elsewhere, or in a bucket.

With train.checkpoints=PLACE, RUN/checkpoints/elsewhere.json names their folder, PLACE/NAME-HEX. Each new run takes a
new one, so that it writes over no other: a run that is started over keeps its folder until its replacement has a
checkpoint. PLACE/NAME-HEX/run.json names the run directory that may remove it.

A folder in a bucket cannot be renamed. So a save has its final name at once, and counts as soon as it has checksums,
which are written last.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import sys
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

from nanogpt_jax.config import UserError, word
from nanogpt_jax.host import files
from nanogpt_jax.run import checksums
from nanogpt_jax.run.bucket import SCHEME, BucketPath

Folder: TypeAlias = Path | BucketPath
POINTER, MARK = "elsewhere.json", "run.json"
UNFINISHED = ".orbax-checkpoint-tmp"  # suffix of the folder of an unfinished save, but in a bucket


def at(place: str) -> Folder:
    """A folder by its path or its URL: gs://BUCKET/NAME or file:///PATH."""
    if place.startswith(SCHEME):
        return BucketPath(place.rstrip("/"))
    return Path(unquote(place.removeprefix("file://")) if place.startswith("file://") else place)


def folder_of(run_dir: Path) -> Folder:
    """Where the checkpoints of a run are. It may not be there yet. UserError if elsewhere.json is damaged."""
    return elsewhere(run_dir) or run_dir / "checkpoints"


def elsewhere(run_dir: Path) -> Folder | None:
    """The folder that RUN/checkpoints/elsewhere.json names; None without one, as is usual."""
    pointer = run_dir / "checkpoints" / POINTER
    try:
        folder = at(json.loads(files.read(pointer))["folder"])
        if isinstance(folder, Path) and not folder.is_absolute():
            raise ValueError(folder)
        return folder
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise UserError(f"cannot read {pointer}: {e.strerror or e}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f'{pointer} is damaged\n       write in it where the checkpoints are: {{"folder": "/PLACE/NAME"}}'
        ) from None


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps with a complete checkpoint, in order. An unfinished save does not count. UserError if it is not known."""
    folder = folder_of(run_dir)
    is_elsewhere = folder != run_dir / "checkpoints"
    try:
        if is_elsewhere and not (folder / MARK).exists():  # a disk that is not mounted is no run without checkpoints
            raise UserError(
                f"the checkpoints of {run_dir} are in {folder}, and that is not there\n"
                f"       bring it back; if it was moved, write the new place into {run_dir / 'checkpoints' / POINTER}\n"
                f"       if it is gone for good: rm {word(run_dir / 'checkpoints' / POINTER)}"
            )
        return sorted(step for step in _numbers(folder) if _is_complete(folder / str(step)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise UserError(f"cannot read {folder}: {e.strerror or e}") from None


def _numbers(folder: Folder) -> list[int]:
    names = os.listdir(folder) if isinstance(folder, Path) else folder.folders()
    return [int(name) for name in names if name.isascii() and name.isdecimal() and str(int(name)) == name]


def _is_complete(saved: Folder) -> bool:
    return os.path.isdir(saved) if isinstance(saved, Path) else checksums.exist(saved)


def saved_at(run_dir: Path, step: int) -> float:
    """When a checkpoint was saved, in seconds since 1970. OSError."""
    saved = folder_of(run_dir) / str(step)  # not the run's folder, which a failed start touches too
    return saved.stat().st_mtime if isinstance(saved, Path) else (saved / checksums.NAME).modified()


# ---- writing --------------------------------------------------------------------------------------------------------


def create(run_dir: Path, place: str) -> None:
    """Give a new run a folder of its own in `place`. OSError."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", run_dir.resolve().name)
    folder = _resolved(at(place)) / f"{name}-{secrets.token_hex(4)}"
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    if isinstance(folder, Path):
        folder.mkdir(parents=True)
    claim(run_dir, folder)
    files.write(run_dir / "checkpoints" / POINTER, json.dumps({"folder": str(folder)}) + "\n")


def claim(run_dir: Path, folder: Folder) -> None:
    """Note in `folder`, which is elsewhere, that it is the run's: it may have moved. OSError if it is not writable."""
    mark = (json.dumps({"run": str(run_dir.resolve())}) + "\n").encode()
    if isinstance(folder, Path):
        files.write(folder / MARK, mark)
    else:
        (folder / MARK).write_bytes(mark)


def remove_unfinished(folder: Folder) -> None:
    """Remove what killed saves have left. Nobody may be saving there."""
    if isinstance(folder, Path):
        for path in folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        for step in _numbers(folder):
            if not _is_complete(folder / str(step)):
                (folder / str(step)).remove()


def forget(pointed_from: Path, run_dir: Path) -> None:
    """Remove the checkpoints that `pointed_from`, a run or what was set aside of one, has elsewhere; and the pointer.

    Only what is known to be the checkpoints of `run_dir`: a copy of a run directory points to the same folder.
    """
    try:
        if folder := elsewhere(pointed_from):
            _remove(folder, run_dir)
    except FileNotFoundError:  # it was removed before
        pass
    except (OSError, UserError) as e:
        print(f"note: checkpoints of the run before may be left ({e})", file=sys.stderr)
    with contextlib.suppress(OSError):
        (pointed_from / "checkpoints" / POINTER).unlink()


def _remove(folder: Folder, run_dir: Path) -> None:
    try:
        owner = json.loads((folder / MARK).read_bytes())["run"]
    except (ValueError, KeyError, TypeError, RecursionError):
        owner = "?"
    if owner != str(run_dir.resolve()):
        print(f"note: {folder} is left, with the checkpoints of the run before: {owner} has them too", file=sys.stderr)
        return
    remove_unfinished(folder)
    for step in _numbers(folder):
        saved = folder / str(step)
        if isinstance(saved, BucketPath):
            saved.remove()
        elif files.kind_of(saved) == "folder":
            shutil.rmtree(saved)
    (folder / MARK).unlink(missing_ok=True)
    if isinstance(folder, Path):
        folder.rmdir()


def check(run_dir: Path, place: str, where: str) -> None:
    """UserError if a run that goes on has its checkpoints in another place than train.checkpoints=`place`.

    What a stranger's elsewhere.json names is not written to, unless it is asked for.
    """
    found = elsewhere(run_dir)
    asked = None if place == "run" else at(place)
    if (found and _resolved(found.parent)) == (asked and _resolved(asked)):
        return
    if found:
        raise UserError(
            f"{run_dir} has its checkpoints in {found}, but train.checkpoints={place} ({where})\n"
            f"       go on there: --train.checkpoints={word(str(found.parent))}\n"
            f"       or move that folder, and write its new place into {run_dir / 'checkpoints' / POINTER}"
        )
    raise UserError(
        f"train.checkpoints={place} ({where}), but {run_dir} has its checkpoints in {run_dir / 'checkpoints'}\n"
        "       leave it out, choose another --run-dir, or start over with --overwrite"
    )


def _resolved(folder: Folder) -> Folder:
    return folder.resolve() if isinstance(folder, Path) else folder
