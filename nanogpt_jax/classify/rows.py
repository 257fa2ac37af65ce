"""The rows of a labelled source: which are usable, their labels, and remarks for the user."""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from nanogpt_jax.config import UserError
from nanogpt_jax.host.messages import listed, printable

Label = str | int


class Example(NamedTuple):
    text: str
    label: Label
    line: int  # of the source, for messages


# ---- row by row -----------------------------------------------------------------------------------------------------


class Rows:
    """Takes the rows of a source as they are read: the text and the label of each, and what is wrong with it.

    Rows without text are skipped, with a note. All other unusable rows are named in one error.
    """

    def __init__(self, what: str):
        self.what, self.seen = what, 0
        self._blank: list[int] = []  # lines
        self._null: list[int] = []
        self._wrong: dict[str, tuple[str, list[int]]] = {}  # kind of error -> message of the first, lines of all
        self._types: dict[str, set[str]] = defaultdict(set)  # label -> the types of values that became it

    def text(self, line: int, text: Any) -> str:
        """The text, or "" if it is unusable."""
        self.seen += 1
        if _is_null(text):
            self._null.append(line)
        elif not isinstance(text, str):
            self._refuse("type", line, f"the text is {text!r:.60}, not text")
        elif not text.strip():
            self._blank.append(line)
        elif SURROGATE.search(text):
            self._refuse("half", line, "the text holds half a character, so it is not text")
        else:
            return text
        return ""

    def label(self, line: int, label: Any) -> Label:
        """The label: text or a whole number. pandas makes 1 a 1.0 if other rows have no label."""
        given = label
        if isinstance(label, bool):
            label = str(label).lower()
        elif isinstance(label, float) and label.is_integer():
            label = int(label)
        if _is_null(label):
            self._refuse("null", line, "the label is missing (null, NA)")
        elif not isinstance(label, str | int):
            self._refuse("label", line, f"the label {label!r:.60} must be text or a whole number")
        elif str(label) not in self._types and not plain(str(label)):
            self._refuse("empty", line, "the label is empty")
        elif SURROGATE.search(str(label)):
            self._refuse("half", line, "the label holds half a character, so it is not text")
        else:
            self._types[str(label)].add(next(name for kind, name in TYPES.items() if isinstance(given, kind)))
            return label
        return ""

    def _refuse(self, kind: str, line: int, message: str) -> None:
        self._wrong.setdefault(kind, (message, []))[1].append(line)

    def check(self) -> None:
        """UserError if rows are unusable, or if there are none."""
        said = []
        for message, lines in self._wrong.values():
            said.append(f"{self.what}, line {lines[0]}: {message}")
            if len(lines) > 1:
                said.append(f"in all {len(lines):,} rows: {_places(lines)}")
        if said:
            if any(kind in self._wrong for kind in ("null", "empty")):
                said.append(
                    "give each text a label, or remove the rows; a test split is often published without labels"
                )
            raise UserError("\n       ".join(said))
        if len(self._blank) + len(self._null) == self.seen:
            each = f": each of the {self.seen:,} is {self._emptiness()}" if self.seen else ""
            raise UserError(f"{self.what} holds no texts{each}")

    def _emptiness(self) -> str:
        return " or ".join(["blank"] * bool(self._blank) + ["missing (null, NA)"] * bool(self._null))

    def notes(self) -> list[str]:
        """Remarks for the user on the rows, if `check` accepts them."""
        notes = []
        if lines := sorted(self._blank + self._null):
            which = "a row is" if len(lines) == 1 else f"{len(lines):,} rows are"
            notes.append(f"{which} skipped, as the text is {self._emptiness()}: {_places(lines)}")
        if len(types := sorted({kind for kinds in self._types.values() for kind in kinds})) > 1:
            both = [printable(name) for name, kinds in self._types.items() if len(kinds) > 1]
            one = f"; one label is made of both for {listed(both)}" if both else ""
            notes.append(f"some labels are {' and some '.join(types)}: all are taken as text{one}")
        return notes


SURROGATE = re.compile("[\ud800-\udfff]")  # half a character; JSON can write one: "\\ud800"
TYPES = {bool: "true or false", int: "numbers", float: "numbers", str: "text"}


def _is_null(value: Any) -> bool:
    """Whether `value` is None or NaN, to which `datasets` and pandas convert empty cells, null and NA."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def usable(what: str, rows: list[tuple[int, Any]]) -> tuple[list[tuple[int, str]], list[str]]:
    """(line, text) of all `rows`, and the notes on them. Rows to skip have text "". UserError as in `Rows.check`."""
    found = Rows(what)
    texts = [(line, found.text(line, text)) for line, text in rows]
    found.check()
    return texts, found.notes()


def _places(lines: Sequence[int]) -> str:
    """The lines of rows, in words: lines 1, 2 and 3; of many, the first ten."""
    return f"line{'s' * (len(lines) > 1)} {listed(lines)}"


# ---- the labels of all rows ------------------------------------------------------------------------------------------


def labels_of(examples: list[Example], what: str) -> list[Label]:
    """The labels that occur: numbers in order, even if they are written as text, then names by the alphabet."""
    found = {e.label for e in examples}
    names = {str(label) for label in found}
    if len(names) < 2:
        raise UserError(
            f"{what} has the one label {printable(names.pop())}; a classifier needs two or more to tell apart"
        )
    if all(isinstance(label, int) for label in found):
        return sorted(found)  # pyright: ignore
    numbers = {name: Fraction(name) for name in names if NUMBER.fullmatch(name)}
    ordered = sorted(names, key=lambda name: (name not in numbers, numbers.get(name, 0), name))
    return [*ordered]


NUMBER = re.compile(r"[+-]?[0-9]{1,100}(\.[0-9]{1,100})?")


def plain(name: str) -> str:
    """A label as a person reads it: without case, invisible characters and repeated spaces."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) not in ("Cf", "Cc"))
    text = " ".join(seen.casefold().split())
    return str(Fraction(text)) if NUMBER.fullmatch(text) else text


def label_notes(examples: list[Example]) -> list[str]:
    """Remarks on labels that look like one, or like none at all. They are neither merged nor left out."""
    counts = Counter(str(e.label) for e in examples)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(counts):
        groups[plain(name)].append(name)
    notes = []
    for names in (group for group in groups.values() if len(group) > 1):
        looks_the_same = len({unicodedata.normalize("NFC", name) for name in names}) < len(names)
        each = listed(f"{(ascii if looks_the_same else printable)(name)} ({counts[name]:,})" for name in names)
        numbers = all(NUMBER.fullmatch(name) for name in names)
        how = "are the same number" if numbers else "differ only in spaces, case or what cannot be seen"
        notes.append(
            f"the labels {each} {how}, and are {len(names)} labels; if they are one, write them alike in the source"
        )
    if len(notes) > 6:
        notes = [*notes[:5], f"and {len(notes) - 5:,} more labels that are nearly alike"]
    if absent := [f"{printable(name)} ({n:,})" for name, n in counts.items() if name.casefold() in ABSENT]:
        count = "counts as a label" if len(absent) == 1 else "count as labels"
        notes.append(f"{listed(absent)} {count}; if that means that there is none, remove the rows")
    return notes


ABSENT = ("nan", "na", "n/a", "null", "<na>")


def contradictions(examples: list[Example]) -> list[str]:
    """A remark on texts with several labels."""
    first: dict[str, Example] = {}
    several: dict[str, dict[str, Example]] = {}  # text, label -> its first example
    for e in examples:
        other = first.setdefault(e.text, e)
        if str(other.label) != str(e.label):
            several.setdefault(e.text, {str(other.label): other}).setdefault(str(e.label), e)
    if not several:
        return []
    text = next(iter(several))
    which = "a text stands" if len(several) == 1 else f"{len(several):,} texts stand"
    each = listed(f"{printable(label)} in line {e.line}" for label, e in several[text].items())
    return [f"{which} with several labels, of which one can be right at most: {text!r:.60} is {each}"]
