"""A command that trains: defaults, then a config file, then the command line."""

import functools
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, get_args, get_type_hints

from nanogpt_jax.config.command_line import flag_of, program, split_arguments, unknown_setting, word
from nanogpt_jax.config.errors import UserError, suggestion
from nanogpt_jax.config.parse import config_folder, find_config, merge, read_json, read_toml, to_toml
from nanogpt_jax.config.settings import Config, Kind, Origin, Settings, items, sections_of, types_of
from nanogpt_jax.config.validate import check_tokenizer, validate


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """One training command: the settings, where each came from, and what to do with the run directory."""

    cfg: Settings
    origin: Origin
    run_dir: Path
    resume: Literal["auto", "never", "must"] = "auto"
    overwrite: bool = False
    print_config: bool = False


TRAIN_USAGE = """usage: {program} [CONFIG.toml] [--run-dir DIR] [--init-from RUN]
           [--resume auto|never|must] [--overwrite] [--print-config] [--SECTION.NAME VALUE ...]

Trains a GPT-2 and keeps everything about it in a run directory. The same command again goes on where
it stopped.

  CONFIG.toml     a config file, or the name of a shipped one:
{shipped}
  --run-dir DIR   where the run is kept (default: runs/NAME, after the config file)
  --init-from RUN start from the best weights of another run, or of an imported model: the same as
                  --train.init-from
  --resume HOW    auto: go on if there is a run; never: only a new directory; must: only an old one
                  (default: auto)
  --overwrite     delete the run in the directory and start over
  --print-config  show each value and where it came from, as TOML; do not train
"""
CLASSIFY_USAGE = """usage: {program} [CONFIG.toml] [--run-dir DIR] [--init-from RUN]
           [--resume auto|never|must] [--overwrite] [--print-config] [--SECTION.NAME VALUE ...]

Trains GPT-2 with a head over the last token's hidden state to name the label of a text. The arguments
mean what they mean to train.py; runs go to runs/classifier, or to runs/NAME after a CONFIG.toml of yours.
"""


SWITCHES = ("overwrite", "print_config")
OPTIONS = ("run_dir", "init_from", "resume", *SWITCHES)


def _check_flag(kind: Kind, key: str) -> None:
    """UserError where `key` is no flag of train.py; it names the setting that may be meant."""
    if "." in key:
        if key not in types_of(kind):
            raise unknown_setting(key, "command line", kind)
    elif key not in OPTIONS:
        full = [k for k in types_of(kind) if k.endswith("." + key)]
        near = f"\n       did you mean --{full[0]}?" if full else suggestion(flag_of(key), map(flag_of, OPTIONS))
        near = near or f"\n       settings are --SECTION.NAME; see {program(kind.COMMAND)} --help"
        raise UserError(f"unknown flag {flag_of(key)} (command line){near}")


def load(argv: list[str], kind: type[Settings] = Config) -> Command[Settings]:
    """Read a training command line: defaults, then the TOML file, then the command line."""
    words, flags = split_arguments(argv, SWITCHES, functools.partial(_check_flag, kind))
    for typed in words:
        if typed.partition("=")[0].replace("-", "_") in types_of(kind):
            raise UserError(f"no config file {typed}\n       did you mean --{typed}?")
    if len(words) > 1:
        raise UserError(f"one config file at a time, but got {' and '.join(words)}")
    settings = {key: value for key, value in flags.items() if "." in key}
    options = {key: value for key, value in flags.items() if "." not in key}
    if "init_from" in options:
        short = options.pop("init_from")
        if settings.setdefault("train.init_from", short) != short:
            raise UserError(
                f"--init-from={short} and --train.init-from={settings['train.init_from']} exclude each other"
            )

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
    check_tokenizer(cfg.data.tokenizer, origin["data.tokenizer"])  # here: a run moved elsewhere needs no such folder

    resume = options.get("resume", "auto")
    if resume not in ("auto", "never", "must"):
        raise UserError(f"--resume={resume} is not one of auto, never, must")
    if resume == "must" and "overwrite" in options:
        raise UserError("--resume=must and --overwrite exclude each other")
    run_dir = Path(options.get("run_dir", f"runs/{name}"))
    if options.get("run_dir") == "":
        raise UserError("--run-dir needs a value")
    for flag, path in (("--run-dir", run_dir), ("train.init_from", Path(cfg.train.init_from))):
        try:
            path.lstat()
        except FileNotFoundError:
            continue
        except OSError as e:  # a name that is too long, a folder that is not ours to read
            raise UserError(f"{flag}={path} cannot be used: {e.strerror}") from None
    if cfg.train.init_from != "scratch":
        cfg, origin = _take_over(cfg, origin, run_dir, "overwrite" in options)
    return Command(
        cfg=validate(cfg, origin),
        origin=origin,
        run_dir=run_dir,
        resume=resume,  # pyright: ignore[reportArgumentType]
        overwrite="overwrite" in options,
        print_config="print_config" in options,
    )


def _take_over(cfg: Settings, origin: Origin, run_dir: Path, overwrite: bool) -> tuple[Settings, Origin]:
    """`cfg` with what was left open of the model and the tokenizer taken from the run train.init_from.

    A run that has begun in `run_dir` knows them itself, so that it goes on when the initial one is gone.
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
        raise UserError(f"train.init_from={first} is no run directory ({where}){near}{hint}")
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


def help_text(kind: Kind = Config) -> str:
    """The `--help` page of what trains this kind: the comments behind the settings, drawn by argparse."""
    import argparse
    import textwrap

    names, indent = ", ".join(sorted(path.stem for path in config_folder().glob("*.toml"))), " " * 18
    shipped = textwrap.fill(names, 98, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    usage = CLASSIFY_USAGE if kind.COMMAND.startswith("classify") else TRAIN_USAGE
    page = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=usage.format(program=program(kind.COMMAND, briefly=True), shipped=shipped),
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34),
    )
    defaults = dict(items(kind()))
    kinds = {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT", dict[str, float]: "A=3,B=1"}
    for section, settings in sections_of(kind).items():
        group = page.add_argument_group(section)
        for name, hint in get_type_hints(settings).items():
            key = f"{section}.{name}"
            comment = next(
                (text for c in settings.__mro__ if (text := comments(c.__module__).get((c.__name__, name)))), ""
            )
            default = defaults[key] if isinstance(defaults[key], str) else to_toml(defaults[key])
            group.add_argument(
                flag_of(key),
                metavar=kinds.get(hint) or f"{{{','.join(get_args(hint))}}}",
                help=f"{comment} (default: {default})".replace("%", "%%"),  # a lone % would be argparse's own
            )
    return page.format_help().rstrip()


@functools.cache
def comments(module: str) -> dict[tuple[str, str], str]:
    """What stands behind each setting of a file: ("ModelConfig", "n_layer") -> "L, transformer blocks"."""
    found: dict[tuple[str, str], str] = {}
    owner = ""
    source = inspect.getsource(sys.modules[module]) if module != "builtins" else ""
    for line in source.splitlines():
        if begins := re.match(r"class (\w+)", line):
            owner = begins[1]
        elif setting := re.match(r"    (\w+): .*  # (.*)", line):
            found[owner, setting[1]] = setting[2]
    return found
