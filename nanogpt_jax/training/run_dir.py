"""The run directory: whose it is, what is in it, and whether a command may write there.

    RUN/config.json   the settings          RUN/checkpoints/STEP/   orbax
    RUN/data.json     the data's manifest   RUN/tokenizer/          so that sampling needs no data
    RUN/metrics.jsonl one line a log        RUN/lock                held while a process trains here
    RUN/import.json   of an imported model, which has no data and is not trained further in place: where it came from

Nothing here imports jax, unless a run is to be overwritten: one that must not be touched is refused before XLA starts.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock

from nanogpt_jax import config
from nanogpt_jax.config import Command, Config, UserError
from nanogpt_jax.data import tokenizer
from nanogpt_jax.data.labelled import LabelledData
from nanogpt_jax.data.prepare import Dataset

NAMES = ("checkpoints", "tokenizer", "tensorboard", "wandb", "config.json", "data.json", "metrics.jsonl", "sample.txt")
IMPORTED = "import.json"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps with a whole checkpoint, in order. A save cut short has a temporary name and is not among them."""
    folder = run_dir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []


@contextlib.contextmanager
def claim(command: Command) -> Iterator[Path]:
    """The run directory, made and locked for this process, or a UserError that says why it may not be used."""
    run_dir = command.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file")
    try:
        names = sorted(p.name for p in run_dir.iterdir()) if run_dir.is_dir() else []
    except OSError as e:
        raise UserError(f"cannot read {run_dir}: {e.strerror}") from None
    if IMPORTED in names:
        raise UserError(
            f"{run_dir} holds an imported model, which is not trained further in place\n"
            f"       to train from it: {config.program('train')} --init-from {run_dir} --run-dir NEW"
        )
    strangers = [name for name in names if name not in (*NAMES, "lock")]
    if "config.json" in names:
        config.read_json(run_dir / "config.json", type(command.cfg))  # another program's config.json is refused here
    elif strangers:
        raise UserError(
            f"--run-dir {run_dir} holds other files ({strangers[0]}) and is no run\n       choose a new directory"
        )
    first = Path(command.cfg.train.init_from)
    if command.cfg.train.init_from != "scratch" and not checkpoint_steps(run_dir) and not checkpoint_steps(first):
        raise UserError(f"train.init_from={first} has no checkpoint yet ({command.origin['train.init_from']})")
    if command.resume == "must" and not checkpoint_steps(run_dir):
        raise UserError(f"--resume=must, but {run_dir} has no checkpoint")
    if command.resume == "never" and not command.overwrite and checkpoint_steps(run_dir):
        raise UserError(
            f"--resume=never, but {run_dir} holds a run\n       choose another --run-dir, or delete it with --overwrite"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / "lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process is training in {run_dir}\n       choose another --run-dir") from None
    except OSError as e:
        raise UserError(f"cannot write in {run_dir}: {e.strerror}") from None
    with lock:
        if (folder := run_dir / "checkpoints").exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UserError(f"cannot write in {folder}, where checkpoints go")
        try:
            yield run_dir
        except BaseException:  # a start that failed leaves nothing behind
            if not names and not (run_dir / "metrics.jsonl").exists():
                shutil.rmtree(run_dir)
            raise


def check_tokenizer(command: Command, data: Dataset | LabelledData) -> None:
    """UserError where the data's tokenizer is not the one of the run that training starts from."""
    first, wanted = Path(command.cfg.train.init_from), command.cfg.data.tokenizer
    if command.cfg.train.init_from == "scratch" or command.origin["data.tokenizer"] == str(first):
        return
    if (first / "tokenizer").is_dir() and tokenizer.load(first / "tokenizer").fingerprint != data.tokenizer.fingerprint:
        raise UserError(
            f"data.tokenizer={wanted} ({command.origin['data.tokenizer']}) is another tokenizer than that of "
            f"train.init_from={first}, whose weights know only its own\n       leave data.tokenizer out"
        )


def prepare(run_dir: Path, command: Command, cfg: Config, data: Dataset | LabelledData) -> None:
    """Check that the run in the directory, if there is one, is this run; else write down what the new run is.

    `cfg` is the command's configuration with the vocabulary size filled in.
    """
    steps = [] if command.overwrite else checkpoint_steps(run_dir)
    if steps:
        before = config.read_json(run_dir / "config.json", type(cfg))
        compared = frozenset(config.types_of(type(cfg))) - config.EXECUTION
        if Path(cfg.data.tokenizer).is_dir():  # it may have moved; the fingerprint below holds what is in it
            compared -= {"data.tokenizer"}
        changed = config.differences(before, cfg, compared)
        if changed:
            shown = "\n".join(
                f"       {k}: {old} in the run, {new} now ({command.origin[k]})" for k, old, new in changed
            )
            raise UserError(
                f"{run_dir} holds a run with other settings\n{shown}\n"
                "       choose another --run-dir, or start over with --overwrite"
            )
        if _fingerprint(run_dir / "data.json") != data.fingerprint:
            raise UserError(
                f"the data of {run_dir} has changed: {cfg.data.title} gives other tokens now than it was trained on\n"
                "       bring the old text back, or choose another --run-dir"
            )
    else:
        if (run_dir / "metrics.jsonl").exists() and not command.overwrite:
            print(f"note: {run_dir} has no checkpoint to go on from, so it starts over", file=sys.stderr)
        if checkpoint_steps(run_dir):
            _check_devices(cfg)
        for name in NAMES:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    data.tokenizer.save(run_dir / "tokenizer")
    recorded = {"fingerprint": data.fingerprint, **data.manifest}
    write_atomically(run_dir / "data.json", json.dumps(recorded, indent=2) + "\n")
    write_atomically(run_dir / "config.json", config.to_json(cfg))


def _check_devices(cfg: Config) -> None:
    """UserError where training could not start: what is to be overwritten is still there then."""
    from nanogpt_jax.distributed.mesh import make_mesh, start
    from nanogpt_jax.model import gpt2

    gpt2.resolve(cfg.model, start())
    make_mesh(cfg.mesh)


def _fingerprint(path: Path) -> str:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is missing or damaged ({e})\n       start over with --overwrite") from None


def write_atomically(path: Path, text: str) -> None:
    """The old content or the new, whatever happens in between."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def finished(run_dir: Path, cfg: Config) -> str:
    """What there is to say of a run that has all the steps already, or more of them; "" of another."""
    last, steps = max(checkpoint_steps(run_dir), default=-1), cfg.train.steps
    if last > steps:
        return f"{run_dir} is at step {last} already, beyond train.steps={steps}: nothing is left to do"
    return f"{run_dir} is finished: step {steps} of {steps}" if last == steps else ""


def command_again(argv: list[str], steps: int | None = None, name: str = "train") -> str:
    """The command that goes on with this run: the one that was typed, with other `steps` if given."""
    values = {"--resume", "--train.steps"} if steps else {"--resume"}
    words, skip = config.program(name).split(" ", 1), False
    for word in argv:
        flag, equals, _ = word.partition("=")
        if not skip and word != "--overwrite" and flag not in values:
            words.append(word)
        skip = not skip and flag in values and not equals
    return shlex.join([*words, *(["--train.steps", str(steps)] if steps else [])])


def newest(folder: Path) -> Path:
    """The language model that was trained last among the directories in `folder`; one that never was, at the worst."""

    def rank(run: Path) -> tuple[bool, float]:
        learned = checkpoint_steps(run)[-1] > 0 or (run / IMPORTED).exists()
        return learned, (run / "checkpoints").stat().st_mtime

    runs = [p.parent for p in folder.glob("*/config.json") if checkpoint_steps(p.parent)]
    for run in sorted(runs, key=rank, reverse=True):
        if not config.is_classifier(run):
            return run
    raise UserError(f"no run with a checkpoint in {folder}/\n       train one first: {config.program('train')}")
