"""The training step, compiled for a target: what XLA itself says about its memory, and what it sends between devices.

Ahead of time: no device of the target is needed. It shows that a step lowers and fits, not that it runs or how fast.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_jax.config import UserError
from nanogpt_jax.planning.estimate import Plan
from nanogpt_jax.planning.targets import Target

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


@dataclass(frozen=True)
class Compiled:
    """What XLA made of a step, in bytes a device. If too little memory was there, `temporary` is what it wanted."""

    arguments: int
    temporary: int  # on a TPU, at the peak
    outputs: int  # without those that lie where an argument lay
    sent: dict[str, float]  # kind of collective -> bytes that a device sends in a step

    @property
    def total(self) -> int:
        return self.arguments + self.temporary + self.outputs


def set_up(target: Target) -> None:
    """What JAX must be told before it starts. No accelerator is used, even if there is one."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what comes from the cache does not know its memory
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # libtpu asks the network where it runs, and lets one process at a time use it, if it is not told otherwise
    ours = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in ours.items():
        os.environ.setdefault(name, value)
    if target.kind.platform == "cpu" and target.count > 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={target.count}".strip()


def of_plan(p: Plan, card: Path | None = None) -> Compiled:
    """The step of a plan on its target; `card` describes a GPU in XLA's text format."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from nanogpt_jax.distributed.mesh import AXES
    from nanogpt_jax.distributed.sharding import shard
    from nanogpt_jax.training.language_model import next_token
    from nanogpt_jax.training.optim import make_optimizer
    from nanogpt_jax.training.step import make_train_step

    cfg, used = p.cfg, np.array(_devices(p.target, card)[: p.used]).reshape(p.ways)
    mesh = Mesh(used, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    step = make_train_step(cfg, make_optimizer(cfg.optim, cfg.train.steps), mesh, next_token(cfg.model), p.how)
    shape = (p.how.steps_per_dispatch, cfg.train.batch_size, cfg.model.block_size + 1)
    rows = jax.ShapeDtypeStruct(shape, np.int32, sharding=step.layout)
    number = jax.ShapeDtypeStruct((), np.int32, sharding=shard(mesh))
    try:
        compiled = step.jitted.lower(step.state, rows, number, step.dials(0)).compile()
    except jax.errors.JaxRuntimeError as e:
        if (needed := _refused(str(e))) == 0:
            raise UserError(f"XLA cannot compile this step: {str(e).splitlines()[0][:300]}") from None
        return Compiled(0, needed, 0, {})
    return _read(compiled.memory_analysis(), compiled.as_text(), p.target.kind.platform)


def _read(memory: Any, text: str, platform: str) -> Compiled:
    """XLA's own account of a compiled program.

    On a TPU temp_size_in_bytes counts arrays that are never there together: steps with more of it than there is memory
    compile. peak_memory_in_bytes is the figure by which the compiler refuses, and includes the arguments.
    """
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    if platform == "tpu":
        temporary = memory.peak_memory_in_bytes - arguments - outputs
    return Compiled(arguments, temporary, outputs, sent(text))


def _refused(message: str) -> int:
    """The bytes that XLA wanted when it refused for want of memory; 0 if it was for another reason."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available|Used ([\d.]+)([KMGT]) of", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return 0
    return int(float(found[1] or found[3]) * units[found[2] or found[4]])


def _devices(target: Target, card: Path | None) -> list[Any]:
    import jax
    from jax.experimental import topologies

    kind, platform = target.name.partition(":")[0], target.kind.platform
    if platform == "cpu":
        return jax.devices("cpu")
    if platform == "gpu":
        described = _description(card, target)
        hosts = max(target.count // target.kind.host, 1)
        options = {"topology": f"1x{hosts}x{-(-target.count // hosts)}", "target_config": described}
        name, extra = kind, "jax[cuda13]"
    else:
        shape = target.shape if target.count > 1 else (2, 2)  # a single chip is no topology: the first of four
        if kind == "v5p" and target.count == 1:
            shape = (2, 2, 1)
        options, name, extra = {}, f"{kind}:{'x'.join(map(str, shape))}", "jax[tpu]"
    try:
        return list(
            topologies.get_topology_desc(name, platform={"gpu": "cuda"}.get(platform, platform), **options).devices
        )
    except (RuntimeError, NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as e:
        why = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        raise UserError(
            f"--target={target.name} cannot be compiled for here: {why}\n"
            f"       it needs XLA's compiler for it, without the device: pip install '{extra}'"
        ) from None


# What XLA must know of a card: the numbers that NVIDIA publishes for it and the CUDA runtime reports.
CARD = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
  l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""
CARDS = {
    "a100": {
        "shared": 167936,
        "cores": 108,
        "fpus": 64,
        "cache": 40 * 2**20,
        "clock": 1.41,
        "optin": 166912,
        "major": 8,
    },
    "h100": {
        "shared": 233472,
        "cores": 132,
        "fpus": 128,
        "cache": 50 * 2**20,
        "clock": 1.98,
        "optin": 232448,
        "major": 9,
    },
}
CARDS["h200"] = CARDS["h100"]


def _description(card: Path | None, target: Target) -> str:
    """The description of a card in XLA's text format: from a file, or from the makers' numbers."""
    if card is not None:
        try:
            return card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read --card={card}: {getattr(e, 'strerror', None) or e}") from None
    kind = target.kind
    numbers = CARDS[target.name.partition(":")[0]]
    return CARD.format(**numbers, bandwidth=int(kind.bandwidth), memory=int(kind.memory), name=kind.name)


# ---- what goes between the devices -----------------------------------------------------------------------------------


def sent(text: str) -> dict[str, float]:
    """Kind of collective -> bytes that a device sends in one step, read from compiled HLO.

    A ring of n devices sends (n-1)/n of what an all-gather makes, of what a reduce-scatter takes, and twice that for an
    all-reduce. What stands in a loop counts as often as the loop turns. A TPU's program names a collective in several
    fusions, between which it is under way: its channel counts once.
    """
    bodies = _computations(text)
    times = _times(text, bodies)
    each: dict[tuple[str, str], float] = {}
    for name, lines in bodies.items():
        for line in lines:
            match = re.search(rf"%?(\S+) = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if match is None or name not in times:
                continue
            kind, n = match[3], _group(line)
            made = _bytes(match[2], takes_too=bool(match[4]) and kind != "all-reduce")
            factor = {
                "all-gather": (n - 1) / n,
                "reduce-scatter": n - 1,  # what it makes is 1/n of what it takes
                "all-reduce": 2 * (n - 1) / n,
                "all-to-all": (n - 1) / n,
                "collective-permute": 1,
            }[kind]
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a TPU's fusion of it with a slice
                kind, factor = "reduce-scatter", (n - 1) / n
            channel = re.search(r"channel_id=\d+", line)
            key = (kind, channel[0] if channel else match[1])
            each[key] = max(each.get(key, 0), times[name] * made * factor)
    found = {kind: sum(n for (k, _), n in each.items() if k == kind) for kind in KINDS}
    return {kind: n for kind, n in found.items() if n}


def _computations(text: str) -> dict[str, list[str]]:
    """Each computation of an HLO text by its name."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = begins[1]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def _times(text: str, bodies: dict[str, list[str]]) -> dict[str, float]:
    """How often each computation runs in a step. A loop whose length is not known is taken as one turn."""
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)
    times: dict[str, float] = {}

    def visit(name: str, n: float) -> None:
        times[name] = times.get(name, 0) + n
        for line in bodies.get(name, ()):
            turns = _turns(line, bodies) if " while(" in line else 1
            called = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line)
            for many in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += [one.strip().lstrip("%") for one in many.split(",")]
            for one in called:
                if one in bodies:
                    visit(one, n * turns)

    if entry:
        visit(entry[1], 1)
    return times


def _turns(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop turns: by XLA's note, or else by the constant that its condition compares with."""
    if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = "\n".join(bodies.get(condition[1], ())) if condition else ""
    constants = re.findall(r"s32\[\]\S* constant\((\d+)\)", lines)
    return int(constants[0]) if len(constants) == 1 and "direction=LT" in lines else 1


def _group(line: str) -> int:
    """How many devices a collective joins."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):  # mesh['a'=4,'b'=2] {'a'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 1


def _bytes(shape: str, takes_too: bool = False) -> int:
    """Bytes of an HLO shape like f32[2,3]{1,0}, or of a tuple of them. `takes_too`: its first half are operands."""
    arrays = re.findall(rf"\b({'|'.join(SIZES)})\[([\d,]*)\]", shape)
    sizes = [SIZES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays]
    return sum(sizes[len(sizes) // 2 :] if takes_too else sizes)
