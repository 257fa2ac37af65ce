"""How a model is computed on this machine: decided here, once, for training, sampling and evaluation.

Nothing here changes what is computed, except its rounding. A setting that leaves no choice is taken as it is.
"""

import dataclasses
import functools
from dataclasses import dataclass

from nanogpt_jax.config import Config, ModelConfig, UserError
from nanogpt_jax.model import sizes

# ---- every tuned number. Measured in November 2026 on 2 cores of an AMD EPYC (AVX2), "H100" on one of those. What they
# ---- gain, and what else was tried, is in kernels/README.md.

BLOCKED_FROM = 256  # positions. Below, attention's scores fit into the cache, and the mask spares little
BLOCKS = ((512, 64), (1024, 128))  # (below so many positions, queries in a block of attention)
LONGEST_BLOCK = 256  # queries, from there on: a shorter block makes a longer program
PRODUCT_PIECES = 8  # of a matrix that is read for one row; 16 are as good, 4 are not
SMALL_STEP = 40e9  # FLOPs. Below, a call costs something beside its step
STEPS_IN_A_CALL = {"cpu": 8, "gpu": 32}  # of small steps; 32 on the H100
HALVED_BELOW = 400e9  # FLOPs of a step. Above, its products fill two cores by themselves
RECOMPILE_AFTER, RECOMPILE_LEFT = 10, 60  # seconds that a run has taken, and that are left: compiling takes 3 to 25
RECOMPILE_TEMPORARY = 2**30  # bytes of a step's temporary memory; above, recompiling gains 1 %
RECOMPILE_COST = 8  # bytes that compiling takes for a program's lines, squared: 6.2 to 8.5 from 6,000 to 31,000 lines
RECOMPILE_SHARE = 1 / 3  # of the free memory that it may take
NATIVE_TEXTS = 15  # texts at once in the C step. For more it is all arithmetic, and XLA's products are as fast
NATIVE_FROM = 4_000_000  # parameters. The C step gave 0.8 to 1.0 at 0.8 million, 1.9 at 10.7 and 1.4 at 124
CORE_FLOPS = 50e9  # a second, of a core with AVX2 in large products on a good day: for a note before a slow run


@dataclass(frozen=True)
class Execution:
    """What was decided, for --print-config and for the step, the loop and generation to read."""

    attention: str  # a key of attention.BACKENDS
    scan_unroll: int  # layers in one turn of the loop over them
    steps_per_dispatch: int  # training steps in one call to the device
    halves: bool  # the gradients are those of two halves of the batch, side by side
    recompile: bool  # a long run compiles its step a second time, to a quicker program
    decode: str  # native: a step of generation is a C function, if a compiler is found; xla


def choose(cfg: Config, platform: str, devices: int = 1) -> Execution:
    """How `cfg` runs on `devices` of a platform, "cpu", "gpu" or "tpu". UserError for what cannot run there."""
    model, t = resolve(cfg.model, platform), cfg.train
    flops, one_cpu = sizes.product_flops(cfg), platform == "cpu" and devices == 1
    whole = t.micro_batch in (0, t.batch_size) and not cfg.model.dropout
    return Execution(
        attention=model.attention,
        scan_unroll=model.scan_unroll,
        steps_per_dispatch=t.steps_per_dispatch or (STEPS_IN_A_CALL.get(platform, 1) if flops < SMALL_STEP else 1),
        halves=one_cpu and whole and t.batch_size % 2 == 0 and flops < HALVED_BELOW,
        recompile=one_cpu and t.recompile == "auto",
        decode=model.decode,
    )


def resolve(cfg: ModelConfig, platform: str) -> ModelConfig:
    """`cfg` with what it leaves to choose ("auto", 0) chosen for a platform."""
    # a scan compiles and starts sooner; unrolled, a step of 124M is 1.07 times as fast on a CPU, and 1.22 on an H100
    unroll = cfg.scan_unroll or (1 if platform == "tpu" else cfg.n_layer)
    decode = cfg.decode
    if decode == "auto":
        wins = platform == "cpu" and cfg.dtype == "float32" and sizes.n_params(cfg) >= NATIVE_FROM
        decode = "native" if wins else "xla"
    return dataclasses.replace(cfg, attention=_attention(cfg, platform), scan_unroll=unroll, decode=decode)


def _attention(cfg: ModelConfig, platform: str) -> str:
    """The back-end that model.attention means. cuDNN's needs a recent NVIDIA card, so it is tried on a small case."""
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
