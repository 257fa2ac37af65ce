"""What JAX is told before it starts, in one place: where compiled programs are kept, and what XLA may say.

What a user has set is left as it is. XLA's flags would stand here too, but none of those tried makes every program on
a CPU faster (model/kernels/README.md), and an XLA that does not know a flag ends the process.
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

SPARE = "spare"  # the name of threads that nobody waits for when a command has ended


def settings() -> dict[str, str]:
    """Environment variables for JAX as they will be: ours where the user has set nothing."""
    ours = {
        "JAX_COMPILATION_CACHE_DIR": str(_cache_folder()),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),  # bytes; what was used longest ago goes first
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        # errors only: of training.program's second compilation XLA warns a hundred thousand times
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return {name: os.environ.get(name, value) for name, value in ours.items()}


def set_up() -> None:
    """Put `settings` into the environment. Call it before anything imports jax."""
    gc.set_threshold(50_000)  # objects made; at Python's 700, looking for cycles takes 7 % of GPT-2's start
    os.environ.update(settings())
    try:
        Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).mkdir(parents=True, exist_ok=True)
    except OSError:  # no home to write in: JAX would say so at each program
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    _complete_cache()
    warnings.filterwarnings("always", CACHE_ERROR)  # and not each text once
    if getattr(warnings.showwarning, "__module__", "") != __name__:
        warnings.showwarning = _mending_cache(warnings.showwarning)


def describe() -> str:
    """The settings, and XLA's flags as they are, as comments to stand below a configuration."""
    shown = {**settings(), "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    return "\n".join(f"# {name}={value}" for name, value in shown.items())


def _cache_folder() -> Path:
    """~/.cache/nanogpt_jax/PROCESSOR: a home directory may be shared by machines with unlike instruction sets."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "nanogpt_jax" / processor()


CACHE_ERROR = "Error (reading|writing) persistent compilation cache entry for '(.*?)'"


def _mending_cache(show: Any) -> Any:
    """A warnings.showwarning that silently deletes a damaged entry of the compile cache, and is `show` for the rest.

    JAX warns, compiles and writes a new entry, but not over a file that is still there. A cache that cannot be written
    (a full disk) is not worth a word either.
    """

    def show_others(message: Any, *where: Any, **more: Any) -> None:
        if not (error := re.match(CACHE_ERROR, str(message))):
            show(message, *where, **more)
        elif error[1] == "writing":
            _complete_cache()
        elif not isinstance(sys.exception(), OSError):  # that was no damage: a lock held for long, a disk
            _discard(error[2])

    return show_others


def _discard(name: str) -> None:
    """Remove the entry of the program `name` that was read last: JAX has just noted when."""
    folder, begin = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]), glob.escape(name)
    with contextlib.suppress(OSError):  # another process has removed it
        noted = sorted(folder.glob(f"{begin}-*atime"), key=lambda path: path.stat().st_mtime_ns)
        for path in noted[-1:] or folder.glob(f"{begin}-*cache"):  # a cache without limit notes nothing
            for suffix in ("cache", "atime"):
                path.with_name(path.name[:-5] + suffix).unlink(missing_ok=True)


def _complete_cache() -> None:
    """Write the missing times of use: if a single entry has none, JAX stops writing to the cache.

    A killed process leaves such entries, and so do a full disk and a program that sets no limit to this cache.
    """
    if os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == "-1":
        return
    with contextlib.suppress(OSError):  # no such folder, or not ours to write in
        folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
        names = set()
        for entry in list(os.scandir(folder)):
            if entry.is_file() or entry.is_dir():
                names.add(entry.name)
            else:  # JAX would wait for a pipe
                os.unlink(entry)
        for name in names:
            note = f"{name[:-5]}atime"
            if name.endswith("-cache") and note not in names:
                used = (folder / name).stat().st_mtime_ns
                (folder / note).write_bytes(used.to_bytes(8, "little"))


def cores() -> int:
    """Cores that this process may use: by its affinity and, in a container, by its quota of their time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split())
        cores = min(cores, max(1, quota // period))
    return cores


def processor() -> str:
    """Eight letters for this processor and its instruction set; the same for all where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: a home directory that is not shared either
        lines = []
    told = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return sha256(told.encode()).hexdigest()[:8]
