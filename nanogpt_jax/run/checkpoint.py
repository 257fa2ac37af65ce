"""Checkpoints through orbax: asynchronous, atomic, the newest and the best kept. The only importer of orbax.

RUN/checkpoints/STEP/ holds three items: `params`, so that sampling restores nothing else; `opt_state`; and `meta`, JSON
with whatever else a resumption needs. A save writes into a temporary folder, adds the checksums of all its files, and
renames it when it is complete. Reading compares the checksums, because tensorstore has none for arrays. places.py knows
where the folder is if it is elsewhere.
"""

import asyncio
import contextlib
import errno
import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from nanogpt_jax.config import UserError, joined
from nanogpt_jax.config.command_line import typed_again
from nanogpt_jax.distributed import processes
from nanogpt_jax.host import messages
from nanogpt_jax.run import checksums, places
from nanogpt_jax.run import run_dir as runs
from nanogpt_jax.run.bucket import BucketPath
from nanogpt_jax.run.places import Folder, checkpoint_steps

SEALED = "checksums"  # the key in `meta` of a checkpoint that was saved with checksums


@functools.cache
def _quiet_orbax() -> None:
    """Silence orbax, as our errors say it all, and stop a leak of tensorstore's. Once, before the first manager.

    orbax logs a failed read or write once per array, and every save as a warning. Python prints a traceback for each
    coroutine of orbax's that was still running when the first one failed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others
    # orbax calls this at each save only to log byte counts, and each call leaks memory (tensorstore 0.1.86)
    tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


class _TemporaryFolder(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """orbax's temporary folder of a save, or of one item in it. A step's gets checksums before it is renamed."""

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():  # a step, whose items have their final names
            if self._checkpoint_metadata_store:
                await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
            done = Path(self.get(), ocp.path.atomicity.COMMIT_SUCCESS_FILE)  # orbax's own mark
            await asyncio.to_thread(done.touch)
            await asyncio.to_thread(checksums.write, Path(self.get()))
            await asyncio.to_thread(os.rename, self.get(), self.get_final())
        else:
            await super().finalize()


class _CommittedFolder(ocp.path.atomicity.CommitFileTemporaryPath):
    """The same in a bucket, where nothing can be renamed: the checksums, which come last, tell that it is complete."""

    async def finalize(self) -> None:
        await super().finalize()  # writes orbax's own mark
        if (final := self.get_final()).name.isdecimal():
            await asyncio.to_thread(checksums.write, BucketPath(str(final)))


def _manager(run_dir: Path, keep: int | None) -> ocp.CheckpointManager:
    """orbax's manager of a run's checkpoints. It keeps the newest `keep` and the best; None: read only."""
    _quiet_orbax()

    def score(metrics: dict[str, float]) -> float:
        return -metrics["val_loss"]

    best = policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
    kept = policy.AnyPreservationPolicy([policy.LatestN(keep), best]) if keep else None
    folder = places.folder_of(run_dir)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        best_fn=score,  # without it, orbax writes no metrics to disk, and a resumed run has no best
        read_only=keep is None,
        lightweight_initialize=keep is None,  # else it reads the losses of all checkpoints
        cleanup_tmp_directories=keep is not None,
        temporary_path_class=_TemporaryFolder if isinstance(folder, Path) else _CommittedFolder,
        # else, if a folder cannot be created, orbax's threads keep the process alive for ten minutes
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    try:
        return ocp.CheckpointManager(_for_orbax(folder), options=options)
    except _errors_of(folder) as e:
        raise UserError(f"cannot use {folder}, where checkpoints are kept: {_reason(e)}") from None


def _for_orbax(folder: Folder) -> str:
    return str(folder.resolve() if isinstance(folder, Path) else folder)


def _errors_of(folder: Folder) -> tuple[type[Exception], ...]:
    """What orbax raises if it cannot write: tensorstore reports a full disk as a ValueError; a bucket has its own."""
    return (OSError, ValueError, RuntimeError) if isinstance(folder, Path) else (Exception,)


class Checkpointer:
    """Saves and restores the state of one run. A context manager: leaving it waits for a save in progress."""

    def __init__(self, run_dir: Path, keep: int):
        self._run_dir = run_dir
        steps = checkpoint_steps(run_dir)
        with _advice(run_dir, _delete_or_start_over):
            for step in steps:  # orbax's manager reads these too, and raises its own errors for a damaged one
                _val_loss(_folder(run_dir, step))
        self._manager = _manager(run_dir, keep)
        self.latest = steps[-1] if steps else None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._guard(self._manager.close, self.latest)
        except UserError:
            if kind is None:  # else another error is being raised, often with the same cause
                raise

    def save(self, step: int, trees: dict[str, Any], meta: dict[str, Any], val_loss: float | None) -> None:
        """Start a save; returns when the trees are copied. A step that is saved already is not saved again.

        The best checkpoint has the lowest `val_loss`, whatever loss the run measures.
        """
        if step == self.latest:
            return
        self.wait()  # orbax would wait for the previous save too; here, a failure names that save's step
        saved = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items = ocp.args.Composite(**saved, meta=ocp.args.JsonSave({**meta, SEALED: True}))
        metrics = None if val_loss is None else {"val_loss": val_loss}
        self._guard(lambda: self._manager.save(step, args=items, metrics=metrics, force=True), step)
        self.latest = step

    def wait(self) -> None:
        """Block until everything saved is on disk."""
        self._guard(self._manager.wait_until_finished, self.latest)
        if self.latest is not None and processes.is_first():
            runs.delete_replaced(self._run_dir)

    def saved(self) -> list[Folder]:
        """Waits for a save in progress -> the folders of all complete checkpoints, in order."""
        self.wait()
        return [_folder(self._run_dir, step) for step in checkpoint_steps(self._run_dir)]

    def _guard(self, call: Callable[[], object], step: int | None) -> None:
        """Call `call`, a part of saving `step`. If that fails, remove the unfinished save; UserError."""
        folder = places.folder_of(self._run_dir)
        try:
            call()
        except _errors_of(folder) as e:
            if processes.is_first():
                places.remove_unfinished(folder)
            whole = [s for s in checkpoint_steps(self._run_dir) if s != step]
            last = f"the last whole checkpoint is step {whole[-1]}" if whole else "there is no earlier checkpoint"
            raise UserError(
                f"could not save step {step} in {folder}; {last}\n       {_reason(e)}\n"
                "       see to that (a full disk: free some space), then go on with the same command"
            ) from None

    def restore(self, shapes: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The step, the trees and the `meta` of the newest complete checkpoint; None if there is none.

        `shapes`: for each tree its ShapeDtypeStructs, with the shardings to restore to. Those it was saved with may
        differ.
        """
        if self.latest is None:
            return None
        trees = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
        with _advice(self._run_dir, _delete_or_start_over):
            folder = _folder(self._run_dir, self.latest)
            processes.first_alone("the checkpoint's checksums", lambda: _verify(folder), processes.READING)
            items = ocp.args.Composite(**trees, meta=ocp.args.JsonRestore())
            restored = _restore(self._manager, self._run_dir, self.latest, items)
        return self.latest, {name: restored[name] for name in shapes}, restored["meta"]


def save_params(run_dir: Path, params: Any) -> None:
    """Make a checkpoint at step 0 with parameters alone: for sampling and as a start, not for resuming."""
    with Checkpointer(run_dir, keep=1) as checkpoints:
        checkpoints.save(0, {"params": params}, {"best_val_loss": None}, None)
        checkpoints.wait()


def load_params(run_dir: Path, shapes: Any, which: str = "best", command: str = "") -> tuple[Any, int]:
    """The parameters of a checkpoint, and its step. Needs neither an optimizer nor the data.

    `shapes`: ShapeDtypeStructs of all parameters; those without a sharding are put on the first device.
    `which`: "best" by validation loss (the newest if none was measured), "latest", or a step's number.
    UserError if it cannot be used. It names a command that reads another checkpoint: the one that was typed, or
    `command` with --checkpoint, if that has no such flag.
    """
    with _advice(run_dir, functools.partial(_take_another, command), "opt_state"):
        return _load(run_dir, shapes, which)


def load_first_params(run_dir: Path, shapes: Any) -> Any:
    """The best parameters of another run, to start from. As `load_params`, but with other advice in errors."""
    with _advice(run_dir, _delete, "opt_state"):
        return _load(run_dir, shapes, "best")[0]


def load_trees(run_dir: Path, shapes: dict[str, Any], step: int) -> dict[str, Any]:
    """The trees of checkpoint `step`, as `Checkpointer.restore` reads the newest. Nothing is written.

    Damaged if it cannot be used; UserError if it does not fit the run's settings.
    """
    folder = _folder(run_dir, step)
    trees = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
    try:
        _verify(folder)
        with _manager(run_dir, None) as manager:
            restored = _restore(manager, run_dir, step, ocp.args.Composite(**trees))
    except _Unusable as e:
        raise Damaged(str(e)) from None
    return {name: restored[name] for name in shapes}


def _load(run_dir: Path, shapes: Any, which: str) -> tuple[Any, int]:
    runs.check_name(run_dir)
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} has no checkpoint yet")
    if which == "latest":
        step = steps[-1]
    elif which == "best":
        losses = {s: _val_loss(_folder(run_dir, s)) for s in reversed(steps)}
        step = min(losses, key=lambda s: losses[s])
    elif which.isdecimal() and int(which) in steps:
        step = int(which)
    else:
        raise UserError(f"{run_dir} has no checkpoint {which}; it has {', '.join(map(str, steps))}, best and latest")
    folder = _folder(run_dir, step)
    processes.first_alone("the checkpoint's checksums", lambda: _verify(folder, "opt_state"), processes.READING)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda x: x if x.sharding else x.update(sharding=here), shapes)
    with _manager(run_dir, None) as manager:
        restored = _restore(manager, run_dir, step, ocp.args.Composite(params=ocp.args.StandardRestore(shapes)))
    return restored["params"], step


def _folder(run_dir: Path, step: int) -> Folder:
    return places.folder_of(run_dir) / str(step)


# ---- what may be wrong with one -------------------------------------------------------------------------------------


class Damaged(UserError):
    """A checkpoint cannot be used, and another one may do."""


class _Unusable(Exception):
    """The checkpoint in `folder` cannot be used. `_advice` turns this into a UserError that says what to do."""

    def __init__(self, folder: Folder, why: str):
        super().__init__(f"checkpoint {folder} {why}")
        self.step = int(folder.name)


def _val_loss(folder: Folder) -> float:
    """The validation loss of a checkpoint; infinite if none was measured. _Unusable if it is damaged."""
    if wrong := checksums.damage(folder, only="metrics"):
        raise _Unusable(folder, _title(wrong))
    path = folder / "metrics" / "metrics"
    try:
        return float(json.loads(path.read_bytes())["val_loss"]) if path.exists() else float("inf")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise _Unusable(folder, f"is damaged\n       {path} holds no loss: {_reason(e)}") from None


def _verify(folder: Folder, *unread: str) -> None:
    """_Unusable if a checkpoint is damaged; a note if it has no checksums. `unread`: items that are not restored."""
    if wrong := _damage(folder, *unread):
        raise _Unusable(folder, _title(wrong))
    if not checksums.exist(folder):
        print(f"note: an earlier version saved {folder} without checksums: damage cannot be found", file=sys.stderr)


def _title(wrong: str) -> str:
    return f"{'cannot be read' if ' cannot be read: ' in wrong else 'is damaged'}\n       {wrong}"


def _damage(folder: Folder, *unread: str) -> str:
    """What is wrong with the files of a checkpoint, except its loss (see `_val_loss`); "" if nothing is known."""
    wrong = checksums.damage(folder, leave_out=("metrics", *unread))
    if not wrong and not checksums.exist(folder) and _is_sealed(folder):
        return f"{folder / checksums.NAME} is missing"
    return wrong


def _is_sealed(folder: Folder) -> bool:
    """Whether the `meta` of a checkpoint says that it was saved with checksums."""
    try:
        return json.loads((folder / "meta" / "metadata").read_bytes())[SEALED]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _restore(manager: ocp.CheckpointManager, run_dir: Path, step: int, items: Any) -> Any:
    """What orbax reads for `items`. _Unusable if it cannot, or if a parameter is not finite."""
    folder = _folder(run_dir, step)
    try:
        restored = manager.restore(step, args=items)
    except Exception as e:  # orbax raises a bare Exception if an array cannot be read
        if isinstance(e, MemoryError) or "out of memory" in str(e).lower():
            raise
        differs = _misfit(folder, items["params"].item)
        if checksums.exist(folder) or differs:
            raise UserError(
                f"checkpoint {folder} does not fit the settings in {run_dir / 'config.json'}\n"
                f"       {differs or _reason(e)}\n       if that file was changed, bring the old one back"
            ) from None
        raise _Unusable(folder, f"is damaged or of another model\n       {_reason(e)}") from None
    for name, leaf in _by_name(restored["params"]).items():
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0 and not np.isfinite(np.asarray(shard.data)).all():
                raise _Unusable(folder, f"is not finite: there is nan or inf in {name}")
    return restored


def _misfit(folder: Folder, wanted: Any) -> str:
    """The first parameter whose shape in a checkpoint differs from that of the settings, in words; "" if none does."""
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            found = _by_name(reader.metadata(_for_orbax(folder / "params")).item_metadata.tree)
    except Exception:  # it is damaged
        return ""
    wanted = _by_name(wanted)
    for name in wanted | found:
        ours, theirs = (tuple(x[name].shape) if name in x else "not there" for x in (wanted, found))
        if ours != theirs:
            return f"{name} is {theirs} in the checkpoint, and {ours} by the settings"
    return ""


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths: "h.attn.c_attn.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


# ---- what to do then ------------------------------------------------------------------------------------------------

Advice = Callable[[int, list[int], str], str]  # (unusable step, usable steps, command that deletes all others)


@contextlib.contextmanager
def _advice(run_dir: Path, advise: Advice, *unread: str) -> Iterator[None]:
    """Turn _Unusable into a UserError with the reason and a way out. `unread`: as in `_verify`."""

    def is_usable(step: int) -> bool:
        with contextlib.suppress(_Unusable):
            _val_loss(_folder(run_dir, step))
            return not _damage(_folder(run_dir, step), *unread)
        return False

    try:
        yield
    except _Unusable as e:
        steps = checkpoint_steps(run_dir)
        good = [step for step in steps if step != e.step and is_usable(step)]
        remove = ["rm", "-r"] if isinstance(places.folder_of(run_dir), Path) else ["gcloud", "storage", "rm", "-r"]
        delete = joined([*remove, *(str(_folder(run_dir, step)) for step in steps if step not in good)])
        raise UserError(f"{e}\n       {advise(e.step, good, delete)}") from None


def _take_another(command: str, step: int, good: list[int], delete: str) -> str:
    """For a reader of a run. `command`: as in `load_params`."""
    if not good:
        return "the run has no other"
    if command:
        return f"the run itself has ended and is saved; take checkpoint {max(good)}: {command} --checkpoint={max(good)}"
    if len([word for word in sys.argv[1:] if os.path.isdir(f"{word}/checkpoints")]) > 1:
        return f"delete it, and another is taken: {delete}"  # two runs, and --checkpoint would be for both
    before = max([s for s in good if s < step], default=min(good))
    again = typed_again(("--checkpoint",), f"--checkpoint={before}")
    return f"take checkpoint {before} instead" + (again and f": {again}")


def _delete(_: int, good: list[int], delete: str) -> str:
    """For a run that starts from one, and takes the best."""
    if not good:
        return "the run has no other"
    return f"go on from checkpoint {max(good)}: {delete}\n       then give the same command once more"


def _delete_or_start_over(step: int, good: list[int], delete: str) -> str:
    """For a run that goes on from its newest."""
    if not good:
        return f"there is no other; start over: {typed_again(('--resume',), '--overwrite') or '--overwrite'}"
    return _delete(step, good, delete)


def _reason(error: BaseException) -> str:
    """The first line of the innermost error. If it is cut, the system's own message precedes it."""
    while error.__cause__:
        error = error.__cause__
    line, whole = messages.first_line(error), messages.first_line(error, sys.maxsize)
    words = [os.strerror(code) for code in errno.errorcode if os.strerror(code).lower() in str(error).lower()]
    return f"{max(words, key=len)}: {line}" if words and line != whole else line
