"""The progress of long work, on standard error: a bar on a terminal, and elsewhere a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from nanogpt_jax.host import terminal

Item = TypeVar("Item")

LINES = 20  # without a bar: a line for each twentieth of the work,
LINE_SECONDS = 60  # and at least one a minute


@dataclass(frozen=True)
class Part:
    """Where in a larger whole some work stands."""

    title: str  # "member 3 of 9"
    after: float  # how much comes after it: 2.0 if that is twice its own work


class Progress:
    """How much of `total` is done, and the time left. total=1: shares of a whole. A context manager.

    Silent for the first `patience` seconds, in which most work is done; a bar waits a tenth of that. As a `part`, it
    also shows the time left for all, at the speed of this one.
    """

    def __init__(
        self, what: str, total: int = 1, first: int = 0, patience: float = 10, now: str = "", part: Part | None = None
    ):
        what, self._part = f"{part.title}, {what}" if part else what, part
        self._what, self._total, self._first, self._bar = terminal.visible(what), total, first, None
        self._patience = patience / 10 if sys.stderr.isatty() else patience
        self.begin(now=now)
        self._show(first)

    def begin(self, phase: str = "", now: str = "") -> None:
        """Begin a phase: what is done, and the time left, count from now."""
        self._label = f"{self._what}: {phase}" if phase else self._what
        self._began, self._bytes, self._done, self._now = time.monotonic(), 0, self._first, now
        self._next_line, self._line_due, self._for_all = float(self._first), 0.0, ""
        if self._bar:
            self._bar.reset(self._task, **self._fields(self._first))

    def update(self, done: float, now: str = "", measured: float | None = None) -> None:
        """`done` of the total. `measured`: as of the clock, if several were done at once. `now`: words beside it."""
        self._done, self._now = done, now
        self._show(done if measured is None else measured)

    def add(self, n_bytes: int) -> None:
        """Show megabytes, and how many a second."""
        self._bytes += n_bytes
        self._show(self._done)

    def say(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        print(_for(sys.stdout, text), flush=True)

    def note(self, text: str) -> None:
        """Print a line that stays, on standard error, as it is no result."""
        print(_for(sys.stderr, text), file=sys.stderr)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, measured: float) -> None:
        clock = time.monotonic()
        seconds = clock - self._began
        if seconds < self._patience:
            return
        each = seconds / (measured - self._first) if measured > self._first else 0.0
        left = each * (self._total - measured)
        if self._part and each:
            self._for_all = f", {duration(left + each * self._part.after * self._total)} for all"
        if self._bytes:
            self._now = f"{self._bytes / 1e6:,.0f} MB, {self._bytes / 1e6 / seconds:.1f} MB/s"
        if sys.stderr.isatty():
            if not self._bar:
                self._start_bar()
            assert self._bar is not None
            self._bar.update(self._task, completed=self._done, **self._fields(self._done))
        elif measured > self._first and (self._done >= self._next_line or clock >= self._line_due):
            words = [f"{self._label} {self._count()}", self._now, f"left {left:.0f} s{self._for_all}"]
            print("  ".join(word for word in words if word), file=sys.stderr, flush=True)
            self._next_line, self._line_due = self._done + self._total / LINES, clock + LINE_SECONDS

    def _count(self) -> str:
        return f"{self._done:.0%}" if self._total == 1 else f"{self._done}/{self._total}"

    def _fields(self, done: float) -> dict[str, Any]:
        total = self._total if done > self._first else None  # None: the bar moves to and fro
        words = {"count": self._count(), "now": self._now, "all": self._for_all}
        return {"description": self._label, "total": total, **words}

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description} {task.fields[count]}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[now]}  left", markup=False),
            TimeRemainingColumn(),
            *([TextColumn("{task.fields[all]}", markup=False)] if self._part else []),
        )
        # standard output is not redirected into a pipe or a file: rich would print it on standard error
        self._bar = Bar(*columns, console=terminal.console(), transient=True, redirect_stdout=sys.stdout.isatty())
        self._task = self._bar.add_task(completed=self._first, **self._fields(self._first))
        self._bar.start()


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def over(what: str, items: Iterable[Item], n: int) -> Iterator[Item]:
    """`items`, which are n, with their progress."""
    with Progress(what, n) as progress:
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(done)


def _for(stream: TextIO, text: str) -> str:
    """`text`, escaped if `stream` is a terminal. While there is a bar, rich prints, and bypasses our filter."""
    return terminal.visible(text) if stream.isatty() else text
