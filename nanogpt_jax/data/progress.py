"""The progress of a preparation."""

import sys
import time

from nanogpt_jax.host import terminal


class Progress:
    """Megabytes, MB/s and time left: a bar on a terminal, elsewhere a line now and then. Silent for the first second,
    in which most texts are done."""

    def __init__(self, title: str):
        self._title = title
        self._bar = None
        self.begin("reading")

    def begin(self, phase: str) -> None:
        self._phase, self._bytes, self._share = phase, 0, 0.0
        self._began = time.monotonic()
        self._next = self._began + (1 if sys.stderr.isatty() else 10)
        if self._bar:
            self._bar.reset(self._task, phase=phase, speed="")

    def update(self, share: float) -> None:
        self._share = share
        self._show()

    def add(self, n_bytes: int) -> None:
        self._bytes += n_bytes
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        seconds = now - self._began
        speed = f"{self._bytes / 1e6:,.0f} MB, {self._bytes / 1e6 / seconds:.1f} MB/s" if self._bytes else ""
        if sys.stderr.isatty():
            self._next = now + 0.1
            if not self._bar:
                self._start_bar()
            assert self._bar is not None
            self._bar.update(
                self._task, phase=self._phase, speed=speed, completed=self._share, total=1 if self._share else None
            )
        else:
            self._next = now + 10
            left = f", {seconds / self._share * (1 - self._share):.0f} s left" if self._share else ""
            print(f"{self._title}: {self._phase}, {self._share:.0%} {speed}{left}", file=sys.stderr, flush=True)

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}: {task.fields[phase]}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[speed]}  left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=terminal.console(), transient=True)
        self._task = self._bar.add_task(terminal.visible(self._title), total=None, phase=self._phase, speed="")
        self._bar.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
