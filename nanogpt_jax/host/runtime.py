"""JAX's environment, set before it starts: the cache of compiled programs, and how much XLA prints.

Variables that a user has set are not changed. We set no XLA flags: none that we tried makes every program on a CPU
faster (model/kernels/README.md), and XLA ends the process if it does not know a flag.
"""

import contextlib
import gc
import glob
import os
import re
import sys
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

SPARE = "spare"  # the name of threads that a command does not wait for at its end


def settings() -> dict[str, str]:
    """Environment variables for JAX: the user's if set, else ours."""
    ours = {
        "JAX_COMPILATION_CACHE_DIR": str(_cache_folder()),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),  # bytes; the least recently used goes first
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        # errors only: XLA warns a hundred thousand times about the second program of training/compiled.py
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return {name: os.environ.get(name, value) for name, value in ours.items()}


def set_up() -> None:
    """Put `settings` into the environment. Call it before anything imports jax."""
    gc.set_threshold(50_000)  # allocations; Python's 700 slow down the start of a large model
    os.environ.update(settings())
    try:
        Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).mkdir(parents=True, exist_ok=True)
    except OSError:  # no writable home: JAX would warn at each program
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    _complete_cache()
    warnings.filterwarnings("always", CACHE_ERROR)  # not only once for each text
    if getattr(warnings.showwarning, "__module__", "") != __name__:
        warnings.showwarning = _mending_cache(warnings.showwarning)


def describe() -> str:
    """The settings and XLA's flags, as comments below a configuration."""
    shown = {**settings(), "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    return "\n".join(f"# {name}={value}" for name, value in shown.items())


def _cache_folder() -> Path:
    """~/.cache/nanogpt_jax/PROCESSOR, as machines with different instruction sets may share a home directory."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "nanogpt_jax" / processor()


CACHE_ERROR = "Error (reading|writing) persistent compilation cache entry for '(.*?)'"


def _mending_cache(show: Any) -> Any:
    """A warnings.showwarning that silently deletes damaged entries of the compile cache. Other warnings go to `show`.

    JAX warns about such an entry and compiles anew, but never replaces an existing file. If the cache cannot be written
    (a full disk), that is not worth a warning either.
    """

    def show_others(message: Any, *where: Any, **more: Any) -> None:
        if not (error := re.match(CACHE_ERROR, str(message))):
            show(message, *where, **more)
        elif error[1] == "writing":
            _complete_cache()
        elif not isinstance(sys.exception(), OSError):  # an OSError is no damage, but a lock held for long or a disk
            _discard(error[2])

    return show_others


def _discard(name: str) -> None:
    """Remove the entry of program `name` that was read last, by the times of use that JAX writes."""
    folder, begin = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]), glob.escape(name)
    with contextlib.suppress(OSError):  # another process has removed it
        noted = sorted(folder.glob(f"{begin}-*atime"), key=lambda path: path.stat().st_mtime_ns)
        for path in noted[-1:] or folder.glob(f"{begin}-*cache"):  # without a size limit, JAX writes no times
            for suffix in ("cache", "atime"):
                path.with_name(path.name[:-5] + suffix).unlink(missing_ok=True)


def _complete_cache() -> None:
    """Write missing times of use: if a single entry has none, JAX stops writing to the cache.

    Such entries come from killed processes, full disks, and programs that set no size limit.
    """
    if os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == "-1":
        return
    with contextlib.suppress(OSError):  # no such folder, or not ours to write in
        folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
        names = set()
        for entry in list(os.scandir(folder)):
            if entry.is_file() or entry.is_dir():
                names.add(entry.name)
            else:  # JAX would wait on a pipe
                os.unlink(entry)
        for name in names:
            note = f"{name[:-5]}atime"
            if name.endswith("-cache") and note not in names:
                used = (folder / name).stat().st_mtime_ns
                (folder / note).write_bytes(used.to_bytes(8, "little"))


def cores() -> int:
    """Cores that this process may use, by its affinity and, in a container, its CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split())
        cores = min(cores, max(1, quota // period))
    return cores


def processor() -> str:
    """Eight hex digits that identify the processor and its instruction set; on systems but Linux always the same."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: assume that the home directory is not shared
        lines = []
    told = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return sha256(told.encode()).hexdigest()[:8]
