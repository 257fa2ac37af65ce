"""Devices that a run can be planned for: how much memory they have, how fast they compute and how fast they talk."""

import math
import os
import re
from dataclasses import dataclass

from nanogpt_jax.config import UserError, suggestion
from nanogpt_jax.host import memory, runtime

GIB = 2**30


@dataclass(frozen=True)
class Kind:
    """A kind of device. Rates are the makers' peaks; `usable` is what XLA lets a program have."""

    name: str  # in words
    platform: str  # "cpu", "gpu" or "tpu", as JAX says
    memory: float  # bytes of a device
    usable: float  # share of it that a program can have
    flops: dict[str, float]  # model.dtype -> FLOP/s of products at JAX's default precision
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s out of a device around a ring of its neighbours; of a TPU's torus, one axis
    host: int  # devices that such links join; 0: all of them
    network: float  # bytes/s out of a device to other hosts, each over a link of its own
    utilisation: tuple[float, float]  # share of `flops` that a run may reach, from and to
    source: str


# JAX gives a GPU's program 0.75 of its memory, if XLA_PYTHON_CLIENT_MEM_FRACTION does not say otherwise.
# The memory of TPUs is what XLA's own compiler says is available. As of November 2026.
# An H100 ran `gpt2` at 488,000 tokens/s: 0.42 of its peak. What a TPU reaches with this code was never measured.
KINDS = {
    "a100": Kind(
        *("NVIDIA A100 80GB SXM", "gpu", 79.3 * GIB, 0.75, {"bfloat16": 312e12, "float32": 156e12}, 2.04e12),
        *(300e9, 8, 25e9, (0.25, 0.45), "NVIDIA A100 datasheet; float32 is TF32; NVLink 600 GB/s, both ways; 200 Gb/s"),
    ),
    "h100": Kind(
        *("NVIDIA H100 80GB SXM", "gpu", 84978434048, 0.75, {"bfloat16": 989e12, "float32": 494e12}, 3.35e12),
        *(450e9, 8, 50e9, (0.25, 0.45), "NVIDIA H100 datasheet; float32 is TF32; NVLink 900 GB/s, both ways; 400 Gb/s"),
    ),
    "h200": Kind(
        *("NVIDIA H200 141GB SXM", "gpu", 139.8 * GIB, 0.75, {"bfloat16": 989e12, "float32": 494e12}, 4.8e12),
        *(450e9, 8, 50e9, (0.25, 0.45), "NVIDIA H200 datasheet; float32 is TF32; NVLink 900 GB/s, both ways; 400 Gb/s"),
    ),
    "v5e": Kind(
        *("TPU v5e", "tpu", 15.75 * GIB, 1.0, {"bfloat16": 197e12, "float32": 197e12}, 819e9),
        *(100e9, 0, 100e9, (0.2, 0.5), "Google Cloud, TPU v5e; links: 400 GB/s a chip, both ways and both axes"),
    ),
    "v5p": Kind(
        *("TPU v5p", "tpu", 95.74 * GIB, 1.0, {"bfloat16": 459e12, "float32": 459e12}, 2.765e12),
        *(200e9, 0, 200e9, (0.2, 0.5), "Google Cloud, TPU v5p; links: 1,200 GB/s a chip, both ways and three axes"),
    ),
    "v6e": Kind(
        *("TPU v6e", "tpu", 31.25 * GIB, 1.0, {"bfloat16": 918e12, "float32": 918e12}, 1.64e12),
        *(200e9, 0, 200e9, (0.2, 0.5), "Google Cloud, TPU v6e; links: 800 GB/s a chip, both ways and both axes"),
    ),
}
EXAMPLES = ("cpu:8", "h100:8", "v5e:4x4", "v6e:4x4")
SLOWEST, FASTEST = 15e9, 75e9  # FLOP/s of a CPU's core: small models on a busy machine, large products on a free one


@dataclass(frozen=True)
class Target:
    """Devices of one kind. `shape` is the topology of a TPU."""

    name: str  # as typed: "v5e:4x4"
    kind: Kind
    count: int
    shape: tuple[int, ...] = ()

    @property
    def room(self) -> float:
        """Bytes that the program of a step may have on a device."""
        share = self.kind.usable
        if self.kind.platform == "gpu":
            share = _fraction(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ""), share)
        return self.kind.memory * share

    def speed(self, dtype: str) -> tuple[float, float]:
        """FLOP/s of a device, from and to."""
        low, high = self.kind.utilisation
        peak = self.kind.flops[dtype]
        return low * peak, high * peak


def _fraction(text: str, otherwise: float) -> float:
    try:
        return float(text)
    except ValueError:
        return otherwise


def here(count: int = 1) -> Kind:
    """This machine's CPU as one of `count` devices that share its memory and its cores."""
    cores = runtime.cores()
    peak = cores * FASTEST / count
    return Kind(
        *(f"a CPU of {cores} cores", "cpu", memory.left_for_arrays() / count, 1.0, {"float32": peak, "bfloat16": peak}),
        *(10e9 / count, 10e9 / count, 0, 10e9 / count, (SLOWEST / FASTEST, 1.0)),
        "this machine: the memory that is free now; 10 GB/s is assumed",
    )


def find(name: str) -> Target:
    """The target that `name` names: "cpu", "h100:8", "v5e:4x4". UserError if there is none."""
    kind, colon, rest = name.partition(":")
    if kind != "cpu" and kind not in KINDS:
        near = suggestion(kind, ("cpu", *KINDS))
        raise UserError(f"--target={name}: there is no {kind or 'device'} here; known: cpu, {', '.join(KINDS)}{near}")
    is_tpu = kind != "cpu" and KINDS[kind].platform == "tpu"
    axes = 3 if kind == "v5p" else 2
    sizes = "x".join(["4"] * 2 + ["1"] * (axes - 2))
    what = f"a topology like {kind}:{sizes}" if is_tpu else f"a number of devices like {kind}:8"
    if colon and not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", rest):
        raise UserError(f"--target={name} must be {kind}, or {what}")
    shape = tuple(map(int, rest.split("x"))) if rest else (1,)
    if is_tpu and colon and len(shape) != axes and shape != (1,):
        raise UserError(f"--target={name} must be {kind} for one device, or {what}{_near(kind, shape, axes)}")
    if not is_tpu and len(shape) > 1:
        raise UserError(f"--target={name} must be {kind}, or {what}\n       did you mean {kind}:{math.prod(shape)}?")
    count = math.prod(shape)
    if count > 4096:
        raise UserError(f"--target={name} has {count} devices; plans are made for up to 4096")
    return Target(name, here(count) if kind == "cpu" else KINDS[kind], count, shape if is_tpu else ())


def _near(kind: str, shape: tuple[int, ...], axes: int) -> str:
    """A topology with as many devices."""
    n = math.prod(shape)
    side = next(s for s in range(math.isqrt(n), 0, -1) if n % s == 0)
    return f"\n       did you mean {kind}:{side}x{n // side}{'x1' * (axes - 2)}?"
