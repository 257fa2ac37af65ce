"""Where text comes from: the corpora that we know by name, and any UTF-8 text file.

A new corpus is one function that returns a `Corpus`, and one line in `CORPORA`.
"""

import ast
import hashlib
import http.client
import os
import platform
import secrets
import sys
import sysconfig
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nanogpt_jax.config import UserError, suggestion

PYTHON_DOCS_LENGTH = 1_000_000  # characters
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Corpus:
    """A text, and what is known of it before it is read."""

    name: str
    identity: str  # equal identities mean equal texts; cheap to have, so that prepared tokens open without the text
    read_text: Callable[[], str]
    origin: dict[str, Any]  # where it comes from, for the manifest

    @cached_property
    def text(self) -> str:
        """The whole text, nothing normalised. Read when first asked for; UserError where it cannot be had."""
        return self.read_text()

    @property
    def facts(self) -> dict[str, Any]:
        return {"name": self.name, **self.origin, "sha256": hashlib.sha256(self.text.encode()).hexdigest()}


def read(source: str, folder: str | Path = "data") -> Corpus:
    """The corpus of that name, or the text file at that path. Downloads are kept in `folder`."""
    if source in CORPORA:
        return CORPORA[source](Path(folder))
    return text_file(source)


def text_file(source: str) -> Corpus:
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"data.source={source} is a directory; give one UTF-8 text file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        known = ", ".join(CORPORA)
        raise UserError(
            f"data.source={source} is neither a text file nor one of {known}{suggestion(source, CORPORA)}"
        ) from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        raise UserError(f"cannot read data.source={source}: {getattr(e, 'strerror', None) or e}") from None
    if not content:
        raise UserError(f"data.source={source} is empty; give a file with text in it")

    def decode() -> str:
        try:
            return content.decode()
        except UnicodeDecodeError as e:
            raise UserError(
                f"data.source={source} is not UTF-8 text: byte {content[e.start]:#04x} at offset {e.start}\n"
                f"       convert it first, for example: iconv -f LATIN1 -t UTF-8 {source} > text.txt"
            ) from None

    return Corpus(path.stem, hashlib.sha256(content).hexdigest(), decode, {"path": str(path.resolve())})


def python_docs(folder: Path) -> Corpus:
    """English prose about Python that ships with CPython itself: on every machine, without a download."""
    del folder  # nothing to keep
    # sys.version rather than the bare number: distributions patch their standard library
    return Corpus("python-docs", sys.version, _python_docs_text, {"python": platform.python_version()})


def _python_docs_text() -> str:
    """The help topics, then the docstrings of the standard library, the longest-winded modules first."""
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
            warnings.simplefilter("ignore")  # under -W error a stale escape in some module would change the text
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # ValueError: not decodable
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def shakespeare(folder: Path) -> Corpus:
    """Tiny Shakespeare: `shakespeare.txt` in the data directory, or else downloaded into it."""
    return Corpus(
        "shakespeare",
        SHAKESPEARE_SHA256,
        lambda: _shakespeare_text(folder / "shakespeare.txt"),
        {"url": SHAKESPEARE_URL},
    )


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
            partial = kept.with_name(f".{kept.name}.{secrets.token_hex(4)}.tmp")
            partial.write_bytes(content)
            os.replace(partial, kept)
        except OSError as e:
            raise UserError(f"cannot write {kept}: {e.strerror}; set data.dir to a directory of yours") from None
    return content.decode()


CORPORA: dict[str, Callable[[Path], Corpus]] = {
    "python-docs": python_docs,
    "shakespeare": shakespeare,
}
