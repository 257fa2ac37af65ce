"""Text and rows out of files: the one way in which corpora, labelled texts, items and prompts are read.

Text is UTF-8. A byte order mark is dropped at the start of a file, and at the start of a line, where joined files have
one. A gzip is unpacked on the way; what else is no UTF-8 text is refused by not_text.py. Files are read in a stream, so
memory does not grow with them.

Rows come from .jsonl, .ndjson, .json, .csv, .tsv and .parquet, each with the number of the line where it begins. A new
format is one function and a line in `ROWS`.
"""

import codecs
import contextlib
import csv
import io
import itertools
import json
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from nanogpt_jax.config import UserError
from nanogpt_jax.data import not_text
from nanogpt_jax.data.not_text import Source, converted, inner, quoted, stem

Tell = Callable[[float], None]  # hears which share of the source has been read
LineBlocks = Iterator[tuple[int, list[str]]]  # some lines, and the number of the first
Row = tuple[int, dict[str, Any]]  # the line where it begins (of Parquet: its number), and its columns

BLOCK = 1 << 16  # bytes read at a time; as PIECE in prepare.py, or the heap breaks into fragments and grows
HEAD = 1 << 16  # bytes by which we tell what a file is, or what follows a wrong byte
LONGEST = 1 << 28  # bytes in a line: a row is held in memory
LONGEST_CELL = 1 << 26  # characters in a cell of a table
RATIO, UNPACKED = 200, 64 << 20  # a gzip of text does not unpack to more than RATIO times its size, beyond some MiB
MARK = "\ufeff"


def silent(share: float) -> None:
    del share


def suffix(path: Path) -> str:
    """What a file says that it is, ".jsonl" of X.JSONL and of x.jsonl.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def unit(path: Path) -> str:
    """What the number of a row counts."""
    return "row" if suffix(path) == ".parquet" else "line"


# ---- text -----------------------------------------------------------------------------------------------------------


def text_blocks(source: Source, what: str, tell: Tell = silent) -> Iterator[str]:
    """A text in blocks of any length. `what` names it in an error."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, foreign, at_start, last = 0, False, True, b""
    with _opened(source, what, tell) as file:
        while True:
            block = file.read(BLOCK)
            held = len(decoder.getstate()[0])  # bytes of a character that the last block cut
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
                raise not_text.wrong_byte(source, what, f"{what} is no text", before + n, utf8[:n], after, foreign)
            done, last = done + len(block), block[-HEAD:]
            foreign = foreign or not text.isascii()
            text, at_start = _without_marks(text, at_start)
            yield text
            if not block:
                return


def _without_marks(text: str, at_start: bool) -> tuple[str, bool]:
    """`text` without marks at the start of lines, and whether a line starts behind it."""
    if MARK in text:
        text = re.sub("\n\ufeff+", "\n", text.lstrip(MARK) if at_start else text)
    return text, text.endswith("\n") if text else at_start


def text(source: Source, what: str, most: int) -> str:
    """A whole text, which must not have more than `most` characters."""
    parts, length = [], 0
    for part in text_blocks(source, what):
        parts.append(part)
        length += len(part)
        if length > most:
            raise UserError(f"{what} is longer than {most:,} characters; give a shorter one")
    return "".join(parts)


def lines(source: Source, what: str) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers, without their ends."""
    for number, line in _lines(source, what, silent):
        yield number, line.rstrip("\r\n")


def _lines(source: Source, what: str, tell: Tell) -> Iterator[tuple[int, str]]:
    for first, block in _line_blocks(source, what, tell):
        yield from enumerate(block, first)


def _line_blocks(source: Source, what: str, tell: Tell) -> LineBlocks:
    """Lines with their ends, which are LF, CR LF or, as on old Macs, CR."""
    number, offset, foreign = 0, 0, False
    with _opened(source, what, tell) as file:
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
    """Which line of `block`, behind `number` others, is no text, and why."""
    for line in block.splitlines(True):
        number += 1
        where = f"{what}, line {number}"
        if len(line) > LONGEST:
            break
        try:
            wrong, title = line.find(0), f"{where} is no text"
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
def _opened(source: Source, what: str, tell: Tell) -> Iterator[io.BufferedReader]:
    """The bytes of a text: unpacked, and not another kind of file by their beginning."""
    try:
        with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
            yield io.BufferedReader(_Blocks(_unpacked(file, source, what, tell)), max(BLOCK, HEAD))
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) or "null byte" in str(e):  # a NUL in the path
            raise cannot_read(what, source, e) from None
        raise


def cannot_read(what: str, source: Source, e: Exception) -> UserError:
    missing = isinstance(e, FileNotFoundError) and isinstance(source, Path) and not source.is_absolute()
    here = f" in {Path.cwd()}" if missing else ""
    return UserError(f"cannot read {what}: {getattr(e, 'strerror', None) or e}{here}")


class _Blocks(io.RawIOBase):
    """Blocks of bytes, as a file."""

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


def _unpacked(file: BinaryIO, source: Source, what: str, tell: Tell) -> Iterator[bytes]:
    blocks = _blocks(file, tell)
    head = next(blocks, b"")
    packed = head.startswith(b"\x1f\x8b\x08")
    if packed:
        blocks = _gunzipped(itertools.chain([head], blocks), source, what)
        head = next(blocks, b"")
    not_text.check_beginning(head, source, what, packed)
    yield head
    yield from blocks


def _blocks(file: BinaryIO, tell: Tell) -> Iterator[bytes]:
    """Of HEAD bytes at first, then of BLOCK."""
    try:
        size = os.fstat(file.fileno()).st_size
    except (OSError, AttributeError):
        size = 0
    done = 0
    while block := file.read(BLOCK if done else HEAD):
        done += len(block)
        if size:
            tell(min(1.0, done / size))
        yield block


def _gunzipped(blocks: Iterator[bytes], source: Source, what: str) -> Iterator[bytes]:
    taken = given = 0
    unpacker = zlib.decompressobj(31)
    name = quoted(source)
    try:
        for block in blocks:
            taken += len(block)
            more = True  # an unpacker may hold more than it was asked for
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
                        f"{what} is a gzip that unpacks to more than {RATIO} times its size, which text does not\n"
                        f"       if it is meant so, unpack it first: gunzip -c < {name} > {inner(source)}"
                    )
                if out:
                    yield out
    except zlib.error as e:
        raise UserError(f"{what} is a damaged gzip: {e}\n       fetch or write it again") from None
    if not unpacker.eof:
        raise UserError(f"{what} is a gzip that ends too early\n       fetch or write it again")


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows(source: Path, what: str, columns: Sequence[str] | None = None, tell: Tell = silent) -> Iterator[Row]:
    """The rows of a file, by its suffix; JSON lines if that says nothing. `columns` are those that matter (None: all):
    one of them that stands twice is refused, and others may be left out."""
    return ROWS.get(suffix(source), _json_lines)(source, what, columns, tell)


def _json_lines(source: Source, what: str, columns: Sequence[str] | None, tell: Tell) -> Iterator[Row]:
    """An object a line. Blank lines are passed over."""
    decode = _json_decoder(columns).decode
    first = True
    for number, line in _lines(source, what, tell):
        if not line.strip():
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as e:
            if first and getattr(e, "msg", "Extra data") != "Extra data":
                _check_lines(source, what, number)
            raise _not_json(f"{what}, line {number}", e, getattr(e, "colno", 0)) from None
        if not isinstance(row, dict):
            if first:
                _check_lines(source, what, number)
            raise _no_object(f"{what}, line {number}", line, columns)
        yield number, row
        first = False


def _check_lines(source: Source, what: str, number: int) -> None:
    """UserError if a file that should be JSON lines is a .json."""
    if not isinstance(source, Path) or not source.is_file():
        return
    try:
        if next(_json_objects(source, what, None, silent), None) is None:
            return
    except UserError:
        return
    packed = ".gz" if source.name.lower().endswith(".gz") else ""
    names = [f"{Path(not_text.stem(source)).name}{more}.json{packed}" for more in ("", "-list")]
    new = next((name for name in names if not source.with_name(name).exists()), names[-1])
    raise UserError(
        f"{what}, line {number} is not a JSON object: the file is JSON, not JSON lines\n"
        f"       name it .json: mv {quoted(source)} {quoted(source.with_name(new))}"
    )


def _json_objects(source: Source, what: str, columns: Sequence[str] | None, tell: Tell) -> Iterator[Row]:
    """The objects of a .json: an array of them, or one after the other, as JSON lines are. A few are held at a time."""
    decode = _json_decoder(columns).raw_decode
    between = re.compile(r"[\s,]*")
    held, line, needed, n, listed, closed = "", 1, 0, 0, False, False
    column = 0  # characters of the line before `held`
    for block in itertools.chain(text_blocks(source, what, tell), [None]):
        held += block or ""
        if block is not None and len(held) < needed:
            continue
        at = counted = 0
        while True:
            at = between.match(held, at).end()  # pyright: ignore[reportOptionalMemberAccess]
            line, counted = line + held.count("\n", counted, at), at
            if at == len(held):
                break
            where = f"{what}, line {line}"
            if held[at] == "[" and not listed and not n:
                listed, at = True, at + 1
            elif held[at] == "]" and listed and not closed:
                closed, at = True, at + 1
            elif held[at] != "{" or closed:
                raise _no_object(where, held[at : at + 60], columns, source, listed, closed)
            else:
                try:
                    row, end = decode(held, at)
                except json.JSONDecodeError as e:
                    cut = e.pos > len(held) - 16 or e.msg.startswith("Unterminated string")
                    if block is None or not cut:
                        line += held.count("\n", counted, e.pos)
                        colno = e.colno if "\n" in held[: e.pos] else column + e.pos + 1
                        raise _not_json(f"{what}, line {line}", e, colno) from None
                    needed = 2 * (len(held) - at)
                    if needed > 2 * LONGEST:
                        raise UserError(f"{where}: an object of more than {LONGEST >> 20} MiB is too long") from None
                    break
                except (ValueError, RecursionError) as e:
                    raise _not_json(where, e, 0) from None
                n += 1
                if n == 1 and columns:
                    _check_nesting(row, source, where, columns)
                yield line, row
                at, needed = end, 0
        column = at - held.rfind("\n", 0, at) - 1 if "\n" in held[:at] else column + at
        held = held[at:]
    if listed and not closed:
        raise UserError(f"{what} ends before its list does\n       fetch or write it again")


def _check_nesting(row: dict[str, Any], source: Source, where: str, columns: Sequence[str]) -> None:
    """UserError if the rows are inside of the one object that a file is."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and not set(columns) & set(row):
            path = source if isinstance(source, Path) else Path("rows.json")
            command = f"jq -c {shlex.quote(f'.[{json.dumps(name)}][]')} {quoted(source)}"
            raise UserError(
                f"{where}: the rows are in {name!r} of one object\n"
                f"       write them a row a line: {command} > {shlex.quote(stem(path) + '.jsonl')}"
            )


class _Twice(ValueError):
    pass


def _json_decoder(columns: Sequence[str] | None) -> json.JSONDecoder:
    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            for name in found if columns is None else columns:
                if names.count(name) > 1:
                    raise _Twice(name)
        return found

    return json.JSONDecoder(object_pairs_hook=object_of)


def _not_json(where: str, e: Exception, column: int) -> UserError:
    remedy = "mend or delete this one"
    if isinstance(e, _Twice):
        return UserError(f"{where}: {e.args[0]!r} stands twice in it\n       {remedy}")
    if isinstance(e, json.JSONDecodeError):
        wrong = f"{e.msg} at column {column}"
        if e.msg == "Extra data":
            remedy = "a line holds one JSON object, and nothing behind it; mend or delete this one"
    elif isinstance(e, RecursionError):
        wrong = "it is nested too deeply"
    else:  # int() of so many digits
        wrong = "a number has more than 4,300 digits"
    return UserError(f"{where} is not JSON: {wrong}\n       {remedy}")


def _no_object(
    where: str,
    found: str,
    columns: Sequence[str] | None,
    source: Source | None = None,
    listed: bool = False,
    closed: bool = False,
) -> UserError:
    """`source` is given of a .json, and whether a list has begun in it, and ended."""
    wanted = ", ".join(f'{json.dumps(name)}: "..."' for name in columns or [])
    like = f", like {{{wanted}}}" if wanted else ""
    hint = ""
    if source is None and found.lstrip().startswith(("[{", "[\n")):
        hint = "if the file is one list of objects, name it .json"
    elif isinstance(source, Path):
        hint = _object_hint(found, columns or ["text"], source, listed, closed)
    hint = f"\n       {hint}" if hint else ""
    return UserError(f"{where} is not a JSON object{like}, but {found.strip()[:60]}{hint}")


def _object_hint(found: str, columns: Sequence[str], source: Path, listed: bool, closed: bool) -> str:
    each = ".[] | " if listed else ""
    into = shlex.quote(f"{stem(source)}.jsonl")
    if found.startswith(("//", "/*", "#")):
        if not found.startswith("//"):
            return "JSON has no comments: delete them"
        command = _filtered(r"sed '/^[[:space:]]*\/\//d'", source, converted(source))
        return f"JSON has no comments; delete such lines: {command}"
    if found.startswith(")]}'"):
        return f"take out what is before the JSON: {_filtered(f'sed {shlex.quote(PREFIX)}', source, converted(source))}"
    if closed:
        if found.startswith("["):
            return "write the rows of these lists a row a line: " + _filtered("jq -c '.[]'", source, into)
        return "nothing may stand behind the list: delete it"
    if found.startswith("["):
        cells = ", ".join(f"{json.dumps(name)}: .[{i}]" for i, name in enumerate(columns))
        make = shlex.quote(f"{each}{{{cells}}}")
        return f"make objects of these lists, for example: {_filtered(f'jq -c {make}', source, into)}"
    if found.startswith('"'):
        make = shlex.quote(f"{each}{{{json.dumps(columns[0])}: .}}")
        return f"make objects of the texts: {_filtered(f'jq -c {make}', source, into)}"
    if re.match(r"(null|true|false|-?[0-9.]+)\b", found):
        make = shlex.quote(f"{each}objects")
        return f"to leave out what is no object: {_filtered(f'jq -c {make}', source, into)}"
    return "give a list of objects, or an object a line"


PREFIX = "1s/^)]}',*//"  # which some servers put before their JSON


def _filtered(tool: str, source: Path, into: str) -> str:
    """The command that sends a file, unpacked, through a tool."""
    if source.name.lower().endswith(".gz"):
        return f"gunzip -c < {quoted(source)} | {tool} > {into}"
    return f"{tool} {quoted(source)} > {into}"


# ---- tables ---------------------------------------------------------------------------------------------------------

# A table is read twice: the first time tells how its quotes are meant, and sees that no row swallows another.

RFC: dict[str, Any] = {}
ESCAPED: dict[str, Any] = {"escapechar": "\\", "doublequote": False}
FEW = 1000  # different values in a column that holds labels


class _Broken(Exception):
    """Why a table cannot be read in one of the ways, and the line where the broken row begins."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line, self.why = line, why


def _table(separator: str) -> Callable[[Path, str, Sequence[str] | None, Tell], Iterator[Row]]:
    def read(path: Path, what: str, columns: Sequence[str] | None, tell: Tell) -> Iterator[Row]:
        content = None
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe can be read only once
            content = path.read_bytes()

        def found(tell: Tell = silent) -> LineBlocks:
            return _line_blocks(path if content is None else io.BytesIO(content), what, tell)

        dialect = _dialect(found, path, what, separator)
        if dialect is None:
            records = _plain_rows(found(tell), separator)
        else:
            records = _quoted_rows(found(tell), separator, dialect)
        _, _, header = next(records, (0, 0, None))
        if header is None:
            raise UserError(f"{what} is empty")
        _check_excel(separator.join(header), what, path)
        _check_columns(header, columns, f"{what}, line 1")
        for number, _, row in records:
            if row == header and len(row) > 1:
                raise UserError(f"{what}, line {number} repeats the header: files were joined\n       delete that line")
            yield number, dict(zip(header, row, strict=True))

    return read


def _check_columns(names: Sequence[str], columns: Sequence[str] | None, where: str) -> None:
    for name in names if columns is None else columns:
        if (n := list(names).count(name)) > 1:
            raise UserError(f"{where}: {n} columns are called {name!r}\n       rename all but the one that is meant")


def _check_excel(header: str, what: str, path: Path) -> None:
    if re.fullmatch(r'"?sep=.?"?', header):
        raise UserError(
            f"{what}, line 1 is not the header, but tells Excel how cells are separated\n"
            f"       delete that line: {_filtered('sed 1d', path, converted(path))}"
        )


def separator_hint(names: Sequence[Any]) -> str:
    """A second line for an error, if the only column of a table looks like several."""
    only = str(names[0]) if len(names) == 1 else ""
    if ";" in only:
        return "\n       cells are separated by commas, not by semicolons, or by tabs in a .tsv"
    if "\t" in only:
        return "\n       tabs separate the cells of a .tsv, commas those of a .csv: name it .tsv"
    return "\n       commas separate the cells of a .csv, tabs those of a .tsv: name it .csv" if "," in only else ""


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


def _dialect(found: Callable[[], LineBlocks], path: Path, what: str, separator: str) -> dict[str, Any] | None:
    """How the quotes of a table are meant: RFC, ESCAPED, or None for letters. UserError if no way gives a table.

    A program has written the quotes if the header has them, or if some are doubled within quotes and none stands within
    a cell without quotes. Otherwise a person may have. It is no table if rows seem to have swallowed others. To
    believe that of a program takes more; if each line has quotes, the header's around each name, it is not asked.

    The quotes of a .csv are those of RFC 4180; or, if that gives no table, a quote within quotes has a backslash before
    it, provided that there are no other backslashes. The quotes of a .tsv are letters if each line then has as many
    cells as the header, unless they also give a table as quotes and a program has written them.
    """
    lines, broken = _Lines(found(), separator), None
    header_quoted = stray = doubled = program = False
    all_quoted = True
    try:
        swallowed = _Swallowed(separator)
        for begin, end, row in _quoted_rows(iter(lines), separator, RFC):
            swallowed.see(begin, end, row)
            if begin == end and not (lines.quotes and '"' in lines.line(end)):
                all_quoted = False
            elif begin == end:
                line = lines.line(end)
                if begin == lines.begin:
                    header_quoted = line.startswith('"')
                    all_quoted = line == separator.join(f'"{cell}"' for cell in row)
                cells = line.split(separator)
                for cell, raw in zip(row, cells if len(cells) == len(row) else row, strict=True):
                    stray = stray or ('"' in raw and cell == raw)
                    doubled = doubled or ('"' in cell and cell != raw)
            else:
                doubled = doubled or any('"' in cell and "\n" in cell for cell in row)
        program = header_quoted or (doubled and not stray)
        if not all_quoted:
            swallowed.check(program)
    except _Broken as e:
        broken = e
        lines.finish()
    if separator == "\t" and (lines.broken is None or not lines.quotes):
        if lines.broken:
            raise _no_table(lines.broken, path, what, separator, lines)
        return RFC if program and broken is None else None
    if broken is None:
        return RFC
    if separator != "\t" and lines.escaped and not lines.backslashes:
        with contextlib.suppress(_Broken):
            swallowed = _Swallowed(separator)
            for begin, end, row in _quoted_rows(found(), separator, ESCAPED):
                swallowed.see(begin, end, row)
            swallowed.check(False)
            return ESCAPED
    if separator == "\t" and lines.broken and lines.broken.line > broken.line:
        broken = lines.broken  # the quotes are most likely letters, and this is the row that is wrong
    raise _no_table(broken, path, what, separator, lines)


def _no_table(broken: _Broken, path: Path, what: str, separator: str, lines: "_Lines") -> UserError:
    name, quotes = ("tabs", "") if separator == "\t" else ("commas", "quotes, ")
    remedy = f"a cell with {quotes}{name} or line breaks stands in quotes, and a quote within is written twice"
    _check_excel(lines.header, what, path)
    if lines.width == 1 and (hint := separator_hint([lines.header])):
        return UserError(f"{what}, line {broken.line}: {broken.why}{hint}")
    if lines.escaped and "quote" in broken.why:
        remedy += f'; to make such of \\": sed \'s/\\\\"/""/g\' {quoted(path)} > {converted(path)}'
    return UserError(f"{what}, line {broken.line}: {broken.why}\n       {remedy}")


class _Lines:
    """The lines of a table as they are read by another, and what they are if quotes are letters."""

    def __init__(self, found: LineBlocks, separator: str) -> None:
        self._found, self._separator = found, separator
        self._block: list[str] = []  # the last that was read
        self._first = 0
        self.header, self.begin, self.width = "", 0, 0  # the first line that is not blank, its number, its cells
        self.broken: _Broken | None = None  # why they are no rows
        self.quotes = self.escaped = self.backslashes = False  # any; \" among them; other backslashes than \" and \\

    def __iter__(self) -> LineBlocks:
        for first, block in self._found:
            self._first, self._block = first, block
            if not self.header:
                numbered = ((number, line.rstrip("\r\n")) for number, line in enumerate(block, first))
                self.begin, self.header = next(filter(itemgetter(1), numbered), (0, ""))
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
        for _ in self:
            pass


KINDS = [  # of numbers and times; a column is of the first that all of its cells match
    re.compile(r"[-+]?[0-9]+"),
    re.compile(r"[-+]?[0-9]*\.[0-9]+"),
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?%?"),
    re.compile(r"[0-9]{4}[-/.][0-9]{1,2}[-/.][0-9]{1,2}(?:[ T][0-9:.]+(?:Z|[-+][0-9:]+)?)?"),
    re.compile(r"[0-9]{1,2}[-/.][0-9]{1,2}[-/.](?:[0-9]{4}|[0-9]{2})(?: [0-9:.]+)?"),
    re.compile(r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?"),
]


class _Swallowed:
    """Rows that look as if a quote had swallowed others: it opens a cell by mistake and finds another to close it.

    The lines within such a cell are rows: they have the header's number of cells, and where a column holds labels,
    numbers or times, it holds one there too.
    """

    def __init__(self, separator: str) -> None:
        self._separator = separator
        self._values: list[set[str] | None] = []  # of each column, outside of the lines in doubt; None: too many
        self._kinds: list[list[re.Pattern[str]]] = []  # those that all cells of each column match
        self._rows = 0  # if the lines in doubt are some
        # lines, the column that holds them, and the values within by columns
        self._doubtful: list[tuple[int, int, int, list[tuple[int, str]]]] = []

    def see(self, begin: int, end: int, row: list[str]) -> None:
        if not self._values:  # the header
            self._values, self._kinds = [set() for _ in row], [KINDS for _ in row]
        elif begin == end:
            self._rows += 1
            for i, cell in enumerate(row):
                self._know(i, cell)
        elif len(self._doubtful) < FEW:
            for i, cell in enumerate(row):
                first, *others = [line.split(self._separator) for line in cell.splitlines() or [""]]
                *between, last = others or [[]]
                if not (len(first) == len(row) - i and len(last) == i + 1 and all(len(b) == len(row) for b in between)):
                    continue
                inside = [*enumerate(first[1:], i + 1), *(pair for b in between for pair in enumerate(b))]
                self._doubtful.append((begin, end, i, [*inside, *enumerate(last[:-1])]))
                self._rows += len(between) + 2
                for j in {*range(len(row))} - {i}:
                    self._know(j, row[j])
                break

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

    def check(self, program: bool) -> None:
        """_Broken if rows are swallowed. Of a program, each column must say so, by two labels or three numbers."""
        labels = [values if values and 2 * len(values) <= self._rows else None for values in self._values]
        for begin, end, swallower, inside in self._doubtful:
            signs = []
            for column in {i for i, _ in inside} - {swallower}:
                values = [value for i, value in inside if i == column]
                known, kinds = labels[column], self._kinds[column] if self._values[column] != set() else []
                label = known is not None and len(values) > program and known.issuperset(values)
                number = kinds and len(values) > 2 * program and all(kinds[0].fullmatch(value) for value in values)
                if known is not None or kinds:
                    signs.append(label or (number and (known is None or not program)))
            if signs and (all(signs) if program else any(signs)):
                why = f"a quote opens in this row and closes in line {end}, and the lines within are rows"
                raise _Broken(begin, why)


# ---- Parquet --------------------------------------------------------------------------------------------------------


def _parquet(path: Path, what: str, columns: Sequence[str] | None, tell: Tell) -> Iterator[Row]:
    """A page at a time."""
    import pyarrow
    import pyarrow.parquet

    if not_text.is_gzip(path):
        raise UserError(f"{what} is a gzip\n       unpack it first: gunzip -c < {quoted(path)} > {inner(path)}")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            names = file.schema_arrow.names
            _check_columns(names, columns, what)
            wanted = list(dict.fromkeys(columns)) if columns and set(columns) <= set(names) else names
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=128, columns=wanted, use_threads=False):
                for values in zip(*batch.columns, strict=True):
                    number += 1
                    yield number, dict(zip(batch.schema.names, (value.as_py() for value in values), strict=True))
                tell(number / total)
    except UnicodeDecodeError as e:
        raise UserError(
            f"{what}, row {number} is not UTF-8: byte {e.object[e.start]:#04x} at offset {e.start}\n"
            "       write it again with the program that made it"
        ) from None
    except (pyarrow.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno:
            raise cannot_read(what, path, e) from None
        raise UserError(f"{what} cannot be read as Parquet: {e}\n       is it whole? fetch or write it again") from None


def class_names(path: Path, column: str) -> list[str] | None:
    """The names of a Parquet file's numbered labels, where `datasets` has left them."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # `rows` says what is wrong with the file
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


ROWS: dict[str, Callable[[Path, str, Sequence[str] | None, Tell], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_objects,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}
