"""Text from files: the one reader for corpora, prompts, and the formats of rows.

Text is UTF-8. A byte order mark is dropped at the start of a file, and, because files may be joined, of a line. A gzip
is unpacked; not_text.py refuses whatever else is not UTF-8 text. Files are streamed, so memory does not grow with them.
"""

import codecs
import contextlib
import io
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanogpt_jax.config import UserError
from nanogpt_jax.data import not_text
from nanogpt_jax.data.shell import GZIP, Source, gunzip

OnProgress = Callable[[float], None]  # receives the share of the source that has been read
LineBlocks = Iterator[tuple[int, list[str]]]  # some lines, and the number of the first

BLOCK = 1 << 16  # bytes read at a time; like PIECE in shards.py, else the heap fragments and grows
HEAD = 1 << 16  # bytes looked at to identify a file, or to explain a wrong byte
LONGEST = 1 << 28  # bytes in a line, as a row is held in memory
RATIO, UNPACKED = 200, 64 << 20  # beyond some MiB, text never unpacks to more than RATIO times its gzip
MARK = "\ufeff"


def silent(share: float) -> None:
    del share


def blocks(source: Source, what: str, on_progress: OnProgress = silent) -> Iterator[str]:
    """A text in blocks of any length. UserError if it is not text; `what` names the file in it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, foreign, at_start, last = 0, False, True, b""
    with _opened(source, what, on_progress) as file:
        while True:
            block = file.read(BLOCK)
            held = len(decoder.getstate()[0])  # bytes of a character that the last block has begun
            before, last = done - held, last[: len(last) - held]
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                good, after = last + e.object[: e.start], e.object[e.start :] + file.read(HEAD)
                foreign, title = foreign or not good.isascii(), f"{what} is not UTF-8 text"
                raise not_text.wrong_byte(source, what, title, before + e.start, good, after, foreign) from None
            if "\0" in text:
                utf8 = text.encode()
                n = utf8.index(0)
                after = utf8[n:] + file.read(HEAD)
                raise not_text.wrong_byte(source, what, f"{what} is not text", before + n, utf8[:n], after, foreign)
            done, last = done + len(block), block[-HEAD:]
            foreign = foreign or not text.isascii()
            text, at_start = _without_marks(text, at_start)
            yield text
            if not block:
                return


def _without_marks(text: str, at_start: bool) -> tuple[str, bool]:
    """`text` without marks at the start of lines, and whether it ends with a line end."""
    if MARK in text:
        text = re.sub("\n\ufeff+", "\n", text.lstrip(MARK) if at_start else text)
    return text, text.endswith("\n") if text else at_start


def whole(source: Source, what: str, most: int) -> str:
    """A whole text; UserError if it has more than `most` characters."""
    parts, length = [], 0
    for part in blocks(source, what):
        parts.append(part)
        length += len(part)
        if length > most:
            raise UserError(f"{what} is longer than {most:,} characters; give a shorter one")
    return "".join(parts)


def lines(source: Source, what: str, on_progress: OnProgress = silent) -> Iterator[tuple[int, str]]:
    """The lines of a text, with their numbers and line ends."""
    for first, block in line_blocks(source, what, on_progress):
        yield from enumerate(block, first)


def line_blocks(source: Source, what: str, on_progress: OnProgress) -> LineBlocks:
    """Lines in blocks, with their ends: LF, CR LF or, as on old Macs, CR."""
    number, offset, foreign = 0, 0, False
    with _opened(source, what, on_progress) as file:
        while block := file.read(BLOCK):
            rest = file.readline(LONGEST + 1)
            block += rest
            try:
                if len(rest) > LONGEST or b"\0" in block:
                    raise ValueError
                text = block.decode()
            except ValueError:
                raise _wrong_line(source, what, number, offset, block, file, foreign) from None
            offset += len(block)
            foreign = foreign or not text.isascii()
            found = list(io.StringIO(text, newline=""))
            yield number + 1, [line.lstrip(MARK) for line in found] if MARK in text else found
            number += len(found)


def _wrong_line(
    source: Source, what: str, number: int, offset: int, block: bytes, file: BinaryIO, foreign: bool
) -> UserError:
    """The error for the first line of `block` that is not text; `number` lines precede the block."""
    for line in block.splitlines(True):
        number += 1
        where = f"{what}, line {number}"
        if len(line) > LONGEST:
            break
        try:
            wrong, title = line.find(0), f"{where} is not text"
            line.decode()
        except UnicodeDecodeError as e:
            wrong, title = e.start, f"{where} is not UTF-8 text"
        foreign = foreign or not line[: max(0, wrong)].isascii()
        if wrong >= 0:
            after = line[wrong:] + file.read(HEAD)
            return not_text.wrong_byte(source, what, title, offset + wrong, line[:wrong], after, foreign)
        offset += len(line)
        foreign = foreign or not line.isascii()
    remedy = "a row is held in memory; cut it into several, or give it as a plain .txt"
    return UserError(f"{what}, line {number} is longer than {LONGEST >> 20} MiB\n       {remedy}")


# ---- bytes ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(source: Source, what: str, on_progress: OnProgress) -> Iterator[io.BufferedReader]:
    """The bytes of a text, unpacked."""
    try:
        with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
            yield io.BufferedReader(_Stream(_unpacked(file, source, what, on_progress)), max(BLOCK, HEAD))
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) or "null byte" in str(e):  # a NUL in the path
            raise cannot_read(what, source, e) from None
        raise


def cannot_read(what: str, source: Source, e: Exception) -> UserError:
    missing = isinstance(e, FileNotFoundError) and isinstance(source, Path) and not source.is_absolute()
    here = f" in {Path.cwd()}" if missing else ""
    return UserError(f"cannot read {what}: {getattr(e, 'strerror', None) or e}{here}")


class _Stream(io.RawIOBase):
    """A readable file over blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._held = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._held = memoryview(block)
        n = min(len(buffer), len(self._held))
        buffer[:n], self._held = self._held[:n], self._held[n:]
        return n


def _unpacked(file: BinaryIO, source: Source, what: str, on_progress: OnProgress) -> Iterator[bytes]:
    """A file in blocks, unpacked if it is a gzip. UserError if its beginning is not text."""
    blocks = _packed_blocks(file, on_progress)
    head = next(blocks, b"")
    packed = head.startswith(GZIP)
    if packed:
        blocks = _gunzipped(itertools.chain([head], blocks), source, what)
        head = next(blocks, b"")
    not_text.check_beginning(head, source, what, packed)
    yield head
    yield from blocks


def _packed_blocks(file: BinaryIO, on_progress: OnProgress) -> Iterator[bytes]:
    """The bytes of a file, still packed: HEAD at first, then BLOCK at a time."""
    try:
        size = os.fstat(file.fileno()).st_size
    except (OSError, AttributeError):
        size = 0
    done = 0
    while block := file.read(BLOCK if done else HEAD):
        done += len(block)
        if size:
            on_progress(min(1.0, done / size))
        yield block


def _gunzipped(blocks: Iterator[bytes], source: Source, what: str) -> Iterator[bytes]:
    taken = given = 0
    unpacker = zlib.decompressobj(31)
    try:
        for block in blocks:
            taken += len(block)
            more = True  # the unpacker may hold more than was requested
            while block or more:
                if unpacker.eof:  # another member follows, or padding
                    block = block.lstrip(b"\0")
                    if not block:
                        break
                    unpacker = zlib.decompressobj(31)
                out = unpacker.decompress(block, BLOCK)
                more = len(out) == BLOCK and not unpacker.eof
                block = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
                given += len(out)
                if given > max(RATIO * taken, UNPACKED):
                    raise UserError(
                        f"{what} is a gzip that unpacks to more than {RATIO} times its size, unlike any text\n"
                        f"       if that is intended, unpack it first: {gunzip(source)}"
                    )
                if out:
                    yield out
    except zlib.error as e:
        raise UserError(f"{what} is a damaged gzip: {e}\n       fetch or write it again") from None
    if not unpacker.eof:
        raise UserError(f"{what} is a gzip that ends too early\n       fetch or write it again")
