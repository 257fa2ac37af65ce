"""What every test runs under: a CPU that JAX sees as 8 devices, no network, and repeatable hypothesis examples."""

import os

import pytest
from hypothesis import settings

# All of this must stand in the environment before anything imports jax, which reads it once.
BEFORE = os.environ.get("XLA_FLAGS")
# Tests compile much and compute little: LLVM's lowest level makes the suite a third as long.
QUICK = f"{BEFORE or ''} --xla_backend_optimization_level=0".strip()
os.environ["XLA_FLAGS"] = f"{QUICK} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("repeatable", max_examples=8, deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def clean_env() -> dict[str, str]:
    """An environment for a subprocess, which sees the one device that a user would."""
    return {**os.environ, "XLA_FLAGS": QUICK}
