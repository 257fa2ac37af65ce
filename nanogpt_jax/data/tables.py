"""The rows of .csv and .tsv files, as different programs and people write them.

A table is read twice. The first pass finds out what its quotes mean, and whether a row has swallowed others.
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

Row = tuple[int, dict[str, Any]]  # the number of its first line (in Parquet: of the row), and its columns

RFC: dict[str, Any] = {}  # RFC 4180: a quote inside quotes is doubled
ESCAPED: dict[str, Any] = {"escapechar": "\\", "doublequote": False}
LONGEST_CELL = 1 << 26  # characters
SEMICOLONS = "cells are separated by commas, not by semicolons, or by tabs in a .tsv"


class _Broken(Exception):
    """Why a table cannot be read with some meaning of its quotes, and the first line of the broken row."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line, self.why = line, why


def reader(separator: str) -> Callable[[Path, str, Sequence[str] | None, OnProgress], Iterator[Row]]:
    """A reader of the rows of a table; see `records.rows`."""

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
    """UserError if one of `columns` (None: of all) occurs twice in `names`."""
    for name in names if columns is None else columns:
        if (n := list(names).count(name)) > 1:
            raise UserError(f"{where}: {n} columns are called {name!r}\n       rename all but one")


def _check_excel(header: str, what: str, path: Path) -> None:
    if re.fullmatch(r'"?sep=.?"?', header):
        raise UserError(
            f"{what}, line 1 is not the header, but names the separator for Excel\n"
            f"       delete that line: {filtered('sed 1d', path, converted(path))}"
        )


def separator_hint(names: Sequence[Any]) -> str:
    """A second line for an error if the only column of a table looks like several; else ""."""
    only = str(names[0]) if len(names) == 1 else ""
    if ";" in only:
        return f"\n       {SEMICOLONS}"
    if "\t" in only:
        return "\n       tabs separate the cells of a .tsv, commas those of a .csv: name it .tsv"
    return "\n       commas separate the cells of a .csv, tabs those of a .tsv: name it .csv" if "," in only else ""


# ---- lines to cells -------------------------------------------------------------------------------------------------


def _plain_rows(found: LineBlocks, separator: str) -> Iterator[tuple[int, int, list[str]]]:
    """(line, line, cells) of each row, with quotes as plain characters. Blank lines are skipped."""
    for first, block in found:
        for number, line in enumerate(block, first):
            if cells := line.rstrip("\r\n"):
                yield number, number, cells.split(separator)


def _quoted_rows(found: LineBlocks, separator: str, dialect: dict[str, Any]) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, last line, cells) of each row. _Broken unless all have as many cells as the header."""
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
            raise _Broken(begin, f"its quotes do not match ({e} in line {reader.line_num})") from None
        if row is None:
            return
        width = width or len(row)
        if row and len(row) != width:
            raise _Broken(begin, f"{len(row)} cells, but the header has {width}")
        if row:
            yield begin, reader.line_num, row


# ---- what the quotes mean -------------------------------------------------------------------------------------------


def _dialect(found: Callable[[], LineBlocks], path: Path, what: str, separator: str) -> dict[str, Any] | None:
    """What the quotes of a table mean: RFC, ESCAPED, or None for plain characters. UserError if it is not a table.

    The quotes of a .csv follow RFC 4180. If that gives no table, a quote inside quotes has a backslash before it,
    unless there are other backslashes.

    The quotes of a .tsv are plain characters if each line then has as many cells as the header. They are quotes all the
    same if that gives a table too, and one of these holds: a program has written them; lines that would be rows do not
    fit the columns; or a lone column has several cells with line breaks.
    """
    lines = _Lines(found(), separator)
    is_written, broken = _as_quotes(lines, separator)
    if separator == "\t":
        if lines.broken is None:
            return RFC if is_written and broken is None else None
        if broken is None and lines.quotes:
            return RFC
        if broken is None or not lines.quotes or lines.broken.line > broken.line:
            broken = lines.broken  # the quotes are most likely plain, and this row is wrong
    elif broken is None:
        return RFC
    elif lines.escaped and not lines.backslashes and _is_table(found(), separator, ESCAPED):
        return ESCAPED
    raise _no_table(broken, path, what, separator, lines)


def _as_quotes(lines: "_Lines", separator: str) -> tuple[bool, _Broken | None]:
    """Whether quotes are meant as such, and if so, why this is not a table (None: it is one)."""
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
        why = f"a quote opens in this row and closes in line {row.end}, and the lines between are rows"
        raise _Broken(row.begin, why)


def _no_table(broken: _Broken, path: Path, what: str, separator: str, lines: "_Lines") -> UserError:
    name, quotes = ("tabs", "") if separator == "\t" else ("commas", "quotes, ")
    remedy = f"a cell with {quotes}{name} or line breaks must be in quotes, and quotes inside it doubled"
    _check_excel(lines.header, what, path)
    if lines.width == 1 and (hint := separator_hint([lines.header])):
        return UserError(f"{what}, line {broken.line}: {broken.why}{hint}")
    if lines.escaped and "quote" in broken.why:
        command = filtered('sed \'s/\\\\"/""/g\'', path, converted(path))
        remedy += f'; to double each \\": {command}'
    return UserError(f"{what}, line {broken.line}: {broken.why}\n       {remedy}")


class _Lines:
    """Passes the lines of a table to another reader, and checks them with quotes as plain characters."""

    def __init__(self, found: LineBlocks, separator: str) -> None:
        self._found, self._separator = found, separator
        self._block: list[str] = []  # the block that was read last
        self._first = 0
        self.header, self.width = "", 0  # the first line that is not blank, and its cells
        self.broken: _Broken | None = None  # for a .tsv: why they are not rows
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
        """A line of the last block, without its line end."""
        return self._block[number - self._first].rstrip("\r\n")

    def finish(self) -> None:
        """Read the lines that the other reader has left."""
        for _ in self:
            pass


class _Quotes:
    """Evidence of who wrote the quotes of a table: a program, or a person who may have meant plain characters."""

    def __init__(self, separator: str) -> None:
        self._separator = separator
        self._is_header = True  # the next row is
        self._in_header = False  # the header has quotes
        self._doubled = self._stray = False  # a doubled quote inside quotes; a quote inside an unquoted cell
        self._broken_lines = 0  # rows of several lines
        self.everywhere = True  # each line has quotes, and the header has them around each name

    @property
    def by_program(self) -> bool:
        """The header has quotes, or some are doubled inside quotes and none is in an unquoted cell."""
        return self._in_header or (self._doubled and not self._stray)

    @property
    def wrap_lines(self) -> bool:
        """Several cells have line breaks inside quotes, and there are no other quotes: enough for a lone column."""
        return self._broken_lines > 1 and not self._stray

    def see(self, row: list[str], line: str | None) -> None:
        """Add a row with its line (None: it has several)."""
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
        if len(written) != len(row):  # a cell holds separators; then quotes inside cells count as stray
            written = row
        for cell, raw in zip(row, written, strict=True):
            if '"' in cell:
                self._stray = self._stray or cell == raw
                self._doubled = self._doubled or cell != raw
