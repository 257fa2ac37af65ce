"""Text on this machine: files, folders, patterns, standard input."""

import codecs
import glob
import hashlib
import os
import stat
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from nanogpt_jax.config import UserError, quoted, suggestion
from nanogpt_jax.data import records, text_file
from nanogpt_jax.data.corpus import Block, Corpus, safe, sha256_of_json, text_of
from nanogpt_jax.data.text_file import OnProgress
from nanogpt_jax.host.files import folder_beside

IN_FOLDERS = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet")
SMALL = 64 << 20  # bytes; smaller files are identified by content, larger ones take too long to read at each start


def corpus(source: str, field: str, folder: Path, known: Collection[str]) -> Corpus:
    """A file, a folder, a pattern with * or **, or standard input (-).

    A single plain text has no documents. Of several files, in the order of their names, each plain text is a document.
    In the formats of records.py, each row is one. Text that can be read only once is stored in `folder`. `known` are
    the other sources that may be meant if there is no such file.
    """
    given = source
    if source == "-":
        source = str(_spool(sys.stdin.buffer, folder, source))
    path = Path(os.path.expanduser(source))  # Path.expanduser raises for an unknown user
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        files = _matching(path, source, known)
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
        if suffix := records.looks_like(next(text_file.blocks(files[0], str(files[0])), ""), field):
            print(
                f"note: {given} looks like rows with a field {field!r}, and is read as one text\n"
                f"      to read its rows, name it .{suffix}",
                file=sys.stderr,
            )
        origin = {"path": str(files[0].resolve())}
        identity = known_by[0] if size <= SMALL else f"{files[0].name} {known_by[0]}"
        return Corpus(files[0].stem, identity, origin, False, blocks)
    base = os.path.commonpath([file.parent for file in files])
    names = [file.relative_to(base).as_posix() for file in files]
    identity = sha256_of_json([field, list(zip(names, known_by, strict=True))])
    return Corpus(safe(name), identity, {"source": source, "files": len(files), "bytes": size}, True, blocks)


def _matching(path: Path, source: str, known: Collection[str]) -> list[Path]:
    """The files that match a pattern, in the order of their names. Prints a note on links."""
    found = sorted(f for name in glob.glob(str(path), recursive=True) if (f := Path(name)).is_file())
    # ** follows links, so a file may come twice
    files = list({os.path.realpath(f): f for f in reversed(found)}.values())[::-1]
    if n := len(found) - len(files):
        print(f"note: data.source={source} leaves out {n:,} links to files that it already has", file=sys.stderr)
    if not glob.has_magic(source):
        here = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(
            f"data.source={source} is neither a file nor a folder{here}, nor one of {', '.join(known)}"
            f"{suggestion(source, known)}"
        )
    if not files:
        exact = "; [[] matches a [ in a name" if "[" in source else ""
        raise UserError(f"data.source={source} matches no file; ** matches folders at any depth{exact}")
    return files


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
        yield text_of(row, field, f"{path}, {unit} {number}"), True


def _spool(stream: BinaryIO, folder: Path, source: str) -> Path:
    """Copy a stream that can be read only once into a file in `folder`, named after its content."""
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_beside(folder / "stdin") as beside:
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
