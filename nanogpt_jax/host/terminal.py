"""Standard output and error, made safe for commands.

Control characters are escaped on a terminal: texts, names and labels may come from strangers. Characters that it cannot
encode are replaced. A closed stream (`2>&-`) is opened on /dev/null. If the reader or terminal goes away, training goes
on, and other commands end without a traceback.
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

# Control characters except \n and \t, and the marks that switch the direction of writing.
OBEYED = re.compile("\r\n|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class OutputError(OSError):
    """Standard output is open but cannot be written to: a full disk."""


def visible(text: str) -> str:
    """`text` with the characters of OBEYED escaped: \\x1b, \\u202e. \\r\\n becomes \\n."""
    return OBEYED.sub(lambda found: "\n" if found[0] == "\r\n" else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return f"\\x{ord(character):02x}" if character < "\u0100" else f"\\u{ord(character):04x}"


def set_up() -> None:
    """Replace sys.stdin, sys.stdout and sys.stderr. Call it before anything is printed. A second call has no effect."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = _opened(number)
            setattr(sys, name, stream)
        if number and type(stream) is io.TextIOWrapper:  # not the streams of a notebook or a test
            stream.flush()
            setattr(sys, name, _Stream(stream, is_output=number == 1))


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """In this context a closed standard output is no error, and what is printed to it is dropped."""
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
    """`stream` without the escaping, for our own escape sequences: a bar's, a cursor's."""
    stream = _own(stream)
    return _Unfiltered(stream) if isinstance(stream, _Stream) else stream


def console() -> "Console":
    """The console of every bar: standard error. Text in a bar must first go through `visible`."""
    from rich.console import Console

    return Console(file=unfiltered(sys.stderr))


def _own(stream: TextIO) -> TextIO:
    """The stream that rich replaces by its own while it draws a bar."""
    return getattr(stream, "rich_proxied_file", stream)


def _opened(number: int) -> TextIO:
    """A stream on /dev/null under the number of a closed descriptor. Else a file of ours might get that number, and
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
    """Writes to `raw` as long as somebody reads it."""

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
                select.select([], [self._raw], [])  # it is non-blocking, and full
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
        self._kept = stream  # if collected, it would close the descriptor
        self._is_output, self._is_terminal, self._held = is_output, stream.isatty(), ""

    def write(self, text: str, /) -> int:
        if not self._is_terminal:
            return super().write(text)
        shown = self._held + text
        before = ""
        if self._is_output:  # \r\n may come in two pieces if a model writes it
            self._held = "\r" if shown.endswith("\r") else ""
            shown = shown[: len(shown) - len(self._held)]
        elif shown.startswith("\r") and not shown.startswith("\r\n"):
            # so that the bars of libraries can overwrite themselves
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
