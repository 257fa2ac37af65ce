"""Rows of files, for corpora, labelled texts and evaluation items.

Rows come from .jsonl, .ndjson, .json, .csv, .tsv and .parquet, each with the number of its first line. They are
streamed, so memory does not grow with the file. To add a format, write a function and add a line to `ROWS`.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanogpt_jax.config import UserError, quoted, word
from nanogpt_jax.data import tables, text_file
from nanogpt_jax.data.shell import converted, filtered, gunzip, is_gzip, stem
from nanogpt_jax.data.tables import Row
from nanogpt_jax.data.text_file import OnProgress, silent


def suffix(path: Path) -> str:
    """The suffix that names a file's format: ".jsonl" for X.JSONL and x.jsonl.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def unit(path: Path) -> str:
    """The word for what a row's number counts: "line" or "row"."""
    return "row" if suffix(path) == ".parquet" else "line"


def looks_like(beginning: str, field: str) -> str:
    """The suffix for a text whose first lines are rows with this field: "jsonl", "csv", "tsv"; else ""."""
    lines = [line for line in beginning.split("\n", 4)[:4] if line.strip()]
    if len(lines) < 3:
        return ""
    with contextlib.suppress(ValueError, RecursionError):
        rows = [json.loads(line) for line in lines[:3]]
        if all(isinstance(row, dict) for row in rows) and any(field in row for row in rows):  # some have no text
            return "jsonl"
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        header = [name.strip(' \r"') for name in lines[0].split(separator)]
        if field in header and len(header) > 1 and all(separator in line for line in lines[1:3]):
            return suffix
    return ""


def rows(
    source: Path, what: str, columns: Sequence[str] | None = None, on_progress: OnProgress = silent
) -> Iterator[Row]:
    """The rows of a file, read by its suffix; as JSON lines if the suffix is unknown.

    `columns` are the needed ones (None: all): UserError if one of them occurs twice; others may be omitted from rows.
    `what` names the file in errors.
    """
    return ROWS.get(suffix(source), _json_lines)(source, what, columns, on_progress)


def _json_lines(source: Path, what: str, columns: Sequence[str] | None, on_progress: OnProgress) -> Iterator[Row]:
    """An object a line. Blank lines are skipped."""
    decode = _json_decoder(columns).decode
    first = True
    for number, line in text_file.lines(source, what, on_progress):
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
            is_list = line.lstrip().startswith(("[{", "[\n"))
            hint = "if the file is one list of objects, name it .json" if is_list else ""
            raise _no_object(f"{what}, line {number}", line, columns, hint)
        yield number, row
        first = False


def _check_lines(source: Path, what: str, number: int) -> None:
    """UserError if a file that should be JSON lines is one JSON document."""
    if not source.is_file():
        return
    try:
        if next(_json_objects(source, what, None, silent), None) is None:
            return
    except UserError:
        return
    packed = ".gz" if source.name.lower().endswith(".gz") else ""
    names = [f"{stem(source)}{more}.json{packed}" for more in ("", "-list")]
    new = next((name for name in names if not source.with_name(name).exists()), names[-1])
    raise UserError(
        f"{what}, line {number} is not a JSON object: the file is JSON, not JSON lines\n"
        f"       name it .json: mv {word(source)} {word(source.with_name(new))}"
    )


def _json_objects(source: Path, what: str, columns: Sequence[str] | None, on_progress: OnProgress) -> Iterator[Row]:
    """The objects of a .json, in an array or one after the other. Only a few are in memory at a time."""
    decode = _json_decoder(columns).raw_decode
    between = re.compile(r"[\s,]*")
    held, line, needed, n, listed, closed = "", 1, 0, 0, False, False
    column = 0  # characters before `held` in its line
    for block in itertools.chain(text_file.blocks(source, what, on_progress), [None]):
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
                found = held[at : at + 60]
                hint = _object_hint(found, columns or ["text"], source, listed, closed)
                raise _no_object(where, found, columns, hint)
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
                    if needed > 2 * text_file.LONGEST:
                        raise UserError(
                            f"{where}: an object of more than {text_file.LONGEST >> 20} MiB is too long"
                        ) from None
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


def _check_nesting(row: dict[str, Any], source: Path, where: str, columns: Sequence[str]) -> None:
    """UserError if a file is one object that contains the rows."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and not set(columns) & set(row):
            command = _jq(f".[{json.dumps(name)}][]", source)
            raise UserError(
                f"{where}: the rows are in {name!r} of one object\n       write them a row a line: {command}"
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
    remedy = "fix or delete this one"
    if isinstance(e, _Twice):
        return UserError(f"{where}: {e.args[0]!r} occurs twice in it\n       {remedy}")
    if isinstance(e, json.JSONDecodeError):
        wrong = f"{e.msg} at column {column}"
        if e.msg == "Extra data":
            remedy = "a line must be one JSON object with nothing after it; fix or delete this one"
    elif isinstance(e, RecursionError):
        wrong = "it is nested too deeply"
    else:  # int() of so many digits
        wrong = "a number has more than 4,300 digits"
    return UserError(f"{where} is not JSON: {wrong}\n       {remedy}")


def _no_object(where: str, found: str, columns: Sequence[str] | None, hint: str) -> UserError:
    wanted = ", ".join(f'{json.dumps(name)}: "..."' for name in columns or [])
    like = f", like {{{wanted}}}" if wanted else ""
    hint = f"\n       {hint}" if hint else ""
    return UserError(f"{where} is not a JSON object{like}, but {found.strip()[:60]}{hint}")


def _object_hint(found: str, columns: Sequence[str], source: Path, listed: bool, closed: bool) -> str:
    """How to convert a .json without objects, in which `found` comes instead.

    `listed`, `closed`: whether a list has started before it, and ended.
    """

    each = ".[] | " if listed else ""
    if found.startswith("//"):
        return f"JSON has no comments; delete such lines: {_sed(COMMENT, source)}"
    if found.startswith(("/*", "#")):
        return "JSON has no comments: delete them"
    if found.startswith(")]}'"):
        return f"remove what precedes the JSON: {_sed(PREFIX, source)}"
    if closed:
        if found.startswith("["):
            return f"write the rows of these lists a row a line: {_jq('.[]', source)}"
        return "nothing may follow the list: delete it"
    if found.startswith("["):
        cells = ", ".join(f"{json.dumps(name)}: .[{i}]" for i, name in enumerate(columns))
        return f"make objects of these lists, for example: {_jq(f'{each}{{{cells}}}', source)}"
    if found.startswith('"'):
        return f"make objects of the texts: {_jq(f'{each}{{{json.dumps(columns[0])}: .}}', source)}"
    if re.match(r"(null|true|false|-?[0-9.]+)\b", found):
        return f"to keep only the objects: {_jq(f'{each}objects', source)}"
    return "give a list of objects, or an object a line"


def _jq(program: str, source: Path) -> str:
    return filtered(f"jq -c {quoted(program)}", source, f"{stem(source)}.jsonl")


def _sed(script: str, source: Path) -> str:
    return filtered(f"sed {quoted(script)}", source, converted(source))


COMMENT = r"/^[[:space:]]*\/\//d"
PREFIX = "1s/^)]}',*//"  # removes what some servers put before their JSON


# ---- Parquet --------------------------------------------------------------------------------------------------------


def _parquet(path: Path, what: str, columns: Sequence[str] | None, on_progress: OnProgress) -> Iterator[Row]:
    """Reads a page at a time."""
    import pyarrow
    import pyarrow.parquet

    if is_gzip(path):
        raise UserError(f"{what} is a gzip\n       unpack it first: {gunzip(path)}")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=text_file.BLOCK, pre_buffer=False) as file:
            names = file.schema_arrow.names
            tables.check_columns(names, columns, what)
            wanted = list(dict.fromkeys(columns)) if columns and set(columns) <= set(names) else names
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=128, columns=wanted, use_threads=False):
                for values in zip(*batch.columns, strict=True):
                    number += 1
                    yield number, dict(zip(batch.schema.names, (value.as_py() for value in values), strict=True))
                on_progress(number / total)
    except UnicodeDecodeError as e:
        raise UserError(
            f"{what}, row {number} is not UTF-8: byte {e.object[e.start]:#04x} at offset {e.start}\n"
            "       write it again with the program that made it"
        ) from None
    except (pyarrow.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno:
            raise text_file.cannot_read(what, path, e) from None
        raise UserError(f"{what} cannot be read as Parquet: {e}\n       is it whole? fetch or write it again") from None


def class_names(path: Path, column: str) -> list[str] | None:
    """The names of a Parquet file's numbered labels, if `datasets` has stored them."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # `rows` reports what is wrong with the file
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


ROWS: dict[str, Callable[[Path, str, Sequence[str] | None, OnProgress], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_objects,
    ".csv": tables.reader(","),
    ".tsv": tables.reader("\t"),
    ".parquet": _parquet,
}
