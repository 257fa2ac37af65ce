"""The memory of a process on a CPU: how it is held, which only glibc lets us say, and how much is free."""

import contextlib
import ctypes
import os
import platform
from pathlib import Path

MEMORY, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def hold_freed_memory() -> None:
    """What a program gives back is kept for the next one.

    The temporary memory of a step is one large block, which the C library would map afresh and hand back each time, and
    the system clear page by page (124M: 1.6 GB a step, a tenth of the time). glibc keeps it when told to, but only for
    the main thread: `mesh.start` has programs run there. A user's own MALLOC_TRIM_THRESHOLD_ leaves all that as it is.
    """
    if (libc := _glibc()) and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def trim() -> None:
    """What is kept goes back to the system, before something else that needs much memory."""
    if libc := _glibc():
        libc.malloc_trim(0)


def free() -> int:
    """Bytes that could be had, by the account of the system and of the control groups that this process is in.

    What is held of files that nobody reads any more counts as free. Half of all memory where there is no such account;
    0 where nothing is known.
    """
    try:
        lines = MEMORY.read_text(encoding="utf-8").splitlines()
        least = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        groups = [line.split(":", 2) for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines()]
    except (OSError, StopIteration):  # not Linux
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}) else 0
        return pages * os.sysconf("SC_PAGE_SIZE") // 2 if pages else 0
    for _, kinds, path in groups:
        top, most, held = GROUPS, "memory.max", "memory.current"
        if kinds:  # version 1
            top, most, held = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        own = top / path.lstrip("/")
        for folder in (own, *own.parents) if kinds in ("", "memory") else ():
            try:
                left = int((folder / most).read_text()) - int((folder / held).read_text())
                least = min(least, left + _of_files(folder / "memory.stat"))
            except (OSError, ValueError):  # no such group, or "max"
                continue
    return least


def _of_files(account: Path) -> int:
    """Bytes that a control group holds of files, and gives up when they are needed."""
    found = 0
    with contextlib.suppress(OSError):
        for name, _, number in (line.partition(" ") for line in account.read_text(encoding="utf-8").splitlines()):
            if name in ("inactive_file", "total_inactive_file"):  # the latter of version 1, with the groups below
                found = int(number)
    return found


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
