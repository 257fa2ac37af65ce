"""What every test runs under: a CPU that JAX sees as 8 devices, no network, and repeatable hypothesis examples."""

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# All of this must stand in the environment before anything imports jax, which reads it once.
# pytest-xdist's workers inherit what their parent has set here, so the user's own flags are kept beside it.
BEFORE = os.environ.setdefault("XLA_FLAGS_OF_USER", os.environ.get("XLA_FLAGS", ""))
# Tests compile much and compute little: LLVM's lowest level makes the suite a third as long. One piece of code, not 32.
FASTER = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# XLA's older emitter of fusions compiles a training step in 0.8 s of CPU, the newer in 3.1 s. jaxlib 0.12 lost it.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FASTER += " --xla_cpu_use_fusion_emitters=false"
QUICK = f"{BEFORE} {FASTER}".strip()
if os.environ.get("USERS_FLAGS"):  # what users run: .ci/run tries the laws of exactness so
    QUICK = BEFORE
os.environ["XLA_FLAGS"] = f"{QUICK} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # [B] + [B, C] is a mistake as often as it is meant
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # as runtime has it
# Programs compiled by one test or subprocess serve the next: pytest-xdist's workers inherit the place from the parent.
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"nanogpt_jax-{os.getpid()}"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Packages that were installed without bytecode (by uv, say) cost each process 5 s of CPU: the first one keeps it.
JAX = importlib.util.find_spec("jax")
if JAX and JAX.origin and not os.path.exists(importlib.util.cache_from_source(JAX.origin)):
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(
        os.environ["JAX_COMPILATION_CACHE_DIR"], "bytecode"
    )

# A shell script's background jobs ignore Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", max_examples=8, deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_unconfigure() -> None:
    if OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def clean_env() -> dict[str, str]:
    """An environment for a subprocess, which sees the one device that a user would."""
    return {**os.environ, "XLA_FLAGS": QUICK}


@pytest.fixture(scope="session")
def users_env() -> dict[str, str]:
    """An environment for a subprocess with the compiler flags, too, that a user would have."""
    return {**os.environ, "XLA_FLAGS": BEFORE}


@pytest.fixture
def popen() -> Iterator[Callable[..., subprocess.Popen]]:
    """subprocess.Popen, but no process outlives the test, however that ends."""
    started: list[subprocess.Popen] = []

    def start(*arguments, **options) -> subprocess.Popen:
        started.append(subprocess.Popen(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real Chromium: BROWSER, or one that is found. Install it with `apt-get install chromium`."""
    from playwright import sync_api as playwright  # an error, and no skip, if it is not there: somebody asked for it

    program = os.environ.get("BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no Chromium: apt-get install chromium, or set BROWSER"
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core's script: AXE, the place of axe.min.js, which `npm pack axe-core` fetches."""
    place = os.environ.get("AXE")
    assert place, "set AXE to axe.min.js, from npm pack axe-core"
    return Path(place).read_text(encoding="utf-8")
