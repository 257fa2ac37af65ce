"""Atomic writes: a file or folder is complete or absent, and never overwrites what belongs to somebody else.

Everything is written under a new name in the same folder, `.NAME.HEX.tmp`, and renamed at the end. The name is created
with O_EXCL, so no link is followed. Its writer holds a lock on it. A name without a lock was left by a process that was
killed, and the next writer of the same NAME removes it.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks, so leftovers are not removed
    fcntl = None

LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp")
LONGEST = 200  # bytes of NAME in a temporary name: file systems allow 255 in all


def write(path: Path, content: str | bytes) -> None:
    """Replace the content atomically. OSError if that fails; then the old content stays.

    A link at `path` is replaced, not followed; see `write_result`.
    """
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new empty file beside `path`, to be written by the caller. At the end it replaces `path`. An error removes it
    and leaves `path` as it was."""
    remove_leftovers(path)
    with _fresh(path, _make_file) as beside:
        with contextlib.suppress(OSError):  # no file at `path` yet
            if stat.S_ISREG(mode := path.lstat().st_mode):
                beside.chmod(stat.S_IMODE(mode))
        yield beside
        os.replace(beside, path)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, for the caller to fill and rename. If it still exists at the end, it is removed."""
    remove_leftovers(path)
    with _fresh(path, os.mkdir) as beside:
        yield beside


def write_result(path: Path, content: str | bytes) -> None:
    """Write a result to the path that a person named. A link is followed; a device or a pipe is written to. OSError if
    that fails."""
    if is_special(path):
        with path.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
    else:
        write(target(path), content)


def target(path: Path) -> Path:
    """The file that `path` leads to. It need not exist. OSError if links lead in a circle."""
    found = Path(os.path.realpath(path))
    if found.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return found


def is_special(path: Path) -> bool:
    """Whether `path` exists and is neither a file nor a folder: a device, a pipe, a socket."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def kind_of(path: Path) -> str:
    """The kind of `path` itself: "file", "folder", "link", "pipe", "device", "socket"; "" if nothing does. OSError."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link", stat.S_IFIFO: "pipe"}
    return kinds.get(stat.S_IFMT(mode), "socket" if stat.S_ISSOCK(mode) else "device")


def read(path: Path) -> bytes:
    """The content of the file at `path`. OSError if it is anything else: reading a pipe might never end."""
    if (kind := kind_of(path)) not in ("file", ""):
        raise OSError(errno.EINVAL, f"it is a {kind}, not a file", str(path))
    return path.read_bytes()


def entries(folder: Path) -> Iterator[tuple[str, str]]:
    """(relative path, kind) of everything in `folder`, at any depth. Follows no links. OSError if it is unreadable."""
    for name in sorted(os.listdir(folder)):
        kind = kind_of(folder / name)
        yield name, kind
        if kind == "folder":
            yield from ((f"{name}/{inner}", kind) for inner, kind in entries(folder / name))


def check_writable(path: Path) -> None:
    """OSError if no file can be written at `path`. Creates one to find out, as permissions alone do not decide it."""
    if is_special(path):
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    path = target(path)
    if path.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with _fresh(path, _make_file):
        pass


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` have left beside it: those without a lock."""
    for beside in _leftovers(path.parent):
        if LEFTOVER.fullmatch(beside.name)[1] == _short(path.name):  # pyright: ignore[reportOptionalSubscript]
            _remove_if_abandoned(beside)


def remove_all_leftovers(folder: Path) -> None:
    """Remove the leftovers of every name in `folder`, which must be ours alone, like a run directory that we locked."""
    for beside in _leftovers(folder):
        _remove_if_abandoned(beside)


def _leftovers(folder: Path) -> list[Path]:
    try:
        return [p for p in folder.iterdir() if LEFTOVER.fullmatch(p.name)]
    except OSError:
        return []


def _remove_if_abandoned(beside: Path) -> None:
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # locked, another user's, gone meanwhile, or a file system without locks
        if beside.is_symlink() or (hasattr(os, "geteuid") and beside.lstat().st_uid != os.geteuid()):
            return
        descriptor = os.open(beside, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(beside)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _fresh(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new name beside `path`, created by `make` and locked. At the end it is removed if it still exists."""
    while True:
        beside = path.with_name(f".{_short(path.name)}.{secrets.token_hex(6)}.tmp")
        make(beside)
        descriptor = _lock(beside)
        if os.path.lexists(beside):
            break
        if descriptor is not None:  # another writer removed it as a leftover before it was locked
            os.close(descriptor)
    try:
        yield beside
    finally:
        with contextlib.suppress(OSError):
            _remove(beside)
        if descriptor is not None:
            os.close(descriptor)


def _short(name: str) -> str:
    return os.fsencode(name)[:LONGEST].decode("utf-8", "ignore")


def _make_file(beside: Path) -> None:
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))


def _lock(beside: Path) -> int | None:
    """A descriptor that holds the lock on `beside` until it is closed; None if it cannot be opened."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(beside, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove(beside: Path) -> None:
    if beside.is_dir() and not beside.is_symlink():
        shutil.rmtree(beside, ignore_errors=True)
    else:
        beside.unlink(missing_ok=True)
