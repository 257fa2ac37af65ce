"""Files and folders that are there whole or not at all, and that never fall on somebody else's.

Everything is written under a fresh name beside its place, `.NAME.HEX.tmp`, and renamed at the end. The name is made
with O_EXCL, so no link is followed. It is locked while its writer lives: one that is not locked was left by a process
that was killed, and the next writer of the same NAME removes it.
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
except ImportError:  # Windows: nothing is locked, and so nothing is removed
    fcntl = None

LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp")
LONGEST = 200  # bytes of NAME in a temporary name: file systems end names at 255


def write(path: Path, content: str | bytes) -> None:
    """Leave the old content or the new, whatever happens in between. OSError; then the old.

    A link at `path` is replaced, not followed; see `write_result`.
    """
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A fresh empty file beside `path`, for any code to write. At the end it becomes `path`; an error removes it and
    leaves `path` as it was."""
    remove_leftovers(path)
    with _fresh(path, _make_file) as beside:
        with contextlib.suppress(OSError):  # no file at `path` yet
            if stat.S_ISREG(mode := path.lstat().st_mode):
                beside.chmod(stat.S_IMODE(mode))
        yield beside
        os.replace(beside, path)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A fresh folder beside `path`, which the caller moves or empties; what is left of it at the end is removed."""
    remove_leftovers(path)
    with _fresh(path, os.mkdir) as beside:
        yield beside


def write_result(path: Path, content: str | bytes) -> None:
    """Write what a person asked for at `path`, which stays what it is: a link still leads to the file, a device or a
    pipe is written to. OSError."""
    if is_special(path):
        with path.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
    else:
        write(target(path), content)


def target(path: Path) -> Path:
    """The file that `path` leads to, which need not be there yet."""
    return Path(os.path.realpath(path))


def is_special(path: Path) -> bool:
    """Whether `path` is there and is neither a file nor a folder: a device, a pipe, a socket."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def kind_of(path: Path) -> str:
    """What lies at `path` itself: "file", "folder", "link", "pipe", "device", "socket"; "" if nothing does. OSError."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link", stat.S_IFIFO: "pipe"}
    return kinds.get(stat.S_IFMT(mode), "socket" if stat.S_ISSOCK(mode) else "device")


def read(path: Path) -> bytes:
    """The content of the file at `path`. OSError for anything else that lies there: reading a pipe might never end."""
    if (kind := kind_of(path)) not in ("file", ""):
        raise OSError(errno.EINVAL, f"it is a {kind}, not a file", str(path))
    return path.read_bytes()


def entries(folder: Path) -> Iterator[tuple[str, str]]:
    """Everything in `folder`, at any depth: its path from there, and what it is. No link is followed. OSError."""
    for name in sorted(os.listdir(folder)):
        kind = kind_of(folder / name)
        yield name, kind
        if kind == "folder":
            yield from ((f"{name}/{inner}", kind) for inner, kind in entries(folder / name))


def check_writable(path: Path) -> None:
    """OSError if no file can be written at `path`. Tries it, as permissions alone do not tell."""
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
    """Remove what killed writers of `path` have left beside it: our temporary names that nobody holds locked."""
    for beside in _leftovers(path.parent):
        if LEFTOVER.fullmatch(beside.name)[1] == _short(path.name):  # pyright: ignore[reportOptionalSubscript]
            _remove_if_abandoned(beside)


def remove_all_leftovers(folder: Path) -> None:
    """Remove the leftovers of every name in `folder`, which must be ours alone: a run directory that we have locked."""
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
    """A new name beside `path`, made by `make` and locked until the end, when it is removed if it is still there."""
    while True:
        beside = path.with_name(f".{_short(path.name)}.{secrets.token_hex(6)}.tmp")
        make(beside)
        descriptor = _lock(beside)
        if os.path.lexists(beside):
            break
        if descriptor is not None:  # another writer took it for a leftover before it was locked
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
    """A descriptor that keeps `beside` locked until it is closed; None if it cannot be opened."""
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
