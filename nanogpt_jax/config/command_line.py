"""The command line: how a person types a command, and how theirs is read."""

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanogpt_jax.config.errors import UserError, suggestion
from nanogpt_jax.config.settings import Config, Kind, sections_of, types_of

DOORS = ("train.py", "sample.py")


def program(name: str, briefly: bool = False) -> str:
    """How a person here types the command `name`: as they typed this one, "python train.py" or "nanogpt-jax train".

    `briefly`: to be read, and not to be copied; without the folder.
    """
    typed = Path(sys.argv[0])
    if typed.name in DOORS and f"{name}.py" in DOORS:
        path = typed.with_name(f"{name}.py")
        return f"python {path.name if briefly else word(path)}"
    return f"nanogpt-jax {name}"


def word(value: str | Path) -> str:
    """A path as one word of a command that a person may copy into a shell."""
    text = str(value)
    return quoted(f"./{text}" if text.startswith("-") else text)


def quoted(text: str) -> str:
    """Any word of a command for a shell. A byte that is no UTF-8 is written as bash and zsh write it."""
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return shlex.quote(text)
    escaped = "".join(
        f"\\x{byte:02x}" if byte > 126 or byte < 32 or byte in b"\\'" else chr(byte) for byte in os.fsencode(text)
    )
    return f"$'{escaped}'"


def joined(words: Iterable[str]) -> str:
    """A command to be copied into a shell."""
    return " ".join(map(quoted, words))


def unknown_flag(key: str, known: Any, command: str) -> UserError:
    """What to say of --KEY, which COMMAND does not have; `known` are the names of those it has."""
    near = suggestion(flag_of(key), [flag_of(k) for k in known if len(k) > 1])  # not -h
    near = near or f"\n       see {program(command)} --help"
    return UserError(f"unknown flag {flag_of(key)}{near}")


def flag_of(key: str) -> str:
    return f"--{key}".replace("_", "-")


def unknown_setting(key: str, where: str, kind: Kind = Config) -> UserError:
    names = {k: k.split(".")[1] for k in types_of(kind)}
    near = difflib.get_close_matches(key.split(".")[-1], sorted(names.values()))  # the section may be a wrong one
    hint = suggestion(key, [k for k, name in names.items() if name in near or k.startswith(key)])
    hint = hint or f"\n       sections are {', '.join(sections_of(kind))}; see {program(kind.COMMAND)} --help"
    return UserError(f"unknown setting {key} ({where}){hint}")


def split_arguments(
    argv: list[str], switches: tuple[str, ...], check: Callable[[str], None]
) -> tuple[list[str], dict[str, str]]:
    """Positional words, and {"model.n_layer": "8"} from `--model.n-layer 8` or `--model.n-layer=8`.

    Dashes and underscores are the same. `switches` are the flags that take no value; `check` refuses unknown ones.
    """
    words: list[str] = []
    flags: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if word.startswith("-") and len(word) > 1:
                raise UserError(f"unknown flag {word}\n       flags start with two dashes; see --help")
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        check(key)
        if key in switches:
            if equals:
                raise UserError(f"--{name} takes no value, but was given {value!r}")
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value; see --help")
            value = rest.pop(0)
        if flags.setdefault(key, value) != value:
            raise UserError(f"--{name} was given twice: {flags[key]} and {value}")
    return words, flags
