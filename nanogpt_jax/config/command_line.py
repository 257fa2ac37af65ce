"""Reads command lines, and says how to type a command, and how to type it again.

A command line is two things: a class whose fields are its flags, and a `CommandLine` over it. For example:

    @dataclass(frozen=True)
    class Options(command_line.Options):
        seed: int = flag("N", "the same seed gives the same text", 1337, must=AT_LEAST_1)
        overwrite: bool = flag("", "overwrite old files", False)

    EXPORT = CommandLine("export-hf", Options, "Writes a run for transformers.", {"RUN": "a run directory"})
    EXPORT.read(["runs/mine", "--seed=3"]).seed == 3
"""

import difflib
import json
import keyword
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from nanogpt_jax.config.errors import UserError, suggestion
from nanogpt_jax.config.settings import Config, Kind, items, meanings, sections_of, types_of
from nanogpt_jax.config.validate import MOST_STEPS

DOORS = ("train.py", "sample.py")


def program(name: str, briefly: bool = False) -> str:
    """How to type the command `name`, in the way in which this one was typed: "python train.py" or "nanogpt-jax train".

    `briefly`: without the folder, for reading and not for copying.
    """
    typed = Path(sys.argv[0])
    if typed.name in DOORS and f"{name}.py" in DOORS:
        path = typed.with_name(f"{name}.py")
        return f"python {path.name if briefly else word(path)}"
    return f"nanogpt-jax {name}"


def word(value: str | Path) -> str:
    """A path as one word of a command that can be pasted into a shell."""
    text = str(value)
    return quoted(f"./{text}" if text.startswith("-") else text)


def quoted(text: str) -> str:
    """A word of a command, quoted for a shell. A byte that is not UTF-8 is written as bash and zsh write it."""
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return shlex.quote(text)
    escaped = "".join(
        f"\\x{byte:02x}" if byte > 126 or byte < 32 or byte in b"\\'" else chr(byte) for byte in os.fsencode(text)
    )
    return f"$'{escaped}'"


def joined(words: Iterable[str]) -> str:
    """A command that can be pasted into a shell."""
    return " ".join(map(quoted, words))


def command_again(argv: list[str], steps: int | None = None, name: str = "train") -> str:
    """The command that resumes a run: the one that was typed, with other `steps` if given."""
    more = ["--train.steps", str(min(steps, MOST_STEPS))] if steps else []
    without = ("--resume", "--train.steps") if steps else ("--resume",)
    return joined([*shlex.split(program(name)), *_edited(argv, (*without, "--overwrite"), *more)])


def typed_again(without: tuple[str, ...] = (), *more: str) -> str:
    """The command line of this process, edited, for people to type. "" if the process is another program."""
    path = Path(sys.argv[0])
    if path.name in DOORS:
        words = ["python", sys.argv[0]]
    elif path.name == "__main__.py":
        words = ["python", "-m", "nanogpt_jax"]
    elif path.name == "nanogpt-jax":
        words = ["nanogpt-jax"]
    else:
        return ""
    return joined([*words, *_edited(sys.argv[1:], without, *more)])


def _edited(argv: list[str], without: tuple[str, ...], *more: str) -> list[str]:
    """A command line without some flags and their values, and with `more`. Behind `--` nothing is a flag."""
    end = argv.index("--") if "--" in argv else len(argv)
    words, skip = [], False
    for typed in argv[:end]:
        name, equals, _ = typed.partition("=")
        dropped = name.replace("_", "-") in without
        if not skip and not dropped:
            words.append(typed)
        skip = not skip and dropped and not equals and name != "--overwrite"
    return [*words, *more, *argv[end:]]


def unknown_setting(key: str, where: str, kind: Kind = Config) -> UserError:
    names = {k: k.split(".")[1] for k in types_of(kind)}
    near = difflib.get_close_matches(key.split(".")[-1], sorted(names.values()))  # the section may be wrong
    hint = suggestion(key, [k for k, name in names.items() if name in near or k.startswith(key)])
    hint = hint or f"\n       sections are {', '.join(sections_of(kind))}; see {program(kind.COMMAND)} --help"
    return UserError(f"unknown setting {key} ({where}){hint}")


# ---- one table of flags a command -----------------------------------------------------------------------------------

Must = tuple[str, Callable[[Any], bool]]  # a condition on a value, in words and as a test
AT_LEAST_1: Must = ("be at least 1", lambda n: n >= 1)
COUNT: Must = ("be a whole number, at least 1", lambda n: n >= 1)


@dataclass(frozen=True)
class Flag:
    metavar: str  # names its value in --help; "": a switch, or the choices of a Literal
    meaning: str  # its line in --help, without the default
    must: Must | None
    heading: str  # a paragraph above it in --help


def flag(metavar: str, meaning: str, default: Any = None, *, must: Must | None = None, heading: str = "") -> Any:
    """A field of an `Options` class: `--NAME VALUE`.

    Its type says how the value is read: int, float, Path, str or a Literal of texts, each `| None` if it may be absent;
    bool is a switch, and tuple[str, ...] may be given several times. --help appends "(default: ...)" unless `meaning`
    has one.
    """
    return field(default=default, metadata={"flag": Flag(metavar, meaning, must, heading)})


@dataclass(frozen=True)
class Options:
    """A parsed command line. The fields of a subclass, each made by `flag`, are the flags of a command."""

    words: list[str]  # all that are not flags; after -- nothing is a flag
    settings: dict[str, str]  # {"model.n_layer": "8"}, if the command takes settings

    def of_one_run(self) -> Self:
        """These options; UserError if they name several runs."""
        if len(self.words) > 1:
            raise UserError(f"one run at a time, but got {', '.join(self.words)}")
        return self


Read = TypeVar("Read", bound=Options)


@dataclass(frozen=True)
class CommandLine(Generic[Read]):
    """The table of one command: it reads argv, refuses invalid flags by name, and writes --help.

    In the names of flags, dashes and underscores are the same.
    """

    name: str  # "classify eval"
    options: type[Read]
    about: str
    words: Mapping[str, str] = field(default_factory=dict)  # "[RUN]" -> what it is; "" if `about` says it
    after: str = ""  # a paragraph at the end of --help
    kind: Kind | None = None  # whose settings are flags too: --model.n-layer
    section: str = ""  # only settings of this section are flags, also by their short names: --tokenizer

    def read(self, argv: list[str]) -> Read:
        """UserError if a flag is unknown, lacks its value or has an invalid one."""
        flags, hints, settings = self._flags(), get_type_hints(self.options), self._settings()
        end = argv.index("--") if "--" in argv else len(argv)
        words: list[str] = []
        given: dict[str, list[str]] = {}
        rest = argv[:end]
        while rest:
            word = rest.pop(0)
            if not word.startswith("--"):
                if word.startswith("-") and len(word) > 1:
                    raise UserError(f"unknown flag {word}\n       flags start with two dashes; see --help")
                words.append(word)
                continue
            name, equals, text = word[2:].partition("=")
            key = name.replace("-", "_")
            key = f"{key}_" if keyword.iskeyword(key) else key  # no field can be called "in"
            key = f"{self.section}.{key}" if f"{self.section}.{key}" in settings else key
            if key not in flags and key not in settings:
                raise self._unknown(key)
            if hints.get(key) is bool:
                if equals:
                    raise UserError(f"--{name} takes no value, but was given {text!r}")
            elif not equals:
                if not rest or rest[0].startswith("--"):
                    raise UserError(f"--{name} needs a value; see --help")
                text = rest.pop(0)
            before = given.setdefault(key, [])
            if before and before != [text] and get_origin(hints.get(key)) is not tuple:
                raise UserError(f"--{name} was given twice: {before[0]} and {text}")
            before.append(text)
        values = {key: _value(key, hints[key], flags[key].must, texts) for key, texts in given.items() if key in flags}
        chosen = {key: texts[0] for key, texts in given.items() if key in settings}
        return self.options([*words, *argv[end + 1 :]], chosen, **values)

    def help(self) -> str:
        """The page of --help, as wide as the terminal, and at most 108 columns."""
        width = min(shutil.get_terminal_size((110, 24)).columns, 110) - 2
        grammar = [*self.words, "[--FLAG VALUE ...]", *(["[--SECTION.NAME VALUE ...]"] if self._is_wide() else [])]
        usage = " ".join(["usage:", program(self.name, briefly=True), *grammar])
        rows = [*self._word_rows(), *self._flag_rows()]
        after = self.after
        if self.kind and self._is_wide() and self.name != self.kind.COMMAND:  # train.py's --help lists them
            after = f"Settings are those of train.py: see {program(Config.COMMAND)} --help"
        else:
            rows += self._settings_rows()
        column = min(34, 4 + max((len(row[0]) for row in rows if isinstance(row, tuple)), default=0))
        table = [_row(*row, column, width) if isinstance(row, tuple) else f"\n{_filled(row, width)}" for row in rows]
        parts = (_filled(usage, width), _filled(self.about, width), "\n".join(table).strip("\n"), _filled(after, width))
        return "\n\n".join(filter(None, parts))

    # rows of --help: (a flag, its meaning), or a heading

    def _word_rows(self) -> list[str | tuple[str, str]]:
        return [(name.strip("[]. "), what) for name, what in self.words.items() if what]

    def _flag_rows(self) -> list[str | tuple[str, str]]:
        rows: list[str | tuple[str, str]] = []
        hints, defaults = get_type_hints(self.options), {one.name: one.default for one in fields(self.options)}
        for key, one in self._flags().items():
            rows += [one.heading] if one.heading else []
            metavar, default = one.metavar or "|".join(_choices(hints[key])), defaults[key]
            told = default is None or default is False or default == () or "(default" in one.meaning
            rows.append((f"{flag_of(key)} {metavar}".strip(), one.meaning if told else _with(one.meaning, default)))
        return rows

    def _settings_rows(self) -> list[str | tuple[str, str]]:
        kinds = {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT", dict[str, float]: "A=3,B=1"}
        rows: list[str | tuple[str, str]] = []
        if self.kind is None:
            return rows
        sections, defaults, before = sections_of(self.kind), dict(items(self.kind())), self.section
        for key, hint in self._settings().items():
            section, name = key.split(".")
            rows += [f"{section}:"] if section != before else []
            before = section
            metavar = kinds.get(hint) or f"{{{','.join(_choices(hint))}}}"
            meaning = _with(meanings(sections[section])[name], defaults[key])
            rows.append((f"{flag_of(name if self.section else key)} {metavar}", meaning))
        return rows

    def _flags(self) -> dict[str, Flag]:
        return {one.name: one.metadata["flag"] for one in fields(self.options) if one.metadata}

    def _settings(self) -> dict[str, Any]:
        """The settings that are flags: "model.n_layer" -> int."""
        types = types_of(self.kind) if self.kind else {}
        return {key: hint for key, hint in types.items() if self.section in ("", key.split(".")[0])}

    def _is_wide(self) -> bool:
        """Whether the settings of all sections are flags."""
        return self.kind is not None and not self.section

    def _unknown(self, key: str) -> UserError:
        if self.kind and self._is_wide() and "." in key:
            return unknown_setting(key, "command line", self.kind)
        settings = self._settings()
        full = [k for k in settings if k.endswith(f".{key}")]
        known = [*self._flags(), *(k.removeprefix(f"{self.section}.") for k in settings if self.section)]
        near = f"\n       did you mean --{full[0]}?" if full else suggestion(flag_of(key), map(flag_of, known))
        where, form = (" (command line)", "settings are --SECTION.NAME; ") if self._is_wide() else ("", "")
        near = near or f"\n       {form}see {program(self.name)} --help"
        return UserError(f"unknown flag {flag_of(key)}{where}{near}")


def flag_of(key: str) -> str:
    """The flag of a field: "--batch-size" of batch_size, "--in" of in_."""
    return f"--{key}".removesuffix("_").replace("_", "-")


def _choices(hint: Any) -> tuple[str, ...]:
    """The texts of a Literal or of Literal | None; () for another type."""
    for one in (hint, *get_args(hint)):
        if get_origin(one) is Literal:
            return get_args(one)
    return ()


def _value(key: str, hint: Any, must: Must | None, texts: list[str]) -> Any:
    """The typed text as the type of the flag; UserError if it is none of its values."""
    if hint is bool:
        return True
    if get_origin(hint) is tuple:
        return tuple(texts)
    choices = _choices(hint)
    kind = str if choices else next(iter(get_args(hint)), hint)  # int | None -> int
    try:
        value = kind(texts[0])
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{flag_of(key)}={texts[0]} must be {wanted}") from None
    if choices and value not in choices:
        raise UserError(f"{flag_of(key)}={value} is not one of {', '.join(choices)}")
    if must and not must[1](value):
        raise UserError(f"{flag_of(key)}={value} must {must[0]}")
    return value


def _with(meaning: str, default: Any) -> str:
    return f"{meaning} (default: {default if isinstance(default, str) else json.dumps(default)})"


UNBROKEN: Any = {"break_on_hyphens": False, "break_long_words": False}


def _filled(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width, **UNBROKEN) for line in text.splitlines())


def _row(left: str, right: str, column: int, width: int) -> str:
    """A flag and its meaning, which starts at `column`; on the next line if the flag is longer."""
    room = max(width - column, 20)
    lines = [wrapped for line in right.splitlines() for wrapped in textwrap.wrap(line, room, **UNBROKEN)]
    begin = f"  {left}"
    first = [begin.ljust(column) + lines.pop(0)] if len(begin) + 2 <= column else [begin]
    return "\n".join([*first, *(" " * column + line for line in lines)])
