"""How often would `optim.skip_spikes` have skipped a step of runs that went well?

    python tests/false_skips.py RUN ...

reads the metrics.jsonl of each, which must have every step (--train.log-every 1), and gives the rule of
training/spikes.py their losses and gradient norms in turn, for several z. Steps without 128 before them are not judged.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanogpt_jax import cli
from nanogpt_jax.config import UserError
from nanogpt_jax.run.metrics import read_metrics
from nanogpt_jax.run.opened import existing
from nanogpt_jax.training.spikes import HISTORY, Skipping, skipping

LIMITS = (4.0, 5.0, 6.0, 7.0, 8.0, 10.0)


def series_of(run: Path) -> np.ndarray:
    """[n, 2] float32: loss and gradient norm of every step."""
    rows = [row for row in read_metrics(existing(run) / "metrics.jsonl") if "train/loss" in row]
    if len(rows) < 2:
        raise UserError(f"{run} is no run, or has logged fewer than two steps")
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise UserError(f"{run} has not logged every step\n       train it with --train.log-every 1")
    return np.array([[row["train/loss"], row["grad_norm"]] for row in rows], np.float32)


@jax.jit
def skipped(series: jax.Array, z: jax.Array) -> jax.Array:
    """How many of the steps the rule skips."""
    tx = skipping(optax.with_extra_args_support(optax.identity()), z)

    def step(state: Skipping, its: jax.Array):
        return tx.update({"norm": its[1:]}, state, value=its[0])[1], None  # pyright: ignore[reportArgumentType]

    return jax.lax.scan(step, tx.init({"norm": jnp.zeros(1)}), series)[0].skipped  # pyright: ignore


def main(argv: list[str]) -> int:
    if not argv:
        raise UserError("which runs?\n       python tests/false_skips.py RUN ...")
    runs = [series_of(Path(run)) for run in argv]
    judged = sum(max(0, len(one) - HISTORY) for one in runs)
    if not judged:
        raise UserError(f"no run has more than {HISTORY} steps, and the rule judges only the steps after these")
    print(f"{len(runs)} run{'s'[: len(runs) > 1]} of {sum(map(len, runs)):,} steps, of which {judged:,} are judged")
    for z in LIMITS:
        n = sum(int(skipped(one, jnp.float32(z))) for one in runs)
        print(f"z = {z:>2.0f}: {n} skipped, {n / judged * 1e4:.1f} in 10,000")
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main, sys.argv[1:]))
