"""The rows of .csv and .tsv files, as different programs and people write them.

A table is read twice. The first time tells how its quotes are meant, and sees that no row swallows another.
"""

import contextlib
import csv
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanogpt_jax.config import UserError
from nanogpt_jax.data.shell import converted, filtered
from nanogpt_jax.data.swallowed import Swallowed
from nanogpt_jax.data.text_file import LineBlocks, OnProgress, line_blocks, silent

Row = tuple[int, dict[str, Any]]  # the line where it begins (of Parquet: its number), and its columns

RFC: dict[str, Any] = {}  # RFC 4180: a quote within quotes is written twice
ESCAPED: dict[str, Any] = {"escapechar": "\\", "doublequote": False}
LONGEST_CELL = 1 << 26  # characters
SEMICOLONS = "cells are separated by commas, not by semicolons, or by tabs in a .tsv"


class _Broken(Exception):
    """Why a table cannot be read in one of the ways, and the line where the broken row begins."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line, self.why = line, why


def reader(separator: str) -> Callable[[Path, str, Sequence[str] | None, OnProgress], Iterator[Row]]:
    """What reads the rows of a table; see `records.rows`."""

    def read(path: Path, what: str, columns: Sequence[str] | None, on_progress: OnProgress) -> Iterator[Row]:
        content = None
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe can be read only once
            content = path.read_bytes()

        def found(on_progress: OnProgress = silent) -> LineBlocks:
            return line_blocks(path if content is None else io.BytesIO(content), what, on_progress)

        dialect = _dialect(found, path, what, separator)
        rows = (
            _plain_rows(found(on_progress), separator)
            if dialect is None
            else _quoted_rows(found(on_progress), separator, dialect)
        )
        _, _, header = next(rows, (0, 0, None))
        if header is None:
            raise UserError(f"{what} is empty")
        _check_excel(separator.join(header), what, path)
        check_columns(header, columns, f"{what}, line 1")
        for number, _, row in rows:
            if row == header and len(row) > 1:
                raise UserError(f"{what}, line {number} repeats the header: files were joined\n       delete that line")
            yield number, dict(zip(header, row, strict=True))

    return read


def check_columns(names: Sequence[str], columns: Sequence[str] | None, where: str) -> None:
    """UserError if one of `columns` (None: of all) stands twice among `names`."""
    for name in names if columns is None else columns:
        if (n := list(names).count(name)) > 1:
            raise UserError(f"{where}: {n} columns are called {name!r}\n       rename all but the one that is meant")


def _check_excel(header: str, what: str, path: Path) -> None:
    if re.fullmatch(r'"?sep=.?"?', header):
        raise UserError(
            f"{what}, line 1 is not the header, but tells Excel how cells are separated\n"
            f"       delete that line: {filtered('sed 1d', path, converted(path))}"
        )


def separator_hint(names: Sequence[Any]) -> str:
    """A second line for an error, if the only column of a table looks like several."""
    only = str(names[0]) if len(names) == 1 else ""
    if ";" in only:
        return f"\n       {SEMICOLONS}"
    if "\t" in only:
        return "\n       tabs separate the cells of a .tsv, commas those of a .csv: name it .tsv"
    return "\n       commas separate the cells of a .csv, tabs those of a .tsv: name it .csv" if "," in only else ""


# ---- lines to cells -------------------------------------------------------------------------------------------------


def _plain_rows(found: LineBlocks, separator: str) -> Iterator[tuple[int, int, list[str]]]:
    """(line, line, cells) of each row, quotes being letters. Blank lines are passed over."""
    for first, block in found:
        for number, line in enumerate(block, first):
            if cells := line.rstrip("\r\n"):
                yield number, number, cells.split(separator)


def _quoted_rows(found: LineBlocks, separator: str, dialect: dict[str, Any]) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, last line, cells) of each row, all as many as the header's; or else _Broken."""
    csv.field_size_limit(LONGEST_CELL)
    lines = itertools.chain.from_iterable(block for _, block in found)
    reader = csv.reader(lines, delimiter=separator, strict=True, **dialect)
    width = 0
    while True:
        begin = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as e:
            if "unexpected end" in str(e) or "field larger" in str(e):
                raise _Broken(begin, "a quote opens in this row and never closes") from None
            raise _Broken(begin, f"its quotes do not fit together ({e} in line {reader.line_num})") from None
        if row is None:
            return
        width = width or len(row)
        if row and len(row) != width:
            raise _Broken(begin, f"{len(row)} cells, but the header has {width}")
        if row:
            yield begin, reader.line_num, row


# ---- what the quotes mean -------------------------------------------------------------------------------------------


def _dialect(found: Callable[[], LineBlocks], path: Path, what: str, separator: str) -> dict[str, Any] | None:
    """How the quotes of a table are meant: RFC, ESCAPED, or None if they are letters. UserError if it is no table.

    The quotes of a .csv are those of RFC 4180. If that gives no table, a quote within quotes has a backslash before it,
    provided that there are no other backslashes.

    The quotes of a .tsv are letters if each line then has as many cells as the header. They are quotes all the same if
    that gives a table too, and a program has written them, or else lines would be rows that are none by their cells, or
    a lone column has several cells of lines.
    """
    lines = _Lines(found(), separator)
    is_written, broken = _as_quotes(lines, separator)
    if separator == "\t":
        if lines.broken is None:
            return RFC if is_written and broken is None else None
        if broken is None and lines.quotes:
            return RFC
        if broken is None or not lines.quotes or lines.broken.line > broken.line:
            broken = lines.broken  # the quotes are most likely letters, and this is the row that is wrong
    elif broken is None:
        return RFC
    elif lines.escaped and not lines.backslashes and _is_table(found(), separator, ESCAPED):
        return ESCAPED
    raise _no_table(broken, path, what, separator, lines)


def _as_quotes(lines: "_Lines", separator: str) -> tuple[bool, _Broken | None]:
    """Whether the quotes of a table are meant as such, and why it is none if they are (None: it is one)."""
    quotes, swallowed = _Quotes(separator), Swallowed(separator)
    try:
        for begin, end, row in _quoted_rows(iter(lines), separator, RFC):
            swallowed.see(begin, end, row)
            quotes.see(row, lines.line(end) if begin == end else None)
        if not quotes.everywhere:
            _check_swallowed(swallowed, quotes.by_program)
    except _Broken as e:
        lines.finish()
        return quotes.by_program, e
    return quotes.by_program or swallowed.none_for_sure() or (lines.width == 1 and quotes.wrap_lines), None


def _is_table(found: LineBlocks, separator: str, dialect: dict[str, Any]) -> bool:
    swallowed = Swallowed(separator)
    with contextlib.suppress(_Broken):
        for begin, end, row in _quoted_rows(found, separator, dialect):
            swallowed.see(begin, end, row)
        _check_swallowed(swallowed, by_program=False)
        return True
    return False


def _check_swallowed(swallowed: Swallowed, by_program: bool) -> None:
    """_Broken if a row has swallowed others."""
    if row := swallowed.first(by_program):
        why = f"a quote opens in this row and closes in line {row.end}, and the lines within are rows"
        raise _Broken(row.begin, why)


def _no_table(broken: _Broken, path: Path, what: str, separator: str, lines: "_Lines") -> UserError:
    name, quotes = ("tabs", "") if separator == "\t" else ("commas", "quotes, ")
    remedy = f"a cell with {quotes}{name} or line breaks stands in quotes, and a quote within is written twice"
    _check_excel(lines.header, what, path)
    if lines.width == 1 and (hint := separator_hint([lines.header])):
        return UserError(f"{what}, line {broken.line}: {broken.why}{hint}")
    if lines.escaped and "quote" in broken.why:
        command = filtered('sed \'s/\\\\"/""/g\'', path, converted(path))
        remedy += f'; to make such of \\": {command}'
    return UserError(f"{what}, line {broken.line}: {broken.why}\n       {remedy}")


class _Lines:
    """The lines of a table on their way to another reader, and what they are if quotes are letters."""

    def __init__(self, found: LineBlocks, separator: str) -> None:
        self._found, self._separator = found, separator
        self._block: list[str] = []  # the last that was read
        self._first = 0
        self.header, self.width = "", 0  # the first line that is not blank, and its cells
        self.broken: _Broken | None = None  # of a .tsv: why they are no rows
        self.quotes = self.escaped = self.backslashes = False  # any; \" among them; other backslashes than \" and \\

    def __iter__(self) -> LineBlocks:
        for first, block in self._found:
            self._first, self._block = first, block
            if not self.header:
                self.header = next(filter(None, (line.rstrip("\r\n") for line in block)), "")
                self.width = self.header.count(self._separator) + 1
            if self._separator == "\t" and self.broken is None:
                self._count()
            text = "".join(self._block)
            self.quotes = self.quotes or '"' in text
            if "\\" in text:
                self.escaped = self.escaped or '\\"' in text
                self.backslashes = self.backslashes or bool(re.search(r"""\\[^"\\]""", text.replace("\\\\", "")))
            yield self._first, self._block

    def _count(self) -> None:
        for number, line in enumerate(self._block, self._first):
            if (cells := line.rstrip("\r\n")) and (n := cells.count(self._separator) + 1) != self.width:
                self.broken = _Broken(number, f"{n} cells, but the header has {self.width}")
                return

    def line(self, number: int) -> str:
        """One of those that were read last, without its end."""
        return self._block[number - self._first].rstrip("\r\n")

    def finish(self) -> None:
        """Read what the other reader has left."""
        for _ in self:
            pass


class _Quotes:
    """Signs of who has written the quotes of a table: a program, or a person who may have meant letters."""

    def __init__(self, separator: str) -> None:
        self._separator = separator
        self._is_header, self._in_header = True, False  # whether the next row is the header; whether that has quotes
        self._doubled = self._stray = False  # some quotes within quotes, within a cell without quotes
        self._broken_lines = 0  # rows of several lines
        self.everywhere = True  # each line has some, and the header has them around each name

    @property
    def by_program(self) -> bool:
        """The header has quotes, or some are doubled within quotes and none stands within a cell without quotes."""
        return self._in_header or (self._doubled and not self._stray)

    @property
    def wrap_lines(self) -> bool:
        """Several cells have lines within quotes, and no quote stands anywhere else: signs enough for a lone column."""
        return self._broken_lines > 1 and not self._stray

    def see(self, row: list[str], line: str | None) -> None:
        """Add a row, and its line (None: it has several)."""
        is_header, self._is_header = self._is_header, False
        if line is None:
            self._broken_lines += 1
            self._doubled = self._doubled or any('"' in cell and "\n" in cell for cell in row)
            return
        if '"' not in line:
            self.everywhere = False
            return
        if is_header:
            self._in_header = line.startswith('"')
            self.everywhere = line == self._separator.join(f'"{cell}"' for cell in row)
        written = line.split(self._separator)
        if len(written) != len(row):  # a cell holds separators; quotes within cells then count as stray
            written = row
        for cell, raw in zip(row, written, strict=True):
            if '"' in cell:
                self._stray = self._stray or cell == raw
                self._doubled = self._doubled or cell != raw
