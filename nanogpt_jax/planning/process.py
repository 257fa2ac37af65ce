"""The memory of the whole process on one CPU: more than its steps take."""

from nanogpt_jax.config import Config
from nanogpt_jax.host.memory import PROCESS
from nanogpt_jax.model.execution import Execution
from nanogpt_jax.model.memory import SAVING, Step

COMPILING = 190 * 2**20  # bytes that compiling the first program takes, and frees before the first step
SECOND = 6.5  # bytes of compiling the second program per (line of it)²: measured, 5.9 to 6.6


def peak(step: Step) -> int:
    """Bytes of a process that trains and saves, without compiling a second program.

    A checkpoint is written beside the next steps.
    """
    return PROCESS + max(step.total + round(SAVING * step.state), COMPILING)


def of_second_program(cfg: Config, how: Execution, positions: int) -> int:
    """Bytes that compiling the second program takes, by its length. `positions`: those of a block of attention."""
    m = cfg.model
    spans = -(-m.block_size // positions) if how.attention == "blocked" else 0
    block = (100 + 400 * spans if spans else 750) + 326 * m.bias + 176 * (m.dtype == "bfloat16")
    turns = 1 if m.scan_unroll < m.n_layer else m.n_layer
    lines = 1700 + 1600 * (cfg.optim.name == "muon") + (2 if how.halves else 1) * (1110 + turns * block)
    lines += 2280 * turns * (m.dropout > 0) + 700 * (how.micro_batch < cfg.train.batch_size)
    return round(SECOND * lines**2)
