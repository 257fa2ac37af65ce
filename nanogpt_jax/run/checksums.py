"""Checksums of a folder's files, stored in it: sizes and CRC-32s show whether the files are as they were written.

CRC-32 finds every flipped bit and every short burst, misses one in four billion of other errors, and is fast: a core
does some gigabytes a second. It does not protect against deliberate changes.
"""

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanogpt_jax.host import files
from nanogpt_jax.run.bucket import BucketPath

NAME = "checksums.json"
PART = 64 << 20  # bytes for each checksum, so that threads share a large file
BLOCK = 1 << 20  # bytes read at a time


def write(folder: Path | BucketPath) -> None:
    """Write the checksums of all files of `folder` into it. OSError if that fails."""
    names = [name for name, kind in _entries(folder) if kind == "file" and name != NAME]
    found = _measure(folder, {name: _size(folder / name) for name in names})
    text = json.dumps({"checksum": _of(found), "files": found}) + "\n"
    if isinstance(folder, Path):
        files.write(folder / NAME, text)
    else:
        (folder / NAME).write_bytes(text.encode())


def exist(folder: Path | BucketPath) -> bool:
    return os.path.lexists(folder / NAME) if isinstance(folder, Path) else (folder / NAME).exists()


def damage(folder: Path | BucketPath, only: str = "", leave_out: tuple[str, ...] = ()) -> str:
    """What is wrong with the files of `folder`; "" if nothing is. Without checksums, it only checks that all are files.

    `only`: check one folder in it; `leave_out`: skip these folders in it.
    """
    path = folder / NAME
    try:
        for name, kind in _entries(folder):
            if kind not in ("file", "folder"):
                return f"{folder / name} is a {kind}"
        if not exist(folder):
            return ""
        kept = json.loads(path.read_bytes())
        if kept["checksum"] != _of(kept["files"]):
            return f"{path} has another checksum than when it was saved"
        wanted: dict[str, list[int]] = {
            name: about
            for name, about in kept["files"].items()
            if (top := name.split("/")[0]) not in leave_out and only in ("", top)
        }
        sizes = {name: size for name, (size, *_) in wanted.items()}
        for name, size in sizes.items():
            if (found := _size(folder / name)) != size:
                return f"{folder / name} has {found:,} bytes instead of {size:,}"
        measured = _measure(folder, sizes)
        for name, about in wanted.items():
            if about != measured[name]:
                return f"{folder / name} has another checksum than when it was saved"
    except FileNotFoundError as e:
        return f"{e.filename} is missing"
    except OSError as e:
        return f"{e.filename or path} cannot be read: {e.strerror or e}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{path} holds no checksums"
    return ""


def _entries(folder: Path | BucketPath) -> Iterable[tuple[str, str]]:
    return files.entries(folder) if isinstance(folder, Path) else [(name, "file") for name in folder.files()]


def _size(path: Path | BucketPath) -> int:
    return os.path.getsize(path) if isinstance(path, Path) else path.size()


def _measure(folder: Path | BucketPath, sizes: dict[str, int]) -> dict[str, list[int]]:
    """The size of each file, and the checksum of each PART of it. OSError."""
    parts = [(name, start) for name, size in sizes.items() for start in range(0, size, PART)]
    found = {name: [size] for name, size in sizes.items()}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for (name, _), checksum in zip(parts, threads.map(lambda part: _checksum(folder, *part), parts), strict=True):
            found[name].append(checksum)
    return found


def _checksum(folder: Path | BucketPath, name: str, start: int) -> int:
    checksum, left = 0, PART
    with (folder / name).open("rb", buffering=0) as file:
        file.seek(start)
        try:
            while block := file.read(min(BLOCK, left)):
                checksum, left = zlib.crc32(block, checksum), left - len(block)
        except OSError as e:  # a failing disk: the system does not name the file
            raise OSError(e.errno, e.strerror, str(folder / name)) from None
    return checksum


def _of(found: object) -> int:
    return zlib.crc32(json.dumps(found, sort_keys=True).encode())
