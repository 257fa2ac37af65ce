"""Settings from and to text: one parser for TOML files, the command line and a run's config.json.

All three go through `coerce`, so a wrong key or value gets the same message everywhere.
"""

import codecs
import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from nanogpt_jax.config.command_line import program, unknown_setting, word
from nanogpt_jax.config.errors import UserError, suggestion
from nanogpt_jax.config.settings import Config, Kind, Origin, Settings, items, sections_of, types_of
from nanogpt_jax.config.validate import validate
from nanogpt_jax.host import files

CLASSIFIER = "classify"  # the section by which a classifier's config.json is known
REPLACED = (".overwriting", ".overwritten")  # in a run directory: a run that is being replaced, see run_dir.py


def coerce(key: str, hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`, the type of setting `key`. Text from the command line is parsed like TOML."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            shown = ", ".join(choices)
            raise UserError(f"{key}={value!r} is not one of {shown} ({where}){suggestion(str(value), choices)}")
        return value
    if key == "data.mixture":
        return _mixture(value, where)
    if hint is str:
        if isinstance(value, str) and value:
            return value
        raise UserError(f"{key}={value!r} must be text ({where})")
    if where == "command line" and isinstance(value, str):
        value = _parse(hint, value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and type(value) is int:
        return value
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    wanted = {bool: "true or false", int: "a whole number", float: "a finite number"}[hint]
    raise UserError(f"{key}={value!r} must be {wanted} ({where})")


def _mixture(value: Any, where: str) -> dict[str, float]:
    """A table of sources and weights; from the command line as JSON or as A=3,B=1."""
    good = 'sources and their weights: A=3,B=1 or {"A": 3, "B": 1} on the command line, { "A" = 3, "B" = 1 } in TOML'
    wrong = UserError(f"data.mixture={value!r} must be {good} ({where})")
    table = value
    if isinstance(value, str) and where == "command line":
        pairs = [part.rpartition("=") for part in value.split(",")] if value else []
        try:
            table = json.loads(value) if value.startswith("{") else {a.strip(): float(b) for a, _, b in pairs}
        except ValueError:
            raise wrong from None
        if len(table) < len(pairs):
            raise UserError(f"data.mixture={value} names a source twice ({where})")
    if not isinstance(table, Mapping) or not all(table):
        raise wrong
    for source, weight in table.items():
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise UserError(f"data.mixture: the weight of {source} is {weight!r}, and must be above 0 ({where})")
    return {source: float(weight) for source, weight in table.items()}


def _parse(kind: type, text: str) -> Any:
    """Text as bool, int or float. If that fails, the text itself, for the message of `coerce`."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def merge(cfg: Settings, values: Mapping[str, Any], where: str) -> Settings:
    """`cfg`, with `values` ("model.n_layer" -> 4) in place of its own."""
    types = types_of(type(cfg))
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key not in types:
            raise unknown_setting(key, where, type(cfg))
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = coerce(key, types[key], value, where)
    return dataclasses.replace(
        cfg, **{s: dataclasses.replace(getattr(cfg, s), **changed) for s, changed in sections.items()}
    )


def flatten(tree: Mapping[str, Any], where: str, kind: Kind = Config) -> dict[str, Any]:
    """{"model": {"n_layer": 4}} -> {"model.n_layer": 4}; UserError for anything but sections of settings."""
    flat = {}
    for section, values in tree.items():
        if not isinstance(values, Mapping):
            near = [key for key in types_of(kind) if key.endswith("." + section.replace("-", "_"))]
            hint = f"\n       did you mean {near[0]}, in a section [{near[0].split('.')[0]}]?" if near else ""
            raise UserError(f"unknown setting {section} ({where}): settings stand in sections{hint}")
        for name, value in values.items():
            flat[f"{section}.{name.replace('-', '_')}"] = value
    return flat


# ---- TOML ------------------------------------------------------------------------------------------------------------


def config_folder() -> Path:
    """The folder of the shipped configs: inside an installed wheel, or at the top of a clone."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """The path of a config file given by path or, for a shipped one, by name."""
    shipped = {path.stem: path for path in sorted(config_folder().glob("*.toml"), key=lambda path: path.stem)}
    path = Path(name)
    if path.is_file():
        return path
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise UserError(f"{name} is a directory, not a config file\n       to go on with a run: --run-dir {name}")
    raise UserError(f"no config file {name}{suggestion(name, shipped)}\n       shipped: {', '.join(shipped)}")


def read_toml(path: Path, kind: Kind = Config) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        if b"\0" in content:
            marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            encoding = "UTF-16" if marked else "UTF-16BE" if content[0] == 0 else "UTF-16LE"
            raise UserError(
                f"{path} is {encoding} or binary, and a TOML file is UTF-8 text\n"
                f"       convert it: iconv -f {encoding} -t UTF-8 {word(path)} > {word(f'{path.stem}-utf8.toml')}"
            )
        text = content.decode("utf-8-sig")  # some editors write a byte order mark
        return flatten(tomllib.loads(text), str(path), kind)
    except tomllib.TOMLDecodeError as e:
        text = "" if path.suffix.lower() == ".toml" else f"\n       to train on a text: --data.source={word(path)}"
        raise UserError(f"{path} is not valid TOML: {e}{text}") from None
    except (UnicodeDecodeError, RecursionError) as e:
        why = "nested too deeply" if isinstance(e, RecursionError) else "not UTF-8 text"
        raise UserError(f"{path} is {why}, so it cannot be a TOML file") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def render(cfg: Config, origin: Origin) -> str:
    """The settings as TOML with their origins in comments: a config file that reproduces this run."""
    lines: list[str] = []
    section = ""
    for key, value in items(cfg):
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append(f"\n[{section}]" if lines else f"[{section}]")
        setting = f"{key.split('.')[1]} = {to_toml(value)}"
        lines.append(f"{setting:<34}# {origin.get(key, 'default')}")
    return "\n".join(lines)


def to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(k)} = {to_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)  # JSON's text, numbers and booleans are TOML's too


# ---- a run's config.json ---------------------------------------------------------------------------------------------


def to_json(cfg: Config) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def read_json(path: Path, kind: type[Settings] = Config) -> Settings:
    """The settings of a run of that kind, from its config.json.

    A setting that the file lacks (an older run) has its default. UserError if a setting is unknown.
    """
    tree = _read_tree(path)
    if (CLASSIFIER in tree) != (CLASSIFIER in sections_of(kind)):
        raise UserError(kind.OTHER.format(run=path.parent, word=word(path.parent)))
    values = flatten(tree, str(path), kind)
    cfg = merge(kind(), values, str(path))
    return validate(cfg, dict.fromkeys(values, str(path)))


def is_classifier(run: Path) -> bool:
    """Whether a run directory holds a classifier, and not a language model."""
    return CLASSIFIER in _read_tree(run / "config.json")


def _read_tree(path: Path) -> dict[str, Any]:
    again = f"{program('train')} --run-dir {word(path.parent)} --overwrite"
    other = "\n       choose another run"
    remedy = f"{other}, or train it again from the start: rm {word(path)} && {again}"
    try:
        tree = json.loads(files.read(path).decode("utf-8"))
    except FileNotFoundError:
        found = [p.parent for p in sorted(path.parent.glob("*/config.json"))]
        if any(folder.name in REPLACED for folder in found):
            raise UserError(
                f"{path.parent} is being started over, or that was interrupted: give the same command again\n"
                "       what it does not begin anew, it puts back"
            ) from None
        if runs := [str(folder) for folder in found if not folder.name.startswith(".")]:
            more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
            raise UserError(f"{path.parent} is a folder of runs; name one: {', '.join(runs[:5])}{more}") from None
        if (path.parent / "checkpoints").is_dir():
            other += f", or train it again from the start: {again}"
        elif not path.parent.is_dir() or not any(path.parent.iterdir()):
            other += f", or train one there: {program('train')} --run-dir {word(path.parent)}"
        raise UserError(f"{path.parent} is not a run directory: it has no {path.name}{other}") from None
    except (ValueError, RecursionError) as e:
        why = "it is nested too deep" if isinstance(e, RecursionError) else e
        raise UserError(f"{path} is damaged: {why}{remedy}") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged: it holds no settings{remedy}")
    return tree
