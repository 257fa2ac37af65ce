"""How a model is computed on this machine: decided here, once, for training, sampling and evaluation.

Nothing here changes what is computed, except its rounding. An explicit setting is never overridden.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

from nanogpt_jax.config import Config, MeshConfig, ModelConfig, UserError
from nanogpt_jax.config.settings import Settings
from nanogpt_jax.model import memory, sizes
from nanogpt_jax.model.memory import Ways

# ---- every tuned number. Measured in November 2026 on 2 cores of an AMD EPYC (AVX2), or on an H100 if that is named.
# ---- kernels/README.md says what each gains, and what else was tried.

BLOCKED_FROM = 256  # positions. Below, attention's scores fit into the cache, and skipping masked ones gains little
BLOCKS = ((512, 64), (1024, 128))  # (below so many positions, queries in a block of attention)
LONGEST_BLOCK = 256  # queries, for longer contexts: shorter blocks make a longer program
PRODUCT_PIECES = 8  # a matrix-vector product is cut into so many; 16 are as fast, 4 are slower
SMALL_STEP = 40e9  # FLOPs. Below, the overhead of a call is noticeable
STEPS_IN_A_CALL = {"cpu": 8, "gpu": 32}  # small steps; the 32 was measured on the H100
HALVED_BELOW = 400e9  # FLOPs of a step. Above, single products keep two cores busy
RECOMPILE_AFTER, RECOMPILE_LEFT = 10, 60  # least seconds that have passed, and that remain: compiling takes 3 to 25
RECOMPILE_TEMPORARY = 2**30  # bytes of a step's temporary memory; above, recompiling gains 1 %
RECOMPILE_COST = 8  # bytes of memory per (line of the program)²: 6.2 to 8.5 for 6,000 to 31,000 lines
RECOMPILE_TOLD = 2e9  # bytes. From here on, a note announces that memory before it is allocated
RECOMPILE_SHARE = 1 / 3  # share of the free memory that compiling may take
NATIVE_TEXTS = 15  # most texts at once in the C step. With more, arithmetic dominates, and XLA is as fast
NATIVE_FROM = 4_000_000  # parameters. The C step is 0.8 to 1.0 times as fast at 0.8 million, 1.9 at 10.7, 1.4 at 124
CORE_FLOPS = 50e9  # FLOP/s of a core with AVX2 in large products, at best: for a note before a slow run


def block_length(T: int) -> int:
    """Queries in a block of blocked attention. Smaller ones waste less work on the diagonal, in a longer program."""
    return next((block for below, block in BLOCKS if below > T), LONGEST_BLOCK)


@dataclass(frozen=True)
class Execution:
    """The decisions. --print-config shows them; the step, the loop and generation follow them."""

    attention: str  # a key of attention.BACKENDS
    scan_unroll: int  # layers in one turn of the loop over them
    steps_per_dispatch: int  # training steps in one call to the device
    halves: bool  # compute gradients of the two halves of a batch side by side
    recompile: bool  # in a long run, compile the step a second time, to a faster program
    decode: str  # native: generation steps run in C if a compiler is found; xla
    micro_batch: int  # sequences at a time; with train.micro_batch=-1, the most that fit


def choose(cfg: Settings, platform: str, devices: int = 1, room: float = 0) -> tuple[Settings, Execution]:
    """`cfg`, its model and micro-batch resolved, and how it runs on `devices` of a platform, "cpu", "gpu" or "tpu".

    `room`: the bytes that a step can have on a device, which train.micro_batch=-1 fills. UserError if it cannot run.
    """
    cfg = dataclasses.replace(cfg, model=resolve(cfg.model, platform))
    if cfg.train.micro_batch == -1:
        ways = ways_of(cfg.mesh, devices)
        largest = largest_micro_batch(cfg, platform, ways, room)
        if not largest:
            least = with_micro_batch(cfg, micro_batches(cfg, ways)[-1])
            needs = memory.needed(least, decide(least, platform, ways), platform, ways)
            raise UserError(
                f"train.micro_batch=-1: nothing fits: {least.train.micro_batch} at a time need {needs / 2**30:.1f} GiB "
                f"a device, and {room / 2**30:.1f} are there\n"
                "       try model.remat=block, a shorter model.block_size or a smaller model, or more devices with "
                "mesh.fsdp; or give train.micro_batch a number"
            )
        cfg = with_micro_batch(cfg, largest)
    return cfg, decide(cfg, platform, ways_of(cfg.mesh, devices))


def decide(cfg: Config, platform: str, ways: Ways = (1, 1, 1)) -> Execution:
    """How `cfg`, its model and micro-batch resolved, runs on a mesh."""
    model, t = cfg.model, cfg.train
    flops, one_cpu = sizes.product_flops(cfg), platform == "cpu" and math.prod(ways) == 1
    whole = t.micro_batch in (0, t.batch_size) and not model.dropout
    return Execution(
        attention=model.attention,
        scan_unroll=model.scan_unroll,
        steps_per_dispatch=t.steps_per_dispatch or (STEPS_IN_A_CALL.get(platform, 1) if flops < SMALL_STEP else 1),
        halves=one_cpu and whole and t.batch_size % 2 == 0 and flops < HALVED_BELOW,
        recompile=one_cpu and t.recompile == "auto",
        decode=model.decode,
        micro_batch=t.micro_batch or t.batch_size,
    )


def ways_of(mesh: MeshConfig, devices: int) -> Ways:
    """The sizes of a mesh over so many devices, with -1 replaced by what the other axes leave."""
    axes = (mesh.data, mesh.fsdp, mesh.tensor)
    rest = max(devices // math.prod(size for size in axes if size != -1), 1)
    data, fsdp, tensor = (rest if size == -1 else size for size in axes)
    return data, fsdp, tensor


def micro_batches(cfg: Config, ways: Ways) -> list[int]:
    """Every micro-batch that divides the batch and that the mesh can split, the largest first."""
    split, B = ways[0] * ways[1], cfg.train.batch_size
    return [n for n in range(B, 0, -1) if B % n == 0 and n % split == 0]


def with_micro_batch(cfg: Settings, n: int) -> Settings:
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch=n))


def largest_micro_batch(cfg: Config, platform: str, ways: Ways, room: float) -> int:
    """The largest micro-batch for which `room` bytes on each device are enough, by the closed form; or 0."""
    for n in micro_batches(cfg, ways):
        tried = with_micro_batch(cfg, n)
        if memory.needed(tried, decide(tried, platform, ways), platform, ways) <= room:
            return n
    return 0


def resolve(cfg: ModelConfig, platform: str) -> ModelConfig:
    """`cfg` with "auto" and 0 replaced by the choice for this platform."""
    # a scan compiles faster, unrolled layers run faster
    unroll = cfg.scan_unroll or (1 if platform == "tpu" else cfg.n_layer)
    decode = cfg.decode
    if decode == "auto":
        wins = platform == "cpu" and cfg.dtype == "float32" and sizes.n_params(cfg) >= NATIVE_FROM
        decode = "native" if wins else "xla"
    return dataclasses.replace(cfg, attention=_attention(cfg, platform), scan_unroll=unroll, decode=decode)


def _attention(cfg: ModelConfig, platform: str) -> str:
    """The back-end for model.attention. cuDNN's needs a recent NVIDIA card, so a small case is tried first."""
    needs = {"cudnn": "gpu", "splash": "tpu"}
    if needs.get(cfg.attention, platform) != platform:
        raise UserError(
            f"model.attention={cfg.attention} needs a {needs[cfg.attention].upper()}, and this is a "
            f"{platform.upper()}; use auto, reference, blocked or xla"
        )
    if cfg.attention != "auto":
        return cfg.attention
    if platform == "cpu":
        return "blocked" if cfg.block_size >= BLOCKED_FROM else "reference"
    if cfg.dropout:
        return "reference"
    if platform == "tpu":
        return "xla" if cfg.block_size % 128 else "splash"
    return "cudnn" if cfg.dtype == "bfloat16" and _cudnn_runs(cfg.head_dim) else "xla"


@functools.cache
def _cudnn_runs(head_dim: int) -> bool:
    import jax
    import jax.numpy as jnp

    def attend(x: jax.Array) -> jax.Array:
        y = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
        return y.sum().astype(jnp.float32)

    try:
        jax.block_until_ready(jax.jit(jax.grad(attend))(jnp.zeros((1, 64, 1, head_dim), jnp.bfloat16)))
    except (RuntimeError, ValueError, NotImplementedError):  # no cuDNN, an old card, an odd head size
        return False
    return True
