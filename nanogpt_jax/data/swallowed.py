"""Finds rows of a table that have swallowed others: a stray quote opens a cell, and another one closes it.

The lines inside such a cell are rows: they have the header's number of cells, and their cells fit columns of labels,
numbers or times.
"""

import re
from typing import NamedTuple

FEW = 1000  # most different values in a column of labels
KINDS = [  # of numbers and times; a column has the first kind that all its cells match
    re.compile(r"[-+]?[0-9]+"),
    re.compile(r"[-+]?[0-9]*\.[0-9]+"),
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?%?"),
    re.compile(r"[0-9]{4}[-/.][0-9]{1,2}[-/.][0-9]{1,2}(?:[ T][0-9:.]+(?:Z|[-+][0-9:]+)?)?"),
    re.compile(r"[0-9]{1,2}[-/.][0-9]{1,2}[-/.](?:[0-9]{4}|[0-9]{2})(?: [0-9:.]+)?"),
    re.compile(r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?"),
]


class Doubt(NamedTuple):
    """A row with a cell whose lines may be rows."""

    begin: int  # its first and last line
    end: int
    column: int  # of the cell
    inside: list[tuple[int, str]]  # (column, value) of the rows inside, without cells cut by the quotes


class Swallowed:
    """Collects what the columns of a table hold, and which rows may have swallowed others, row by row."""

    def __init__(self, separator: str) -> None:
        self._separator = separator
        self._values: list[set[str] | None] = []  # of each column, without lines in doubt; None: too many
        self._kinds: list[list[re.Pattern[str]]] = []  # those that match all cells of each column
        self._rows = 0  # counting the lines in doubt as rows
        self._doubts: list[Doubt] = []

    def see(self, begin: int, end: int, row: list[str]) -> None:
        """Add a row with its first and last line number."""
        if not self._values:  # the header
            self._values, self._kinds = [set() for _ in row], [KINDS for _ in row]
        elif begin == end:
            self._rows += 1
            for i, cell in enumerate(row):
                self._know(i, cell)
        elif len(self._doubts) < FEW:
            for i, cell in enumerate(row):
                if lines := self._rows_within(cell, i, len(row)):
                    first, *between, last = lines
                    inside = [*enumerate(first[1:], i + 1), *(pair for b in between for pair in enumerate(b))]
                    self._doubts.append(Doubt(begin, end, i, [*inside, *enumerate(last[:-1])]))
                    self._rows += len(lines)
                    for j in {*range(len(row))} - {i}:
                        self._know(j, row[j])
                    break

    def _rows_within(self, cell: str, i: int, width: int) -> list[list[str]]:
        """The cells of each line inside a cell of column i, if these lines are rows; else []. The first line has the
        columns from i on, the last those up to i, the others all."""
        lines = [line.split(self._separator) for line in cell.splitlines()]
        wanted = [width - i, *(width for _ in lines[2:]), i + 1]
        return lines if [len(line) for line in lines] == wanted else []

    def _know(self, i: int, cell: str) -> None:
        values = self._values[i]
        if values is not None and cell in values:
            return
        if self._kinds[i]:
            self._kinds[i] = [kind for kind in self._kinds[i] if kind.fullmatch(cell)]
        if values is not None:
            values.add(cell)
            if len(values) > FEW or len(cell) > 100:
                self._values[i] = None

    def first(self, by_program: bool) -> Doubt | None:
        """The first row that has swallowed others; None if there is none.

        If a program has written the quotes, every column that can decide must agree; else one suffices.
        """
        for doubt in self._doubts:
            signs = self._signs(doubt, by_program)
            if signs and (all(signs) if by_program else any(signs)):
                return doubt
        return None

    def none_for_sure(self) -> bool:
        """Whether there are cells whose lines could be rows, and the columns show that none of them is."""
        return bool(self._doubts) and all(
            (signs := self._signs(doubt, by_program=False)) and not any(signs) for doubt in self._doubts
        )

    def _signs(self, doubt: Doubt, by_program: bool) -> list[bool]:
        """For each column that can decide, whether the values of the lines inside fit it."""
        columns = {i for i, _ in doubt.inside} - {doubt.column}
        likes = [self._is_like(i, [value for j, value in doubt.inside if j == i], by_program) for i in columns]
        return [like for like in likes if like is not None]

    def _is_like(self, i: int, values: list[str], by_program: bool) -> bool | None:
        """Whether `values` fit column i; None if it holds neither labels nor numbers nor times.

        Against quotes by a program, it takes two labels, or three numbers in a column that is not also of labels.
        """
        known = self._values[i]
        kinds = self._kinds[i] if known != set() else []  # without values, every kind is possible
        labels = known if known and 2 * len(known) <= self._rows else None
        if labels is None and not kinds:
            return None
        if labels is not None and labels.issuperset(values) and len(values) >= (2 if by_program else 1):
            return True
        if not kinds or (by_program and labels is not None):
            return False
        return len(values) >= (3 if by_program else 1) and all(kinds[0].fullmatch(value) for value in values)
