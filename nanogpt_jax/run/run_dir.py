"""The run directory: what it holds, and whether a command may write there.

    RUN/config.json   the settings          RUN/checkpoints/STEP/   orbax, but see places.py
    RUN/data.json     the data's manifest   RUN/tokenizer/          so that sampling needs no data
    RUN/origin.json   see origin.py         RUN/*.html              the pages of `attend` and `report`
    RUN/metrics.jsonl one line a log        RUN/lock                held while a process trains here
    RUN/import.json   where an imported model came from; it has no data and is not trained further in place

A run that is started over is moved to RUN/.overwritten until the new one has begun: until its first line of metrics or
its first checkpoint. A start that fails earlier moves it back. If it is killed, the next start does.

A run that must not be touched is refused before XLA starts: nothing here imports jax earlier.
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import filelock

from nanogpt_jax import config
from nanogpt_jax.config import Command, Config, UserError, command_again, parse
from nanogpt_jax.config.command_line import typed_again
from nanogpt_jax.config.settings import differences, types_of
from nanogpt_jax.data import tokenizer
from nanogpt_jax.data.tokenizer import Tokenizer
from nanogpt_jax.distributed import processes
from nanogpt_jax.host import files
from nanogpt_jax.run import origin, places
from nanogpt_jax.run.places import checkpoint_steps
from nanogpt_jax.run.plan import execution_here

WRITTEN_FOLDERS = ("checkpoints", "tokenizer", "tensorboard", "wandb")
PAGES = ATTENTION_PAGE, REPORT_PAGE = "attention.html", "report.html"
WRITTEN_FILES = ("config.json", "data.json", origin.NAME, "metrics.jsonl", *PAGES)
WRITTEN = (*WRITTEN_FOLDERS, *WRITTEN_FILES)
IMPORTED = "import.json"
LOCK = "lock"
BEING_MOVED, SET_ASIDE = parse.REPLACED
# left by earlier versions that were killed
OLD_LEFTOVER = re.compile(
    r"(config|data)\.json\.tmp|metrics\.tmp|\.(characters\.txt|ranks\.tiktoken|tokenizer\.json)\.[0-9a-f]{8}\.tmp"
)


class Data(Protocol):
    """What a run records of its training data; data/dataset.py has the class for language models."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def manifest(self) -> dict[str, Any]: ...  # JSON
    @property
    def fingerprint(self) -> str: ...  # equal for equal training data


@contextlib.contextmanager
def claim(command: Command) -> Iterator[Path]:
    """The run directory, created and locked for this process; UserError if it may not be used.

    A start that fails before the run has begun leaves everything as it was.
    """
    run_dir = command.run_dir
    if not processes.is_first():  # process 0 holds the lock for all
        processes.meet("the run directory")
        if not run_dir.is_dir():
            raise UserError(f"--run-dir {run_dir} is not there, but process 0 has it; all must see the same files")
        yield run_dir
        return
    _check_packages(command)
    check_name(run_dir)
    if isinstance(place := places.at(command.cfg.train.checkpoints), Path):
        check_name(place)
    names = _names(run_dir)
    _check_kinds(run_dir)
    if IMPORTED in names:
        raise UserError(
            f"{run_dir} holds an imported model, which is not trained further in place\n"
            f"       to train from it: {config.program('train')} --init-from {config.word(run_dir)} --run-dir NEW"
        )
    strangers = [name for name in names if not _is_ours(name)]
    if "config.json" in names:
        config.read_json(run_dir / "config.json", type(command.cfg))  # another program's config.json is refused here
    elif strangers:
        raise UserError(
            f"--run-dir {run_dir} holds other files ({strangers[0]}) and is not a run\n       choose a new directory"
        )
    missing = [path for path in (run_dir, *run_dir.parents) if not os.path.lexists(path)]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / LOCK)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process is training in {run_dir}\n       choose another --run-dir") from None
    except FileExistsError:
        raise UserError(f"--run-dir {run_dir}: there is a link on the way that leads nowhere") from None
    except OSError as e:
        _remove_folders(missing)
        raise UserError(f"cannot write in {run_dir}: {e.strerror or e}") from None
    with lock:
        _tidy(run_dir)
        is_new = not _there(run_dir, WRITTEN)
        try:
            _check_request(command)
            _check_writable(run_dir)
            if not command.overwrite:
                places.remove_unfinished(places.folder_of(run_dir))
            processes.meet("the run directory")
            yield run_dir
        finally:
            _settle(run_dir, is_new)
            if LOCK not in names and not _there(run_dir, (*WRITTEN, SET_ASIDE, BEING_MOVED)):
                (run_dir / LOCK).unlink(missing_ok=True)
                _remove_folders(missing)


def _names(run_dir: Path) -> list[str]:
    try:
        return sorted(os.listdir(run_dir))
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        what = run_dir if os.path.lexists(run_dir) else next(p for p in run_dir.parents if p.exists())
        raise UserError(f"--run-dir {run_dir}: {what} is a file") from None
    except OSError as e:
        raise UserError(f"cannot read {run_dir}: {e.strerror}") from None


def check_name(run_dir: Path) -> None:
    """UserError if a path is not UTF-8: tensorstore accepts no other, so there could be no checkpoints."""
    try:
        str(run_dir.resolve()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{run_dir} has a name that is not UTF-8, and no checkpoint can be kept in it\n       give it another name"
        ) from None
    except (OSError, RuntimeError) as e:  # links in a circle
        raise UserError(f"cannot use {run_dir}: {getattr(e, 'strerror', None) or e}") from None


def _is_ours(name: str) -> bool:
    ours = (*WRITTEN, "sample.txt", LOCK, SET_ASIDE, BEING_MOVED)
    return name in ours or bool(OLD_LEFTOVER.fullmatch(name) or files.LEFTOVER.fullmatch(name))


def _check_packages(command: Command) -> None:
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if getattr(command.cfg.train, name):
            spec = importlib.util.find_spec(package)
            if not (spec and spec.origin):  # a mere folder of that name has no origin
                where = command.origin[f"train.{name}"]
                raise UserError(f"train.{name}=true needs pip install 'nanogpt-jax[{name}]' ({where})")
    place = command.cfg.train.checkpoints
    if place.startswith("gs://") and not importlib.util.find_spec("gcsfs"):
        raise UserError(f"train.checkpoints={place} needs pip install gcsfs ({command.origin['train.checkpoints']})")


def _check_kinds(run_dir: Path) -> None:
    """UserError if one of a run's own files or folders is something else: above all a link, through which a run from a
    stranger would make us write elsewhere. The run directory itself may be a link."""
    wanted = {run_dir / name: "folder" for name in WRITTEN_FOLDERS}
    wanted |= {run_dir / name: "file" for name in (*WRITTEN_FILES, LOCK)}
    for folder in ("tokenizer", "checkpoints"):
        try:
            inside = list(files.entries(run_dir / folder)) if files.kind_of(run_dir / folder) == "folder" else ()
        except OSError as e:
            raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
        wanted |= {run_dir / folder / name: "folder" if name.isdecimal() else "file or folder" for name, _ in inside}
    wanted |= {run_dir / "tokenizer" / name: "file" for name in tokenizer.FILES}
    for path, kind in wanted.items():
        if (found := files.kind_of(path)) and found not in kind.split():
            raise UserError(
                f"{path} is a {found}, and not the {kind} that a run has there: nothing is read or written through it\n"
                "       take it away, or choose another --run-dir"
            )


def _check_request(command: Command) -> None:
    """UserError if the flags ask for something impossible."""
    run_dir, steps, first = command.run_dir, checkpoint_steps(command.run_dir), Path(command.cfg.train.init_from)
    if not command.overwrite and (steps or places.elsewhere(run_dir)):
        places.check(run_dir, command.cfg.train.checkpoints, command.origin["train.checkpoints"])
    if command.cfg.train.init_from != "scratch":
        if command.overwrite and os.path.exists(first) and os.path.samefile(first, run_dir):
            raise UserError(
                f"--overwrite would delete train.init_from={first} ({command.origin['train.init_from']})\n"
                "       choose another --run-dir"
            )
        if not checkpoint_steps(first) and not steps:
            raise UserError(f"train.init_from={first} has no checkpoint yet ({command.origin['train.init_from']})")
    if command.resume == "must" and not steps:
        raise UserError(f"--resume=must, but {run_dir} has no checkpoint")
    if command.resume == "never" and not command.overwrite and steps:
        raise UserError(
            f"--resume=never, but {run_dir} holds a run\n       choose another --run-dir, or delete it with --overwrite"
        )


def _check_writable(run_dir: Path) -> None:
    path = run_dir
    try:
        for path in (run_dir, run_dir / "tokenizer", run_dir / "checkpoints"):
            if path.is_dir():
                files.check_writable(path / "new")
        path = run_dir / "metrics.jsonl"
        if path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)))
    except OSError as e:
        raise UserError(f"cannot write in {path}: {e.strerror or e}") from None


# ---- a run that is started over, and a start that fails -------------------------------------------------------------


def has_begun(run_dir: Path) -> bool:
    """Whether training has written something: a checkpoint or a line of metrics."""
    path = run_dir / "metrics.jsonl"
    return bool(checkpoint_steps(run_dir)) or (path.is_file() and path.stat().st_size > 0)


def delete_replaced(run_dir: Path) -> None:
    """Delete the run that was set aside. To be called once the new one replaces it."""
    places.forget(run_dir / SET_ASIDE, run_dir)
    shutil.rmtree(run_dir / SET_ASIDE, ignore_errors=True)


def _replaces(run_dir: Path) -> bool:
    """Whether the run replaces the one set aside: if it has a checkpoint, or has begun and that one has none either."""
    return bool(checkpoint_steps(run_dir)) or (has_begun(run_dir) and not checkpoint_steps(run_dir / SET_ASIDE))


def _there(run_dir: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if os.path.lexists(run_dir / name)]


def _set_aside(run_dir: Path) -> None:
    if names := _there(run_dir, WRITTEN):
        (run_dir / BEING_MOVED).mkdir()
        for name in names:
            os.rename(run_dir / name, run_dir / BEING_MOVED / name)
        os.rename(run_dir / BEING_MOVED, run_dir / SET_ASIDE)


def _settle(run_dir: Path, is_new: bool) -> None:
    """Finish a start that succeeded, failed or was killed. The run replaces the one set aside, or is removed and the
    old one moved back. `is_new`: the directory is new too."""
    with contextlib.suppress(OSError, UserError):  # if a disk fails now, the next start tries again
        if os.path.lexists(run_dir / SET_ASIDE):
            if _replaces(run_dir):
                delete_replaced(run_dir)
            else:
                if has_begun(run_dir):
                    print(f"note: no checkpoint was made, so the run before is back in {run_dir}", file=sys.stderr)
                _remove_written(run_dir)
                os.rename(run_dir / SET_ASIDE, run_dir / BEING_MOVED)
        elif is_new and not has_begun(run_dir):
            _remove_written(run_dir)
        if os.path.lexists(run_dir / BEING_MOVED):
            for name in os.listdir(run_dir / BEING_MOVED):
                os.rename(run_dir / BEING_MOVED / name, run_dir / name)
            (run_dir / BEING_MOVED).rmdir()


def _remove_written(run_dir: Path) -> None:
    """Remove what a start writes before training begins, and nothing that others may have put there since."""
    for name in (*WRITTEN_FILES, *(f"tokenizer/{name}" for name in tokenizer.FILES)):
        (run_dir / name).unlink(missing_ok=True)
    for folder in (run_dir / "tensorboard", run_dir / "wandb"):
        shutil.rmtree(folder, ignore_errors=True)
    places.remove_unfinished(run_dir / "checkpoints")
    places.forget(run_dir, run_dir)
    _remove_folders([run_dir / "checkpoints", run_dir / "tokenizer"])


def _remove_folders(folders: list[Path]) -> None:
    """Remove the empty ones."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _tidy(run_dir: Path) -> None:
    """Remove what killed processes have left here. To be called with the lock held."""
    for folder in (run_dir, run_dir / "tokenizer"):
        files.remove_all_leftovers(folder)
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if OLD_LEFTOVER.fullmatch(path.name) and files.kind_of(path) == "file":
                    path.unlink()
    places.remove_unfinished(run_dir / "checkpoints")
    _settle(run_dir, is_new=False)


# ---- what training needs of it --------------------------------------------------------------------------------------


def check_tokenizer(command: Command, data: Data) -> None:
    """UserError if the data's tokenizer differs from that of the run train.init_from."""
    first, wanted = Path(command.cfg.train.init_from), command.cfg.data.tokenizer
    if command.cfg.train.init_from == "scratch" or command.origin["data.tokenizer"] == str(first):
        return
    if (first / "tokenizer").is_dir() and tokenizer.load(first / "tokenizer").fingerprint != data.tokenizer.fingerprint:
        raise UserError(
            f"data.tokenizer={wanted} ({command.origin['data.tokenizer']}) is another tokenizer than that of "
            f"train.init_from={first}, whose weights know only its own\n       leave data.tokenizer out"
        )


def prepare(run_dir: Path, command: Command, cfg: Config, data: Data) -> None:
    """Check that a run in the directory has the same settings and data, or write down those of a new run.

    `cfg` is the command's configuration, completed with the vocabulary size.
    """
    processes.check_same(
        "the data",
        {
            "the data's fingerprint": data.fingerprint,
            **{f"the version of {name}": v for name, v in origin.versions().items()},
        },
    )
    steps = checkpoint_steps(run_dir)
    if steps and not command.overwrite:
        _check_same(run_dir, command, cfg, data)
    elif (run_dir / "metrics.jsonl").exists() and not command.overwrite:
        print(f"note: {run_dir} has no checkpoint to go on from, so it starts over", file=sys.stderr)
    if steps and (command.overwrite or not finished(run_dir, cfg)):
        execution_here(cfg)  # fails before the old run is moved
    if not command.overwrite and finished(run_dir, cfg):
        return  # nothing is left to do, so the settings by which it was made stay
    processes.meet("a look at the run")
    processes.first_alone("the run's settings", lambda: _record(run_dir, command, cfg, data, steps))


def _record(run_dir: Path, command: Command, cfg: Config, data: Data, steps: list[int]) -> None:
    recorded = {"fingerprint": data.fingerprint, **data.manifest}
    try:
        if not steps or command.overwrite:
            _set_aside(run_dir)
            if cfg.train.checkpoints != "run":
                places.create(run_dir, cfg.train.checkpoints)
            told = origin.of_new(command)
        else:
            if folder := places.elsewhere(run_dir):
                places.claim(run_dir, folder)
            told = origin.of_extended(run_dir, cfg, steps[-1])
        files.write(run_dir / origin.NAME, json.dumps(told, indent=2) + "\n")
        data.tokenizer.save(run_dir / "tokenizer")
        files.write(run_dir / "data.json", json.dumps(recorded, indent=2) + "\n")
        files.write(run_dir / "config.json", config.to_json(cfg))
    except OSError as e:
        place = e.filename if cfg.train.checkpoints != "run" and e.filename else run_dir
        raise UserError(
            f"cannot write in {place}: {e.strerror or e}\n"
            "       see to that (a full disk: free some space), then give the same command again"
        ) from None


def _check_same(run_dir: Path, command: Command, cfg: Config, data: Data) -> None:
    """UserError if the run in the directory has other settings or other data."""
    before = config.read_json(run_dir / "config.json", type(cfg))
    compared = frozenset(types_of(type(cfg))) - cfg.EXECUTION
    if Path(cfg.data.tokenizer).is_dir():  # it may have moved; the fingerprint below includes its content
        compared -= {"data.tokenizer"}
    same_data = trained_on(run_dir, _start_over) == data.fingerprint
    if not same_data:  # these follow from the text
        compared -= {key for key in ("model.vocab_size", "model.end_of_text") if command.origin[key] == "default"}
    changed = differences(before, cfg, compared)
    if same_data:  # it may have moved, or be spelt in another way
        moved = [c for c in changed if c[0] in ("data.source", "data.mixture")]
        changed = [c for c in changed if c not in moved]
        if moved and not changed:
            print(
                f"note: data.source={before.data.title} is {cfg.data.title} now, with the same tokens", file=sys.stderr
            )
    if changed:
        shown = "\n".join(f"       {k}: {old} in the run, {new} now ({command.origin[k]})" for k, old, new in changed)
        raise UserError(
            f"{run_dir} holds a run with other settings\n{shown}\n"
            "       choose another --run-dir, or start over with --overwrite"
        )
    if not same_data:
        raise UserError(
            f"the data of {run_dir} has changed: {cfg.data.title} gives other tokens now than it was trained on\n"
            "       bring the old text back, or choose another --run-dir"
        )


def trained_on(run_dir: Path, remedy: Callable[[], str]) -> str:
    """The fingerprint of a run's data. UserError, with the `remedy`, if data.json is missing or damaged."""
    path = run_dir / "data.json"
    try:
        return json.loads(files.read(path))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is missing or damaged ({e})\n       {remedy()}") from None


def _start_over() -> str:
    return f"start over: {typed_again(('--resume',), '--overwrite') or '--overwrite'}"


def finished(run_dir: Path, cfg: Config) -> str:
    """A message if the run has all its steps already, or more; "" if not."""
    last, steps = max(checkpoint_steps(run_dir), default=-1), cfg.train.steps
    if last > steps:
        return f"{run_dir} is at step {last} already, beyond train.steps={steps}: nothing is left to do"
    return f"{run_dir} is finished: step {steps} of {steps}" if last == steps else ""


def standing(run_dir: Path, argv: list[str], name: str = "train") -> str:
    """What is saved of a run whose command `argv` is interrupted, and the command to type next."""
    if steps := checkpoint_steps(run_dir):
        again = command_again(argv, name=name)
        return f"the last checkpoint in {run_dir} is step {steps[-1]}\ngo on with the same command: {again}"
    again = config.joined([*shlex.split(config.program(name)), *argv])  # --overwrite too: what it sets aside is back
    return f"nothing was saved in {run_dir}\nstart over with the same command: {again}"


def how_to_replay(run_dir: Path, cfg: Config) -> str:
    """The command that shows which operation broke a run; "" if there is none, or if the run will not be left there."""
    is_kept = not os.path.lexists(run_dir / SET_ASIDE) or _replaces(run_dir)
    is_offered = importlib.util.find_spec("nanogpt_jax.commands.replay")  # it may have been removed
    if not (is_kept and is_offered and cfg.COMMAND == Config.COMMAND):
        return ""
    return f"{config.program('replay')} {config.word(run_dir)}"


def afterwards(run_dir: Path, argv: list[str], steps: int) -> str:
    """Commands for a finished run: sample from it, read about it, or train longer."""
    longer = command_again(argv, steps=2 * max([steps, *checkpoint_steps(run_dir)]))
    sample = f"{config.program('sample')} {config.word(run_dir)} --num-samples 3"
    about = f"      or read about it: {config.program('report')} {config.word(run_dir)}\n"
    if not importlib.util.find_spec("nanogpt_jax.commands.report"):  # it may have been removed
        about = ""
    return f"next: {sample}\n{about}      or train longer: {longer}"
