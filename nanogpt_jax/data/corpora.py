"""Sources of text: corpora known by name, files, and the Hugging Face hub.

A source is read in blocks, so memory does not grow with it (of a file of rows or of the hub, one row at a time).
text_file.py and records.py read the files. To add a corpus, write a function that returns a `Corpus`, and add a line to
`CORPORA`.
"""

import ast
import codecs
import functools
import glob
import hashlib
import http.client
import json
import os
import platform
import re
import stat
import sys
import sysconfig
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nanogpt_jax.config import UserError, quoted, suggestion
from nanogpt_jax.data import hub, records, tables, text_file
from nanogpt_jax.data.text_file import OnProgress
from nanogpt_jax.host import files

PYTHON_DOCS_LENGTH = 1_000_000  # characters
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SMALL = 64 << 20  # bytes; smaller files are identified by content, larger ones take too long to read at each start

Block = tuple[str, bool]  # text, and whether a document ends after it


@dataclass(frozen=True)
class Corpus:
    """A source of text, and what is known before it is read."""

    name: str
    identity: str  # equal identities mean equal texts; computed without reading large ones
    origin: dict[str, Any]  # for the manifest
    documents: bool  # False: one text, not divided into documents
    blocks: Callable[[OnProgress], Iterator[Block]]  # in order, not normalised; UserError if unreadable


def read(source: str, folder: str | Path = "data", field: str = "text") -> Corpus:
    """A corpus by name, path or pattern, standard input (-), or a data set of the hub; see `--help`.

    Downloads and standard input are stored in `folder`. `field` is the column with the text, in rows.
    """
    if source in CORPORA:
        return CORPORA[source](Path(folder))
    if source == "-":
        return from_files(str(_spool(sys.stdin.buffer, Path(folder), source)), field)
    if source.startswith("hf:"):
        return from_hub(source, field)
    return from_files(source, field, Path(folder))


# ---- files ----------------------------------------------------------------------------------------------------------


def from_files(source: str, field: str, folder: Path = Path("data")) -> Corpus:
    """A file, a folder or a pattern with * or **. A single plain text has no documents. Of several files, in the order
    of their names, each plain text is a document. In the formats of records.py, each row is one."""
    path = Path(os.path.expanduser(source))  # Path.expanduser raises for an unknown user
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        found = sorted(f for name in glob.glob(str(path), recursive=True) if (f := Path(name)).is_file())
        files = list({os.path.realpath(f): f for f in reversed(found)}.values())[
            ::-1
        ]  # ** follows links, so a file may come twice
        if n := len(found) - len(files):
            print(f"note: data.source={source} leaves out {n:,} links to files that it already has", file=sys.stderr)
        if not glob.has_magic(source):
            known = ", ".join(CORPORA)
            here = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise UserError(
                f"data.source={source} is neither a file nor a folder{here}, nor one of {known}"
                f"{suggestion(source, CORPORA)}"
            ) from None
        if not files:
            exact = "; [[] matches a [ in a name" if "[" in source else ""
            what = f"data.source={source} matches no file"
            raise UserError(f"{what}; ** matches folders at any depth{exact}") from None
        name = next((part for part in reversed(path.parts) if not glob.has_magic(part)), "files")
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        raise UserError(f"cannot read data.source={source}: {getattr(e, 'strerror', None) or e}") from None
    else:
        if stat.S_ISDIR(mode):
            files = _in_folder(path, source)
            name = path.resolve().name or "files"
        else:
            if not stat.S_ISREG(mode):  # a pipe can be read only once
                with path.open("rb") as stream:
                    path = _spool(stream, folder, source)
            files, name = [path], path.stem

    try:
        stats = {file: file.stat() for file in files}
        size = sum(s.st_size for s in stats.values())
        if size == 0:
            raise UserError(f"data.source={source} is empty; give a file with text in it")
        known_by = [_known_by(file, stats[file], size <= SMALL) for file in files]
    except OSError as e:
        raise UserError(f"cannot read {e.filename}, of data.source={source}: {e.strerror}") from None
    formats = {file: _row_documents if records.suffix(file) in records.ROWS else _text_documents for file in files}
    one_text = len(files) == 1 and formats[files[0]] is _text_documents

    def blocks(on_progress: OnProgress) -> Iterator[Block]:
        before = 0
        for file, read_file in formats.items():
            share = stats[file].st_size / size
            yield from read_file(file, field, lambda x, b=before, s=share: on_progress(b + x * s))
            before += share

    if one_text:
        origin = {"path": str(files[0].resolve())}
        identity = known_by[0] if size <= SMALL else f"{files[0].name} {known_by[0]}"
        return Corpus(files[0].stem, identity, origin, False, blocks)
    base = os.path.commonpath([file.parent for file in files])
    names = [file.relative_to(base).as_posix() for file in files]
    identity = sha256_of_json([field, list(zip(names, known_by, strict=True))])
    return Corpus(_safe(name), identity, {"source": source, "files": len(files), "bytes": size}, True, blocks)


def _in_folder(folder: Path, source: str) -> list[Path]:
    """The texts at any depth of a folder, in the order of their names. Prints a note on those left out."""
    taken: list[Path] = []
    out: Counter[str] = Counter()

    def fail(e: OSError) -> None:
        raise UserError(f"cannot read {e.filename}, of data.source={source}: {e.strerror}") from None

    for place, folders, names in os.walk(folder, onerror=fail):
        within = Path(place).relative_to(folder)
        out["linked folders"] += sum(Path(place, name).is_symlink() for name in folders)
        for name in names:
            path = Path(place, name)
            if any(part.startswith(".") for part in (*within.parts, name)):
                out["hidden"] += 1
            elif path.suffix.lower() not in IN_FOLDERS:
                out[path.suffix.lower() or "without a suffix"] += 1
            elif path.is_file():
                taken.append(path)
            else:
                out["broken links"] += 1
    if left := [f"{n:,} {what}" for what, n in out.most_common() if n]:
        more = [f"{len(left) - 12} more suffixes"] if len(left) > 12 else []
        print(f"note: data.source={source} leaves out {', '.join([*left[:12], *more])}", file=sys.stderr)
    if not taken:
        suffix = next((suffix for suffix, _ in out.most_common() if suffix.startswith(".")), ".py")
        raise UserError(
            f"data.source={source} is a folder that holds no {', '.join(IN_FOLDERS)} file\n"
            f"       for other text files give a pattern: {quoted(f'{glob.escape(str(folder))}/**/*{suffix}')}"
        )
    return sorted(taken)


def _text_documents(path: Path, field: str, on_progress: OnProgress) -> Iterator[Block]:
    """A text as one document, in blocks."""
    del field
    for text in text_file.blocks(path, str(path), on_progress):
        yield text, False
    yield "", True


def _row_documents(path: Path, field: str, on_progress: OnProgress) -> Iterator[Block]:
    """The text of each row, as a document."""
    unit = records.unit(path)
    for number, row in records.rows(path, str(path), [field], on_progress):
        yield _text_of(row, field, f"{path}, {unit} {number}"), True


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text in `field`; "" if it is null."""
    if field not in row:
        raise UserError(_no_field(field, list(row), where))
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: the field {field!r} is not text but {type(value).__name__}\n"
            "       write it as text, or name the field that holds the text with --data.field=NAME"
        )
    try:
        value.encode()
    except UnicodeEncodeError as e:  # JSON's \ud800 alone
        raise UserError(
            f"{where} holds {value[e.start]!r}, which is half a character\n"
            "       take it out, or write the file again with the program that made it"
        ) from None
    return value


def _no_field(field: str, names: list[str], where: str) -> str:
    near = tables.separator_hint(names) or suggestion(field, names)
    return f"{where} has no field {field!r}, but {', '.join(map(repr, names)) or 'none at all'}{near}" + (
        "" if near else "\n       say which one holds the text with --data.field=NAME"
    )


IN_FOLDERS = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet")


def _spool(stream: BinaryIO, folder: Path, source: str) -> Path:
    """Copy a stream that can be read only once into a file in `folder`, named after its content."""
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.folder_beside(folder / "stdin") as beside:
            with (beside / "text").open("wb") as out:
                while block := stream.read(text_file.BLOCK):
                    digest.update(block)
                    out.write(block)
            if not (beside / "text").stat().st_size:
                raise UserError(f"data.source={source} gave no text\n       a pipe must be fed again at each start")
            kept = folder / f"stdin-{digest.hexdigest()[:12]}{_suffixes(source) or '.txt'}"
            os.replace(beside / "text", kept)
    except OSError as e:
        raise UserError(f"cannot keep data.source={source} in data.dir={folder}: {e.strerror or e}") from None
    return kept


def _suffixes(name: str) -> str:
    """The suffixes of a pipe's name, which say how to read it."""
    path = Path(name)
    known = records.suffix(path) in (*IN_FOLDERS, *records.ROWS)
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]) if known else ""


def _known_by(path: Path, stat: os.stat_result, content: bool) -> str:
    found = _sha256_of(path) if content else f"{stat.st_size} {stat.st_mtime_ns}"
    if records.suffix(path) not in records.ROWS:
        with path.open("rb") as file:
            if file.read(3) == codecs.BOM_UTF8:  # earlier versions kept the mark in the tokens
                found += " without its mark"
    return found


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "files"


# ---- the hub --------------------------------------------------------------------------------------------------------


def from_hub(source: str, field: str) -> Corpus:
    """`hf:NAME[:CONFIG][:FIELD]`: the split "train" of a data set, streamed. NAME may be a local folder.

    A data set of the hub is identified by its name, so that prepared tokens open without a network.
    """
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise UserError(f"data.source={source} must read hf:NAME[:CONFIG][:FIELD], like hf:allenai/c4:en:text")
    name, config, own_field = (*parts, "", "")[:3]
    field = own_field or field

    def blocks(on_progress: OnProgress) -> Iterator[Block]:
        stream, rows = _open_stream(source, name, config)
        for number, row in enumerate(_reachable(source, stream), start=1):
            yield _text_of(row, field, f"data.source={source}, row {number}"), True
            if rows:
                on_progress(number / rows)

    local = [(str(f), s.st_size, s.st_mtime_ns) for f in sorted(Path(name).rglob("*")) if (s := f.lstat())]
    identity = sha256_of_json(["hf", name, config, field, local])
    return Corpus(_safe(Path(name).name), identity, {"source": source, "field": field}, True, blocks)


def _open_stream(source: str, name: str, config: str) -> tuple[Any, int | None]:
    """The rows of the split "train", and how many they are if that is known."""
    files = "local .parquet or .jsonl files"
    stream = hub.open_dataset(f"data.source={source}", name, config, split="train", streaming=True, instead=files)
    split = (stream.info.splits or {}).get("train")
    return stream, split.num_examples if split else None


def _reachable(source: str, stream: Any) -> Iterator[dict[str, Any]]:
    rows = iter(stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as e:  # the network's or a file's, from many libraries
            raise hub.SourceFailed(
                f"data.source={source} broke off: {type(e).__name__}: {' '.join(str(e).split())[:500]}"
            ) from e
        yield row


# ---- corpora known by name ------------------------------------------------------------------------------------------


def _one_text(read_text: Callable[[], str]) -> Callable[[OnProgress], Iterator[Block]]:
    """The blocks of a text of a few megabytes, read on first use."""
    text = functools.cache(read_text)

    def blocks(on_progress: OnProgress) -> Iterator[Block]:
        yield text(), True
        on_progress(1.0)

    return blocks


def python_docs(folder: Path) -> Corpus:
    """English prose about Python that ships with CPython: on every machine, without a download."""
    del folder  # nothing to store
    # sys.version and not only the number, because distributions patch their standard library
    origin = {"python": platform.python_version()}
    return Corpus("python-docs", sys.version, origin, False, _one_text(_python_docs_text))


def _python_docs_text() -> str:
    """The help topics, then the docstrings of the standard library, modules with the most first."""
    from pydoc_data.topics import topics

    parts = [topics[key] for key in sorted(topics)]
    modules = {
        path.stem: found
        for path in Path(sysconfig.get_path("stdlib")).glob("*.py")
        if path.stem in sys.stdlib_module_names and (found := _docstrings(path))
    }
    longest_first = sorted(modules, key=lambda name: (-sum(map(len, modules[name])), name))
    length = sum(len(part) + 2 for part in parts)
    for docstring in (d for name in longest_first for d in modules[name]):
        length += len(docstring) + 2
        if length > PYTHON_DOCS_LENGTH:
            break
        parts.append(docstring)
    return "\n\n".join(parts) + "\n"


def _docstrings(path: Path) -> list[str]:
    """The docstrings of a module, its classes and functions in the order of the source; [] if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # else, under -W error, an invalid escape in a module would change the text
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # ValueError: not decodable
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def shakespeare(folder: Path) -> Corpus:
    """Tiny Shakespeare: `shakespeare.txt` in the data directory, or else downloaded into it."""
    read_text = functools.partial(_shakespeare_text, folder / "shakespeare.txt")
    return Corpus("shakespeare", SHAKESPEARE_SHA256, {"url": SHAKESPEARE_URL}, False, _one_text(read_text))


def _shakespeare_text(kept: Path) -> str:
    local = "give a local copy with --data.source=FILE"
    try:
        if kept.exists():
            content, where = kept.read_bytes(), str(kept)
        else:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=20) as answer:
                content, where = answer.read(), SHAKESPEARE_URL
    except (OSError, http.client.HTTPException) as e:
        raise UserError(
            f"data.source=shakespeare is not in {kept} and cannot be downloaded ({e})\n"
            f"       {local}, or train on --data.source=python-docs, which needs no network"
        ) from None
    if (found := hashlib.sha256(content).hexdigest()) != SHAKESPEARE_SHA256:
        raise UserError(
            f"{where} is not tiny Shakespeare: its sha256 is {found}\n"
            f"       delete {kept} if it is there, or use it under its own name: --data.source={kept}"
        )
    if not kept.exists():
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.write(kept, content)
        except OSError as e:
            raise UserError(f"cannot write {kept}: {e.strerror}; set data.dir to a directory of yours") from None
    return content.decode()


CORPORA: dict[str, Callable[[Path], Corpus]] = {
    "python-docs": python_docs,
    "shakespeare": shakespeare,
}
