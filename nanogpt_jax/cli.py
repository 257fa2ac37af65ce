"""`python -m nanogpt_jax COMMAND`, installed as `nanogpt-jax`, and helpers that all commands share."""

import contextlib
import importlib
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from nanogpt_jax.config import UserError, suggestion
from nanogpt_jax.host import files, runtime, terminal

Main = Callable[[list[str]], int]


def asks_for_help(argv: list[str]) -> bool:
    flags = argv[: argv.index("--")] if "--" in argv else argv
    return "--help" in flags or "-h" in flags


def check_file(flag: str, place: str) -> None:
    """UserError if `flag`=`place` cannot be written as a file. Called before work that may take minutes."""
    path = Path(place)
    if not place:
        raise UserError(f"{flag} needs the name of a file")
    try:
        files.check_writable(path)
    except IsADirectoryError:
        raise UserError(f"{flag}={place} is a directory; give a file") from None
    except FileNotFoundError:
        place_of = files.target(path) if path.is_symlink() else path
        raise UserError(f"{flag}={place}: there is no directory {place_of.parent}") from None
    except OSError as e:
        raise UserError(f"{flag}={place} cannot be written: {e.strerror or e}") from None


def write_file(flag: str, place: str, content: str | bytes) -> None:
    """Write the result that `flag`=`place` asks for, through a link, to a device or a pipe. UserError if that fails."""
    try:
        files.write_result(Path(place), content)
    except OSError as e:
        raise UserError(f"cannot write {flag}={place}: {e.strerror or e}") from None


def check_page(place: str | None, own: Path) -> Path:
    """Where a page goes: to --out=`place`, or to `own`, its place in a run. UserError if it cannot be written.

    The run may be a stranger's, so a link at `own` is not followed.
    """
    if place is not None:
        check_file("--out", place)
        return Path(place)
    try:
        kind = files.kind_of(own)
        if kind in ("", "file"):
            files.check_writable(own)
    except OSError as e:
        raise UserError(f"cannot write {own}: {e.strerror or e}\n       choose another place with --out") from None
    if kind not in ("", "file"):
        raise UserError(f"{own} is a {kind}, and not a file\n       take it away, or choose another place with --out")
    return own


def write_page(place: str | None, own: Path, content: str | bytes) -> None:
    """Write a page to where `check_page` said."""
    if place is not None:
        write_file("--out", place, content)
        return
    try:
        files.write(own, content)
    except OSError as e:
        raise UserError(f"cannot write {own}: {e.strerror or e}\n       choose another place with --out") from None


def pyplot(flag: str, place: str) -> Any:
    """matplotlib.pyplot, drawing without a screen. UserError if it is not there, or cannot write `flag`=`place`."""
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{flag}={place} needs pip install 'nanogpt-jax[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    known = plt.figure().canvas.get_supported_filetypes()
    if format_of(place) not in known:
        raise UserError(f"{flag}={place} must end in one of {', '.join(f'.{k}' for k in known)}")
    check_file(flag, place)
    return plt


def format_of(place: str) -> str:
    """The format of a picture, by its suffix: "svg" for X.SVG."""
    return Path(place).suffix.lower().lstrip(".")


def guarded(main: Main, argv: list[str] | None = None) -> int:
    """Runs `main`. A UserError goes to stderr, without a traceback, and the exit code is its own."""
    terminal.set_up()
    runtime.set_up()
    try:
        code = _answer(main, argv)
    finally:
        with contextlib.suppress(OSError):  # else Python complains at exit
            sys.stdout.flush()
    if any(thread.name.startswith(runtime.SPARE) for thread in threading.enumerate()):
        os._exit(code)  # else Python waits for that thread
    return code


def _answer(main: Main, argv: list[str] | None) -> int:
    try:
        code = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    except (RuntimeError, MemoryError) as e:
        if not (words := out_of_memory(e)):
            raise
        print(f"error: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(str(e) or "interrupted", file=sys.stderr)
        return 130
    except terminal.OutputError as e:
        print(f"error: cannot write to standard output: {e.strerror}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `sample.py | head`: the reader has gone
        return 141
    except OSError as e:  # a name that is too long, a folder that may not be searched: Path.exists raises these too
        if not isinstance(e.filename, str | bytes):
            raise
        print(f"error: cannot use {os.fsdecode(e.filename)}: {e.strerror}", file=sys.stderr)
        return 2


def out_of_memory(error: Exception) -> str:
    """The message for an out-of-memory error (XLA, PyTorch, Python); "" for any other."""
    what = str(error).strip() or "out of memory"
    wants = isinstance(error, MemoryError) or re.search("(?i)out of memory|can't allocate memory", what)
    if not wants or re.search("(?i)shared memory|vmem", what):  # of a kernel on a GPU or TPU
        return ""
    return (
        f"{what.removeprefix('RESOURCE_EXHAUSTED: ').splitlines()[0][:200]}\n"
        "       use fewer or shorter texts at once; in training, a smaller train.micro_batch"
    )


def door(name: str) -> ModuleType:
    """The top-level script `name`: beside the package in a clone, inside it in an installed wheel."""
    here = Path(__file__).parent
    path = here / "doors" / f"{name}.py"
    path = path if path.is_file() else here.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"nanogpt_jax_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# command -> its meaning; its module, or (a name without a dot) its top-level script; its function
COMMANDS = {
    "train": ("train a GPT-2, or go on with a run (train.py)", "train", "main"),
    "sample": ("write text with a trained model (sample.py)", "sample", "main"),
    "prepare": ("turn text into tokens, ahead of training", "commands.prepare", "main"),
    "eval": ("measure how good a run is, and which of two is better", "commands.evaluate", "main"),
    "attend": ("show what a model looks at in a text, as a page to open", "commands.attend", "main"),
    "report": ("write one page about a run", "commands.report", "main"),
    "compare": ("compare many runs: settings, losses over seeds, curves", "commands.compare", "main"),
    "import-hf": ("make a run of a GPT-2 in Hugging Face's files", "commands.huggingface", "main_import"),
    "export-hf": ("write a run for transformers, or as GGUF", "commands.huggingface", "main_export"),
    "classify": ("train a text classifier, measure it, ask it", "commands.classify", "main"),
    "scaling": ("measure how the cost of a token grows with the model", "bench.scaling", "main"),
    "replay": ("take a step of a run once more, to see what broke", "commands.replay", "main"),
    "normal": ("say whether a run is like our own runs of its recipe", "commands.normal", "main"),
    "plan": ("say what a run needs and costs before it starts", "commands.plan", "main"),
    "sweep": ("train many runs, settings times seeds, and compare them", "commands.sweep", "main"),
    "bench": ("measure how fast this machine trains and samples", "bench.bench", "main"),
}


def offered() -> dict[str, str]:
    """The commands and their meanings, without those whose module was removed with its slice. Imports nothing."""
    package = Path(__file__).parent

    def is_there(module: str) -> bool:
        return "." not in module or (package / f"{module.replace('.', '/')}.py").is_file()

    return {name: meaning for name, (meaning, module, _) in COMMANDS.items() if is_there(module)}


def command(name: str) -> Main:
    """The function of a command, imported now."""
    _, module, function = COMMANDS[name]
    found = importlib.import_module(f"nanogpt_jax.{module}") if "." in module else door(module)
    return getattr(found, function)


def _main(argv: list[str]) -> int:
    commands = offered()
    if not argv or argv[0] in ("--help", "-h", "help"):
        print("usage: nanogpt-jax COMMAND [ARGUMENTS], or nanogpt-jax COMMAND --help\n")
        print("\n".join(f"  {name:<12}{meaning}" for name, meaning in commands.items()))
        return 0
    if argv[0] not in commands:
        raise UserError(f"unknown command {argv[0]}{suggestion(argv[0], commands)}\n       see nanogpt-jax --help")
    return command(argv[0])(argv[1:])


def main() -> int:
    return guarded(_main)
