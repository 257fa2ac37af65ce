"""Processes, devices, and the one mesh over them."""

import math
from typing import TYPE_CHECKING

import numpy as np

from nanogpt_jax.config import MeshConfig, UserError
from nanogpt_jax.host import memory

if TYPE_CHECKING:
    from jax.sharding import Mesh

AXES = ("data", "fsdp", "tensor")


def start() -> str:
    """Start JAX's devices -> "cpu", "gpu" or "tpu".

    On a CPU, programs then run in the calling thread. Else each token of generation would wait until a thread of JAX's
    wakes up.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # not read from the environment
    try:
        platform = jax.default_backend()
    except (AssertionError, RuntimeError) as e:  # JAX's, if the user has named a platform that is not there
        raise UserError(
            f"JAX cannot start on JAX_PLATFORMS={jax.config.jax_platforms}{f': {e}' if str(e) else ''}\n"  # pyright: ignore
            "       unset it, and JAX takes the best there is; for an NVIDIA GPU: pip install -e '.[cuda]'"
        ) from None
    if platform == "cpu":
        memory.hold_freed_memory()
    return platform


def make_mesh(cfg: MeshConfig) -> "Mesh":
    """The mesh ("data", "fsdp", "tensor") over the first devices that are visible.

    UserError if the sizes do not fit the devices.
    """
    import jax
    from jax.sharding import AxisType, Mesh

    sizes = [getattr(cfg, axis) for axis in AXES]
    devices = jax.devices()
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [max(len(devices) // fixed, 1) if size == -1 else size for size in sizes]
    needed = math.prod(sizes)
    shape = " ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if needed > len(devices):
        simulate = f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        raise UserError(
            f"mesh {shape} needs {needed} devices, but only {len(devices)} are visible\n"
            f"       make an axis of it smaller (-1 takes what is there); to simulate devices on a CPU: {simulate}"
        )
    if jax.process_count() > 1 and needed != len(devices):
        raise UserError(
            f"mesh {shape} uses {needed} of {len(devices)} devices; with many processes it must use all\n"
            "       --mesh.data -1 takes all that the other axes leave"
        )
    return Mesh(np.array(devices[:needed]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_ways(mesh: "Mesh") -> int:
    """Number of parts into which a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def room(mesh: "Mesh") -> float:
    """Bytes that a program can have on each device of the mesh that is here.

    A CPU's devices share what is left for arrays, as if all were on this machine; else it is what JAX may take.
    """
    mine = mesh.local_devices
    if mine[0].platform == "cpu":
        return memory.left_for_arrays() / mesh.size
    told = [device.memory_stats() or {} for device in mine]
    return min(stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0) for stats in told)


def common_room(mesh: "Mesh") -> float:
    """The least `room` of all processes, which meet here: so they choose the same micro-batch."""
    from nanogpt_jax.distributed import processes

    return min(processes.meet("free memory", room(mesh)))
