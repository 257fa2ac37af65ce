"""Standard output and error as a command needs them, whatever they lead to.

A terminal gets no character that it would obey: texts, names and labels may come from strangers. One that lacks a
character shows another. A stream that was closed (`2>&-`) is open on nothing. A reader or terminal that goes away ends
no training, and other commands without a traceback.
"""

import contextlib
import errno
import io
import os
import re
import select
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Control characters but for \n and \t, and the marks that make a terminal write from right to left.
OBEYED = re.compile("\r\n|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class OutputError(OSError):
    """Standard output is there, and cannot be written to: a full disk."""


def visible(text: str) -> str:
    """`text` with every character that a terminal would obey as an escape: \\x1b, \\u202e. \\r\\n becomes \\n."""
    return OBEYED.sub(lambda found: "\n" if found[0] == "\r\n" else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return f"\\x{ord(character):02x}" if character < "\u0100" else f"\\u{ord(character):04x}"


def set_up() -> None:
    """Make sys.stdin, sys.stdout and sys.stderr such streams. Call it before anything is printed; twice is once."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = _opened(number)
            setattr(sys, name, stream)
        if number and type(stream) is io.TextIOWrapper:  # not a notebook's or a test's, which end nothing
            stream.flush()
            setattr(sys, name, _Stream(stream, is_output=number == 1))


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """In here a lost standard output is no error: what is printed then is lost too."""
    stream = _own(sys.stdout)
    if not isinstance(stream, _Stream):
        yield
        return
    stream.sink.is_needed = False
    try:
        yield
    finally:
        stream.flush()
        stream.sink.is_needed = True


def unfiltered(stream: TextIO) -> Any:
    """`stream`, open to escape sequences of our own: a bar's, a cursor's."""
    stream = _own(stream)
    return _Unfiltered(stream) if isinstance(stream, _Stream) else stream


def console() -> "Console":
    """What every bar is drawn on: standard error. What stands in a bar must be `visible` before."""
    from rich.console import Console

    return Console(file=unfiltered(sys.stderr))


def _own(stream: TextIO) -> TextIO:
    """`stream` itself, if rich has put its own before it while a bar is drawn."""
    return getattr(stream, "rich_proxied_file", stream)


def _opened(number: int) -> TextIO:
    """A stream on nothing in the place of a descriptor that was closed, so that no file of ours is opened in it:
    libraries write to descriptor 2, whatever it is."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(descriptor, number)
    if descriptor != number:
        os.close(descriptor)
        descriptor = number
    os.set_inheritable(descriptor, True)
    return open(descriptor, "w" if number else "r", encoding="utf-8", closefd=False)


class _Sink(io.RawIOBase):
    """Writes to `raw` as long as there is somebody behind it."""

    def __init__(self, raw: Any, is_needed: bool):
        self._raw, self.is_needed, self._is_lost = raw, is_needed, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: Any) -> int:
        try:
            while not self._is_lost:
                written = self._raw.write(data)
                if written is not None:
                    return written
                select.select([], [self._raw], [])  # somebody has made it non-blocking, and it is full
        except OSError as e:
            if self.is_needed:
                self._is_lost = True  # Python tries once more at exit, and would complain
                is_hung_up = e.errno == errno.EIO and not stat.S_ISREG(os.fstat(self.fileno()).st_mode)
                if is_hung_up or isinstance(e, ConnectionError):
                    raise BrokenPipeError(*e.args) from None
                raise OutputError(*e.args) from None
        return len(data)


class _Stream(io.TextIOWrapper):
    def __init__(self, stream: io.TextIOWrapper, is_output: bool):
        raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer
        self.sink = _Sink(raw, is_needed=is_output)
        super().__init__(
            self.sink if raw is stream.buffer else io.BufferedWriter(self.sink),  # pyright: ignore[reportArgumentType]
            encoding=stream.encoding,
            errors="replace" if is_output else "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._kept = stream  # it would close the descriptor
        self._is_output, self._is_terminal, self._held = is_output, stream.isatty(), ""

    def write(self, text: str, /) -> int:
        if not self._is_terminal:
            return super().write(text)
        shown = self._held + text
        before = ""
        if self._is_output:  # \r\n may come in two pieces, where a model writes
            self._held = "\r" if shown.endswith("\r") else ""
            shown = shown[: len(shown) - len(self._held)]
        elif shown.startswith("\r") and not shown.startswith("\r\n"):  # as bars of libraries write over themselves
            before, shown = "\r", shown[1:]
        super().write(before + visible(shown))
        return len(text)


class _Unfiltered:
    def __init__(self, stream: _Stream):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return io.TextIOWrapper.write(self._stream, text)
