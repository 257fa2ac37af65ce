"""What every test runs under: a CPU that JAX sees as 8 devices, no network, and repeatable hypothesis examples."""

import os

import pytest
from hypothesis import settings

# All of this must stand in the environment before anything imports jax, which reads it once.
BEFORE = os.environ.get("XLA_FLAGS")
# Tests compile much and compute little: LLVM's lowest level makes the suite a third as long. Users' processes, and the
# subprocesses that stand for them, keep the highest.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{BEFORE or ''} {FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("repeatable", max_examples=8, deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def clean_env() -> dict[str, str]:
    """An environment for a subprocess, which sees the devices that a user would: XLA_FLAGS as they were."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return env if BEFORE is None else env | {"XLA_FLAGS": BEFORE}
