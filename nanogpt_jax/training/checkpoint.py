"""Checkpoints through orbax: asynchronous, atomic, the newest and the best kept. The only importer of orbax.

RUN/checkpoints/STEP/ holds three items: `params`, so that sampling restores nothing else; `opt_state`; and `meta`,
JSON with what else a resumption needs. A save writes into a temporary folder that is renamed when it is whole. Before
that it gets the checksums of all its files, which are compared whenever it is read: tensorstore has none for arrays.
"""

import asyncio
import errno
import inspect
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from nanogpt_jax.config import Config, UserError, joined, read_json
from nanogpt_jax.distributed.sharding import shardings
from nanogpt_jax.host import files, messages
from nanogpt_jax.model.gpt2 import Params
from nanogpt_jax.training import checksums
from nanogpt_jax.training import run_dir as runs
from nanogpt_jax.training.run_dir import UNFINISHED, checkpoint_steps
from nanogpt_jax.training.step import TrainState, init_params, init_state, state_shardings

# One failed read or write is one error of ours. Without this, orbax tells it once for every array, and every save as a
# warning; and Python prints a traceback for each of its coroutines that was under way when the first one failed.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
# orbax counts bytes with these at each save, only to log them, and tensorstore (0.1.86) never frees what they return:
# 36 KB a save.
tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


def _without_leftovers(show: Any) -> Any:
    def show_unless_orbax(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    return show_unless_orbax


sys.unraisablehook = _without_leftovers(sys.unraisablehook)

SEALED = "checksums"  # the key in `meta` of a checkpoint that was saved with checksums


class _TemporaryFolder(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """orbax's folder of a save under way, or of one item in it."""

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():  # a step, whose items are final
            if self._checkpoint_metadata_store:
                await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
            done = Path(self.get(), ocp.path.atomicity.COMMIT_SUCCESS_FILE)  # as orbax has it
            await asyncio.to_thread(done.touch)
            await asyncio.to_thread(checksums.write, Path(self.get()))
            await asyncio.to_thread(os.rename, self.get(), self.get_final())
        else:
            await super().finalize()


def _manager(run_dir: Path, keep: int | None) -> ocp.CheckpointManager:
    def score(metrics: dict[str, float]) -> float:
        return -metrics["val_loss"]

    best = policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
    kept = policy.AnyPreservationPolicy([policy.LatestN(keep), best]) if keep else None
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        best_fn=score,  # without it, orbax writes no metrics to disk, and a resumed run has no best
        read_only=keep is None,
        lightweight_initialize=keep is None,  # it reads the losses of all checkpoints otherwise
        cleanup_tmp_directories=keep is not None,
        temporary_path_class=_TemporaryFolder,
        # else, where a folder cannot be made, orbax's threads wait ten minutes for it and keep the process alive
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    folder = run_dir / "checkpoints"
    try:
        return ocp.CheckpointManager(folder.resolve(), options=options)
    except OSError as e:
        raise UserError(f"cannot use {folder}, where checkpoints are kept: {_reason(e)}") from None


class Checkpointer:
    """Saves and restores the state of one run. A context manager: leaving it waits for the save under way."""

    def __init__(self, run_dir: Path, keep: int):
        self._run_dir = run_dir
        steps = checkpoint_steps(run_dir)
        for step in steps:  # orbax reads these at once, and reports one that is damaged by a traceback
            _val_loss(run_dir, step, RESUME)
        self._manager = _manager(run_dir, keep)
        self.latest = steps[-1] if steps else None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._guard(self._manager.close, self.latest)
        except UserError:
            if kind is None:  # else another error is on its way, and this one often follows from the same
                raise

    def save(self, state: TrainState, step: int, meta: dict[str, Any], val_loss: float | None) -> None:
        """Begin to save; returns as soon as the state is copied. A step that is already saved is left as it is.

        The best checkpoint is the one with the least `val_loss`: whatever loss the run measures its success by.
        """
        if step == self.latest:
            return
        self.wait()  # orbax would wait for the save before, too; so its failure is told as that save's
        kept = {"params": state.params, "opt_state": state.opt_state}
        trees = {name: ocp.args.StandardSave(tree) for name, tree in kept.items() if jax.tree.leaves(tree)}
        items = ocp.args.Composite(**trees, meta=ocp.args.JsonSave({**meta, SEALED: True}))
        metrics = None if val_loss is None else {"val_loss": val_loss}
        self._guard(lambda: self._manager.save(step, args=items, metrics=metrics, force=True), step)
        self.latest = step

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        self._guard(self._manager.wait_until_finished, self.latest)
        if self.latest is not None:
            runs.begun(self._run_dir)

    def saved(self) -> list[Path]:
        """The folders of all whole checkpoints, in order, when the save under way is done."""
        self.wait()
        return [self._run_dir / "checkpoints" / str(step) for step in checkpoint_steps(self._run_dir)]

    def _guard(self, call: Any, step: int | None) -> None:
        try:
            call()
        except (OSError, ValueError, RuntimeError) as e:  # tensorstore reports a full disk as a ValueError
            folder = self._run_dir / "checkpoints"
            for begun in folder.glob(f"{step}{UNFINISHED}"):
                shutil.rmtree(begun, ignore_errors=True)
            raise UserError(
                f"could not save step {step} in {folder}; {_last(self._run_dir, step)}\n       {_reason(e)}\n"
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
                params, _ = load_params(first, read_json(first / "config.json"), mesh=mesh, use=START)
            return init_state(cfg, tx, mesh, params), fresh
        _check(self._run_dir, self.latest, RESUME)
        shapes, shardings = state_shardings(cfg, tx, mesh)
        abstract = jax.tree.map(_abstract, shapes, shardings)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
            meta=ocp.args.JsonRestore(),
        )
        restored = _restore(self._manager, self._run_dir, self.latest, items, RESUME)
        _check_finite(self._run_dir, self.latest, restored["params"], RESUME)
        step = jax.device_put(jnp.int32(self.latest), shardings.step)
        meta = {**fresh, **restored["meta"], "step": self.latest}
        return TrainState(step, restored["params"], restored["opt_state"]), meta


def save_params(run_dir: Path, params: Params) -> None:
    """Make a checkpoint at step 0 of parameters alone: to sample from and to start from, not to resume."""
    with Checkpointer(run_dir, keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(0), params, optax.EmptyState()), 0, {"best_val_loss": None}, None)
        checkpoints.wait()


def load_params(
    run_dir: Path, cfg: Config, which: str = "best", mesh: Mesh | None = None, use: str = "read"
) -> tuple[Params, int]:
    """The parameters of a checkpoint, laid out on `mesh` or on one device, and its step. No optimizer, no data needed.

    `which`: "best" by validation loss (the newest where none was measured), "latest", or a step's number.
    `use`: READ, by a command that has --checkpoint; START, by another run that is about to start from them; or the
    command that will read the run which has just ended.
    """
    runs.check_name(run_dir)
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} has no checkpoint yet")
    if which == "latest":
        step = steps[-1]
    elif which == "best":
        losses = {s: _val_loss(run_dir, s, use) for s in reversed(steps)}
        step = min(losses, key=lambda s: losses[s])
    elif which.isdecimal() and int(which) in steps:
        step = int(which)
    else:
        raise UserError(f"{run_dir} has no checkpoint {which}; it has {', '.join(map(str, steps))}, best and latest")
    _check(run_dir, step, use)
    shapes = jax.eval_shape(lambda: init_params(cfg))
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = shardings(mesh, shapes) if mesh else jax.tree.map(lambda _: one_device, shapes)
    abstract = jax.tree.map(_abstract, shapes, layout)
    items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
    with _manager(run_dir, None) as manager:
        params = _restore(manager, run_dir, step, items, use)["params"]
    _check_finite(run_dir, step, params, use)
    return params, step


def _last(run_dir: Path, but: int | None = None) -> str:
    """The last checkpoint in words. `but`: a step whose save has failed."""
    whole = [s for s in checkpoint_steps(run_dir) if s != but]
    return f"the last whole checkpoint is step {whole[-1]}" if whole else "there is no earlier checkpoint"


# ---- what may be wrong with one -------------------------------------------------------------------------------------

RESUME, READ, START = "resume", "read", "start"  # what a checkpoint is wanted for


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / str(step)


def _damage(run_dir: Path, step: int, use: str) -> str:
    """What is wrong with the files of a checkpoint that are needed for `use`; "" if nothing is, or nobody can know."""
    folder = _folder(run_dir, step)
    wrong = checksums.damage(folder, leave_out="" if use == RESUME else "opt_state")
    if not wrong and not checksums.exist(folder) and _meta(folder).get(SEALED):
        return f"{folder / checksums.NAME} is missing"
    return wrong


def _meta(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(files.read(folder / "meta" / "metadata"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check(run_dir: Path, step: int, use: str) -> None:
    """UserError where a checkpoint is damaged. A note where that cannot be told."""
    if wrong := _damage(run_dir, step, use):
        raise _unusable(run_dir, step, use, "is damaged", wrong)
    if not checksums.exist(folder := _folder(run_dir, step)):
        print(f"note: an earlier version saved {folder} without checksums: damage cannot be found", file=sys.stderr)


def _val_loss(run_dir: Path, step: int, use: str) -> float:
    """The validation loss that a checkpoint was saved with; infinite where none was measured."""
    folder = _folder(run_dir, step)
    wrong = checksums.damage(folder, only="metrics")
    path = folder / "metrics" / "metrics"
    try:
        if not wrong:
            return float(json.loads(path.read_bytes())["val_loss"]) if path.exists() else float("inf")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        wrong = f"{path} holds no loss: {_reason(e)}"
    raise _unusable(run_dir, step, use, "is damaged", wrong)


def _check_finite(run_dir: Path, step: int, params: Params, use: str) -> None:
    """UserError where a parameter is not finite: all that is computed with it is of no use."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0 and not np.isfinite(np.asarray(shard.data)).all():
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise _unusable(run_dir, step, use, f"is not finite: there is nan or inf in {name}")


def _restore(manager: ocp.CheckpointManager, run_dir: Path, step: int, items: Any, use: str) -> Any:
    try:
        return manager.restore(step, args=items)
    except Exception as e:  # orbax raises just that where an array cannot be read
        if isinstance(e, MemoryError) or "out of memory" in str(e).lower():
            raise
        folder, reason = _folder(run_dir, step), _reason(e)
        differs = _misfit(manager, step, items["params"].item)
        if checksums.exist(folder) or differs:
            raise UserError(
                f"checkpoint {folder} does not fit the settings in {run_dir / 'config.json'}\n"
                f"       {differs or reason}\n       if that file was changed, bring the old one back"
            ) from None
        raise _unusable(run_dir, step, use, "is damaged or of another model", reason) from None


def _misfit(manager: ocp.CheckpointManager, step: int, wanted: Any) -> str:
    """The first parameter whose shape in a checkpoint is not the one that the settings ask for; "" if none is found."""
    names = {
        jax.tree_util.keystr(k, simple=True, separator="."): v for k, v in jax.tree_util.tree_leaves_with_path(wanted)
    }
    try:
        found = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(manager.item_metadata(step)["params"].tree)
        }
    except Exception:  # damaged, then
        return ""
    for name in names | found:
        ours, theirs = (tuple(x[name].shape) if name in x else "not there" for x in (names, found))
        if ours != theirs:
            return f"{name} is {theirs} in the checkpoint, and {ours} by the settings"
    return ""


def _unusable(run_dir: Path, step: int, use: str, wrong: str, detail: str = "") -> UserError:
    """What to say of a checkpoint that cannot be used: why, and the command that leads on."""
    steps = checkpoint_steps(run_dir)
    bad = [s for s in steps if s == step or _damage(run_dir, s, use)]
    good = [s for s in steps if s not in bad]
    before = max([s for s in good if s < step], default=min(good, default=step))
    delete = joined(["rm", "-r", *(str(_folder(run_dir, s)) for s in bad)])
    if not good and use == RESUME:
        remedy = f"there is no other; start over: {runs.typed(('--resume',), '--overwrite') or '--overwrite'}"
    elif not good:
        remedy = "the run has no other"
    elif use not in (RESUME, READ, START):
        remedy = f"the run itself has ended and is saved; take checkpoint {max(good)}: {use} --checkpoint={max(good)}"
    elif use == READ and len([word for word in sys.argv[1:] if os.path.isdir(f"{word}/checkpoints")]) > 1:
        remedy = f"delete it, and another is taken: {delete}"  # two runs, and --checkpoint would be for both
    elif use == READ and (again := runs.typed(("--checkpoint",), f"--checkpoint={before}")):
        remedy = f"take checkpoint {before} instead: {again}"
    elif use == READ:
        remedy = f"take checkpoint {before} instead"
    else:
        remedy = f"go on from checkpoint {max(good)}: {delete}\n       then give the same command once more"
    what = f"checkpoint {_folder(run_dir, step)} {wrong}"
    return UserError("\n       ".join(filter(None, [what, detail, remedy])))


def _reason(error: BaseException) -> str:
    """The first line of what went wrong in the end. If it is cut, the system's words for it stand before it."""
    while error.__cause__:
        error = error.__cause__
    line, whole = messages.first_line(error), messages.first_line(error, sys.maxsize)
    words = [os.strerror(code) for code in errno.errorcode if os.strerror(code).lower() in str(error).lower()]
    return f"{max(words, key=len)}: {line}" if words and line != whole else line


def _abstract(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
