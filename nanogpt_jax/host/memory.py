"""Memory on a CPU: whether the process holds what it frees (glibc only), and how much is available."""

import contextlib
import ctypes
import os
import platform
from pathlib import Path

MEMORY, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")
PROCESS = 396 * 2**20  # bytes of Python, JAX and XLA with a program
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def hold_freed_memory() -> None:
    """Make the C library hold freed memory for the next allocation, and not return it to the system.

    The temporary memory of a step is one large block. By default the C library maps and unmaps it at each step, and the
    system clears every page. glibc can hold it, but only for the main thread, where `mesh.start` makes programs run. If
    the user has set MALLOC_TRIM_THRESHOLD_, this does nothing.
    """
    if (libc := _glibc()) and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def trim() -> None:
    """Return held memory to the system. To be called before something else that needs much memory."""
    if libc := _glibc():
        libc.malloc_trim(0)


def free() -> int:
    """Bytes available according to /proc/meminfo and this process's cgroups.

    Cached files count as available. Without /proc/meminfo: half of all memory, or 0 if that is unknown.
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
        if kinds:  # cgroups, version 1
            top, most, held = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        own = top / path.lstrip("/")
        for folder in (own, *own.parents) if kinds in ("", "memory") else ():
            try:
                left = int((folder / most).read_text()) - int((folder / held).read_text())
                least = min(least, left + _of_files(folder / "memory.stat"))
            except (OSError, ValueError):  # no such cgroup, or "max"
                continue
    return least


def left_for_arrays() -> int:
    """Of `free`, what is left for arrays once Python, JAX and a compiled program are loaded; some of it is."""
    try:
        held = next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    except (OSError, StopIteration):  # not Linux
        held = 0
    return max(free() - max(PROCESS - held, 0), 0)


def _of_files(account: Path) -> int:
    """Bytes of cached files in a cgroup, which it frees when memory is needed."""
    found = 0
    with contextlib.suppress(OSError):
        for name, _, number in (line.partition(" ") for line in account.read_text(encoding="utf-8").splitlines()):
            if name in ("inactive_file", "total_inactive_file"):  # the latter in version 1, nested cgroups included
                found = int(number)
    return found


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
