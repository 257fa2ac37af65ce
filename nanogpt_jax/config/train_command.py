"""A command that trains: defaults, then a config file, then the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal

from nanogpt_jax.config import command_line
from nanogpt_jax.config.command_line import CommandLine, flag, program, word
from nanogpt_jax.config.errors import UserError, suggestion
from nanogpt_jax.config.parse import config_folder, find_config, merge, read_json, read_toml
from nanogpt_jax.config.settings import Config, Kind, Origin, Settings, items, types_of
from nanogpt_jax.config.validate import check_tokenizer, validate


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """One training command: the settings, where each came from, and what to do with the run directory."""

    cfg: Settings
    origin: Origin
    run_dir: Path
    resume: Literal["auto", "never", "must"]
    overwrite: bool
    print_config: bool


@dataclass(frozen=True)
class Options(command_line.Options):
    run_dir: str | None = flag("DIR", "the run directory (default: runs/NAME, NAME being that of the config file)")
    init_from: str | None = flag(
        "RUN", "start from the best weights of another run or of an imported model; the same as --train.init-from"
    )
    resume: Literal["auto", "never", "must"] = flag(
        "", "auto: resume if there is a run; never: only a new directory; must: only an existing run", "auto"
    )
    overwrite: bool = flag("", "delete the run in the directory and start over", False)
    print_config: bool = flag("", "print each value and where it came from, as TOML; do not train", False)


def command_line_of(kind: Kind) -> CommandLine[Options]:
    """The command line that trains runs of this kind."""
    shipped = ", ".join(sorted(path.stem for path in config_folder().glob("*.toml")))
    words = {"[CONFIG.toml]": f"a config file, or the name of a shipped one:\n{shipped}"}
    return CommandLine(kind.COMMAND, Options, kind.ABOUT, words, kind=kind)


def help_text(kind: Kind = Config) -> str:
    """The --help of the command that trains this kind."""
    return command_line_of(kind).help()


def load(argv: list[str], kind: type[Settings] = Config) -> Command[Settings]:
    """Read a training command line: defaults, then the TOML file, then the command line."""
    options = command_line_of(kind).read(argv)
    words, settings = options.words, options.settings
    for typed in words:
        if typed.partition("=")[0].replace("-", "_") in types_of(kind):
            raise UserError(f"no config file {typed}\n       did you mean --{typed}?")
    if len(words) > 1:
        raise UserError(f"one config file at a time, but got {' and '.join(words)}")
    if (short := options.init_from) is not None and settings.setdefault("train.init_from", short) != short:
        raise UserError(f"--init-from={short} and --train.init-from={settings['train.init_from']} exclude each other")

    cfg, origin = kind(), dict.fromkeys(types_of(kind), "default")
    name = kind.RUN
    if words:
        path = find_config(words[0])
        values = read_toml(path, kind)
        cfg = merge(cfg, values, str(path))
        origin.update(dict.fromkeys(values, str(path)))
        name = path.stem
    cfg = merge(cfg, settings, "command line")
    origin.update(dict.fromkeys(settings, "command line"))
    # here, and not in `validate`, because a run that was moved does not need that folder
    check_tokenizer(cfg.data.tokenizer, origin["data.tokenizer"])

    if options.resume == "must" and options.overwrite:
        raise UserError("--resume=must and --overwrite exclude each other")
    if options.run_dir == "":
        raise UserError("--run-dir needs a value")
    run_dir = Path(options.run_dir or f"runs/{name}")
    for of, path in (("--run-dir", run_dir), ("train.init_from", Path(cfg.train.init_from))):
        try:
            path.lstat()
        except FileNotFoundError:
            continue
        except OSError as e:  # a name that is too long, or an unreadable folder
            raise UserError(f"{of}={path} cannot be used: {e.strerror}") from None
    if cfg.train.init_from != "scratch":
        cfg, origin = _take_over(cfg, origin, run_dir, options.overwrite)
    cfg = validate(cfg, origin)
    return Command(cfg, origin, run_dir, options.resume, options.overwrite, options.print_config)


def _take_over(cfg: Settings, origin: Origin, run_dir: Path, overwrite: bool) -> tuple[Settings, Origin]:
    """`cfg`, with model settings and tokenizer that were not given taken from the run train.init_from.

    If a run has begun in `run_dir`, they are taken from there, so that it can resume without the initial one.
    """
    first = Path(cfg.train.init_from)
    where = origin["train.init_from"]
    mine = run_dir / "config.json"
    begun = None if overwrite or not mine.is_file() else read_json(mine, type(cfg))
    if begun and begun.train.init_from == cfg.train.init_from:
        before, source = begun, run_dir
    elif first.is_dir():
        before, source = read_json(first / "config.json"), first
    else:
        near = suggestion(str(first), [str(p.parent.parent) for p in first.parent.glob("*/checkpoints/[0-9]*")])
        hint = f"\n       train one first, or import one: {program('import-hf')} gpt2 {word(first)}"
        raise UserError(f"train.init_from={first} is not a run directory ({where}){near}{hint}")
    given, old = dict(items(cfg)), dict(items(before))
    taken: dict[str, Any] = {}
    for key in (key for key in types_of() if key.startswith("model.") and key not in cfg.EXECUTION):
        if origin[key] == "default" and key not in cfg.OWN:
            taken[key] = old[key]
        elif given[key] == old[key] or key in ("model.dropout", "model.dtype", "model.separate_documents"):
            continue
        elif key != "model.block_size":
            raise UserError(
                f"{key}={given[key]} ({origin[key]}), but train.init_from={first} ({where}) has {key}={old[key]}\n"
                f"       leave {key} out, and it is {old[key]}"
            )
        elif given[key] > old[key]:
            raise UserError(
                f"{key}={given[key]} ({origin[key]}), but train.init_from={first} ({where}) has {key}={old[key]}\n"
                "       a shorter context can be cut from it; for a longer one it has no positions"
            )
    if origin["data.tokenizer"] == "default":
        taken["data.tokenizer"] = str(source)
    return merge(cfg, taken, str(source)), {**origin, **dict.fromkeys(taken, str(source))}
