"""Three real steps on this machine, and how long a run of them takes."""

import statistics
import sys
import time

from nanogpt_jax.config import UserError
from nanogpt_jax.model import execution
from nanogpt_jax.planning.estimate import Plan

CALLS = 3
LEAST = 1.0  # seconds that are measured at least: steps of milliseconds vary


def step_seconds(p: Plan) -> tuple[float, float]:
    """Seconds of a step: of the first program, and of the one that a long run goes on with (the same, if it has none).

    Medians of three calls, after one that is not counted. The tokens are random.
    """
    import jax
    import numpy as np

    from nanogpt_jax.distributed.mesh import make_mesh, room, start
    from nanogpt_jax.training.compiled import CompiledStep
    from nanogpt_jax.training.language_model import next_token
    from nanogpt_jax.training.optim import make_optimizer
    from nanogpt_jax.training.state import init_state
    from nanogpt_jax.training.step import make_train_step

    platform, mesh = start(), make_mesh(p.cfg.mesh)
    if platform != p.target.kind.platform:
        raise UserError(f"--measure: JAX runs on a {platform.upper()} here; JAX_PLATFORMS=cpu takes the CPU")
    cfg, how = execution.choose(p.cfg, platform, mesh.size, room(mesh))
    tx, task = make_optimizer(cfg.optim, cfg.train.steps), next_token(cfg.model)
    step = make_train_step(cfg, tx, mesh, task, how)
    state = init_state(step.born, cfg.train.seed)
    shape = (how.steps_per_dispatch, cfg.train.batch_size, cfg.model.block_size + 1)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, dtype=np.int32)
    rows = jax.device_put(tokens, step.layout)
    program = CompiledStep(step, state, rows)

    def timed(state):
        taken, most = [], time.monotonic() + LEAST
        state, _ = jax.block_until_ready(program(state, rows, len(rows), step.dials(0)))
        while len(taken) < CALLS or time.monotonic() < most:
            began = time.monotonic()
            state, _ = jax.block_until_ready(program(state, rows, len(rows), step.dials(0)))
            taken.append((time.monotonic() - began) / len(rows))
        return state, statistics.median(taken)

    state, first = timed(state)
    second = first
    left = cfg.train.steps * first - execution.RECOMPILE_AFTER
    if how.recompile and left > execution.RECOMPILE_LEFT:
        print("compiling the second program of the step ...", file=sys.stderr, flush=True)
        program.improve(at_once=True)
        _, second = timed(state)
    return first, second


def run_seconds(p: Plan, first: float, second: float) -> float:
    """Of the run with its evaluations: the second program takes over once it is compiled, early in a long run."""
    early = min(2 * execution.RECOMPILE_AFTER / first, p.cfg.train.steps) if second != first else 0
    return early * first + (p.cfg.train.steps - early + p.evaluations) * second
