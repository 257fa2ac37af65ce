"""Sources of text: corpora known by name here, files in local.py, the Hugging Face hub in hub.py.

A source is read in blocks, so memory does not grow with it (of a file of rows or of the hub, one row at a time). To add
a corpus, write a function that returns a `Corpus`, and add a line to `CORPORA`.
"""

import ast
import functools
import hashlib
import http.client
import platform
import sys
import sysconfig
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nanogpt_jax.config import UserError
from nanogpt_jax.data import frases, hub, local
from nanogpt_jax.data.corpus import Block, Corpus
from nanogpt_jax.data.text_file import OnProgress
from nanogpt_jax.data.tokenizer import Tokenizer
from nanogpt_jax.host import files

PYTHON_DOCS_LENGTH = 1_000_000  # characters
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read(source: str, folder: str | Path = "data", field: str = "text") -> Corpus:
    """A corpus by name, path or pattern, standard input (-), or a data set of the hub; see `--help`.

    Downloads and standard input are stored in `folder`. `field` is the column with the text, in rows.
    """
    if source in CORPORA:
        return CORPORA[source](Path(folder))
    if source.startswith("hf:"):
        return hub.corpus(source, field)
    return local.corpus(source, field, Path(folder), CORPORA)


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


def spanish(folder: Path) -> Corpus:
    """Spanish sentences from our own grammar, written on first use."""
    del folder  # nothing to store
    return Corpus("frases", frases.TEXT_SHA256, {"sentences": frases.SENTENCES}, False, _one_text(frases.text))


CORPORA: dict[str, Callable[[Path], Corpus]] = {
    "python-docs": python_docs,
    "frases": spanish,
    "shakespeare": shakespeare,
}

# corpora whose truth is known -> -log p of each word after the first, by (words, block_size, stride)
BEST: dict[str, Callable[[Sequence[str], int, int], np.ndarray]] = {
    "frases": lambda words, block_size, stride: frases.grammar().nats(words, block_size, stride)
}


def best_possible(
    source: str, tokens: np.ndarray, tokenizer: Tokenizer, block_size: int, stride: int = 0
) -> np.ndarray | None:
    """The nats of each token of a text [N] after the first, by whoever knows how its source writes: [N-1] float64.

    None unless that is known, and tokens are words. Nobody is better on average in the same windows.
    """
    if source not in BEST or tokenizer.name != "word":
        return None
    words = [tokenizer.decode([i]).removeprefix(" ") for i in range(tokenizer.n_vocab)]
    return BEST[source]([words[i] for i in tokens], block_size, stride)
