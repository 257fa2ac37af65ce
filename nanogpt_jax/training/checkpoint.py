"""Checkpoints through orbax: asynchronous, atomic, the newest and the best kept. The only importer of orbax.

RUN/checkpoints/STEP/ holds three items: `params`, so that sampling restores nothing else; `opt_state`; and `meta`,
JSON with what else a resumption needs. A save writes into a temporary folder that is renamed when it is whole.
"""

import inspect
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from nanogpt_jax.config import Config, UserError, read_json
from nanogpt_jax.distributed.sharding import shardings
from nanogpt_jax.model.gpt2 import Params
from nanogpt_jax.training.run_dir import checkpoint_steps
from nanogpt_jax.training.step import TrainState, init_params, init_state, state_shardings

# One failed read or write is one error of ours. Without this, orbax tells it once for every array, and every save as a
# warning; and Python prints a traceback for each of its coroutines that was under way when the first one failed.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _without_leftovers(show: Any) -> Any:
    def show_unless_orbax(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    return show_unless_orbax


sys.unraisablehook = _without_leftovers(sys.unraisablehook)


def _manager(run_dir: Path, keep: int | None) -> ocp.CheckpointManager:
    def score(metrics: dict[str, float]) -> float:
        return -metrics["val_loss"]

    best = policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
    kept = policy.AnyPreservationPolicy([policy.LatestN(keep), best]) if keep else None
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        best_fn=score,  # without it, orbax writes no metrics to disk, and a resumed run has no best
        read_only=keep is None,
        cleanup_tmp_directories=keep is not None,
        # else, where a folder cannot be made, orbax's threads wait ten minutes for it and keep the process alive
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    folder = run_dir / "checkpoints"
    for step in checkpoint_steps(run_dir):  # orbax reads these at once, and reports one that is damaged by a traceback
        path = folder / str(step) / "metrics" / "metrics"
        try:
            json.loads(path.read_text(encoding="utf-8") if path.exists() else "{}")
        except (OSError, ValueError) as e:
            raise _damaged(run_dir, step, e) from None
    return ocp.CheckpointManager(folder.resolve(), options=options)


class Checkpointer:
    """Saves and restores the state of one run. A context manager: leaving it waits for the save under way."""

    def __init__(self, run_dir: Path, keep: int):
        self._run_dir = run_dir
        self._manager = _manager(run_dir, keep)
        steps = checkpoint_steps(run_dir)
        self.latest = steps[-1] if steps else None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: TrainState, step: int, meta: dict[str, Any], val_loss: float | None) -> None:
        """Begin to save; returns as soon as the state is copied. A step that is already saved is left as it is.

        The best checkpoint is the one with the least `val_loss`: whatever loss the run measures its success by.
        """
        if step == self.latest:
            return
        self.wait()  # orbax would wait for the save before, too; so its failure is told as that save's
        kept = {"params": state.params, "opt_state": state.opt_state}
        trees = {name: ocp.args.StandardSave(tree) for name, tree in kept.items() if jax.tree.leaves(tree)}
        items = ocp.args.Composite(**trees, meta=ocp.args.JsonSave(meta))
        metrics = None if val_loss is None else {"val_loss": val_loss}
        self._guard(lambda: self._manager.save(step, args=items, metrics=metrics, force=True), step)
        self.latest = step

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        self._guard(self._manager.wait_until_finished, self.latest)

    def saved(self) -> list[Path]:
        """The folders of all whole checkpoints, in order, when the save under way is done."""
        self.wait()
        return [self._run_dir / "checkpoints" / str(step) for step in checkpoint_steps(self._run_dir)]

    def _guard(self, call: Any, step: int | None) -> None:
        try:
            call()
        except (OSError, ValueError, RuntimeError) as e:  # tensorstore reports a full disk as a ValueError
            whole = [s for s in checkpoint_steps(self._run_dir) if s != step]
            last = f"the last whole checkpoint is step {whole[-1]}" if whole else "there is no earlier checkpoint"
            folder = self._run_dir / "checkpoints"
            raise UserError(
                f"could not save step {step} in {folder}; {last}\n       {_reason(e)}\n"
                "       see to that (a full disk: free some space), then go on with the same command"
            ) from None

    def resume(self, cfg: Config, tx: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
        """The state of the newest whole checkpoint, laid out on `mesh` whatever it was saved on; else a fresh one.

        A fresh one has the best weights of the run train.init_from, if one is named: read now, and never again.
        With it what else resuming needs: {"step": int, "best_val_loss": float or None, "stale": evaluations since}.
        """
        fresh = {"step": 0, "best_val_loss": None, "stale": 0}
        if self.latest is None:
            first, params = Path(cfg.train.init_from), None
            if cfg.train.init_from != "scratch":
                params, _ = load_params(first, read_json(first / "config.json"), mesh=mesh)
            return init_state(cfg, tx, mesh, params), fresh
        shapes, shardings = state_shardings(cfg, tx, mesh)
        abstract = jax.tree.map(_abstract, shapes, shardings)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
            meta=ocp.args.JsonRestore(),
        )
        restored = _restore(self._manager, self._run_dir, self.latest, items)
        step = jax.device_put(jnp.int32(self.latest), shardings.step)
        meta = {**fresh, **restored["meta"], "step": self.latest}
        return TrainState(step, restored["params"], restored["opt_state"]), meta


def _reason(error: BaseException) -> str:
    """The first line of what went wrong in the end, 200 characters of it."""
    while error.__cause__:
        error = error.__cause__
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:197]}..."


def _abstract(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _restore(manager: ocp.CheckpointManager, run_dir: Path, step: int, items: Any) -> Any:
    try:
        return manager.restore(step, args=items)
    except Exception as e:  # orbax raises just that where an array cannot be read
        raise _damaged(run_dir, step, e) from None


def _damaged(run_dir: Path, step: int, error: Exception) -> UserError:
    before = [s for s in checkpoint_steps(run_dir) if s < step]
    remedy = (
        f"delete that folder, and checkpoint {before[-1]} is tried"
        if before
        else "there is none before it; --overwrite starts over"
    )
    return UserError(
        f"checkpoint {run_dir / 'checkpoints' / str(step)} is damaged or of another model\n"
        f"       {_reason(error)}\n       {remedy}"
    )


def save_params(run_dir: Path, params: Params) -> None:
    """Make a checkpoint at step 0 of parameters alone: to sample from and to start from, not to resume."""
    with Checkpointer(run_dir, keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(0), params, optax.EmptyState()), 0, {"best_val_loss": None}, None)
        checkpoints.wait()


def load_params(run_dir: Path, cfg: Config, which: str = "best", mesh: Mesh | None = None) -> tuple[Params, int]:
    """The parameters of a checkpoint, laid out on `mesh` or on one device, and its step. No optimizer, no data needed.

    `which`: "best" by validation loss (the newest where none was measured), "latest", or a step's number.
    """
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} has no checkpoint yet")
    with _manager(run_dir, None) as manager:
        if which == "latest":
            step = steps[-1]
        elif which == "best":
            losses = {s: (manager.metrics(s) or {}).get("val_loss", float("inf")) for s in reversed(steps)}
            step = min(losses, key=lambda s: losses[s])
        elif which.isdecimal() and int(which) in steps:
            step = int(which)
        else:
            raise UserError(
                f"{run_dir} has no checkpoint {which}; it has {', '.join(map(str, steps))}, best and latest"
            )
        shapes = jax.eval_shape(lambda: init_params(cfg))
        one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        layout = shardings(mesh, shapes) if mesh else jax.tree.map(lambda _: one_device, shapes)
        abstract = jax.tree.map(_abstract, shapes, layout)
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return _restore(manager, run_dir, step, items)["params"], step
