"""Labelled texts: read, split and tokenized, for a classifier.

A source is a file of rows (see records.py), `hf:NAME[:CONFIG]` for Hugging Face's `datasets` (a folder on this
machine, too), or a name in SOURCES. It is read anew at each start and kept in memory: labelled texts are few.
"""

# N texts, M tokens of all of them, W width of a padded row

import functools
import hashlib
import io
import itertools
import json
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanogpt_jax.config import ClassifierConfig, LabelledConfig, UserError, suggestion
from nanogpt_jax.data import batches, records, tokenizer
from nanogpt_jax.data.tokenizer import Tokenizer

Label = str | int


class Example(NamedTuple):
    text: str
    label: Label
    line: int  # of the source, for messages


@dataclass(frozen=True)
class Texts:
    """Some labelled texts as tokens."""

    texts: list[str]
    labels: np.ndarray  # [N] int32, their place in the list of labels
    tokens: np.ndarray  # [M] int32, of one text after the other
    starts: np.ndarray  # [N + 1], where each begins

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, which: np.ndarray, width: int) -> np.ndarray:
        """which [...] -> int32 [..., W+2]: tokens padded on the right with 0, their number, and the label."""
        start = self.starts[which]
        length, at = self.starts[which + 1] - start, np.arange(width)
        index = np.minimum(start[..., None] + at, len(self.tokens) - 1)
        rows = np.zeros((*which.shape, width + 2), np.int32)
        rows[..., :width] = np.where(at < length[..., None], self.tokens[index], 0)
        rows[..., width], rows[..., width + 1] = length, self.labels[which]
        return rows

    def batch(self, steps: np.ndarray, *, seed: int, batch_size: int, width: int) -> np.ndarray:
        """The rows of steps [K]: int32 [K, B, W+2]. Every epoch visits each text once, in an order of its own."""
        which = batches.order(len(self), seed=seed, step=steps, batch_size=batch_size)
        return self.rows(which.astype(np.int64), width)


@dataclass(frozen=True)
class LabelledData:
    """A source, split: what `training/run_dir.py` needs to know of a run's data, and the texts."""

    tokenizer: Tokenizer
    labels: list[Label]
    splits: dict[str, Texts]  # train, val, test
    width: int  # of the padded rows
    notes: list[str]  # what a person should know before training on it
    manifest: dict[str, Any]
    fingerprint: str  # equal where the tokens, the labels and the split are


# ---- reading --------------------------------------------------------------------------------------------------------


def read(cfg: LabelledConfig) -> list[Example]:
    """The examples of cfg.source, in its order. UserError names the line of what cannot be used."""
    what = f"data.source={cfg.source}"
    if cfg.source in SOURCES:
        return SOURCES[cfg.source]()
    rows, name_of = _open(what, cfg.source, cfg.split, [cfg.text_column, cfg.label_column])
    examples = []
    for line, record in rows:
        text = _column(what, line, record, "data.text_column", cfg.text_column)
        label = name_of(_column(what, line, record, "data.label_column", cfg.label_column))
        if isinstance(label, bool):
            label = str(label).lower()
        if not isinstance(label, str | int) or label == "":
            raise UserError(f"{what}, line {line}: the label {label!r} must be text or a whole number")
        examples.append(Example(_checked_text(what, line, text), label, line))
    if not examples:
        raise UserError(f"{what} holds no texts")
    return examples


def read_texts(path: Path, column: str) -> list[str]:
    """The texts of a file, without labels: a column of rows, or else a text a line."""
    what = str(path)
    if records.suffix(path) in records.ROWS:
        found = records.rows(path.expanduser(), what, [column])
        texts = [(line, _column(what, line, record, "--text-column", column)) for line, record in found]
    else:
        texts = list(records.lines(path.expanduser(), what))
    if not texts:
        raise UserError(f"{what} holds no texts")
    return [_checked_text(what, line, text) for line, text in texts]


def lines_of(content: bytes, what: str) -> list[str]:
    """The texts of standard input, one a line."""
    texts = list(records.lines(io.BytesIO(content), what))
    if not texts:
        raise UserError(f"{what} holds no texts")
    return [_checked_text(what, line, text) for line, text in texts]


def _open(
    what: str, source: str, split: str, columns: Sequence[str]
) -> tuple[Iterator[records.Row], Callable[[Any], Any]]:
    """The rows of a source, and what gives its labels, in the last of the columns, their names."""
    if source.startswith("hf:"):
        return _datasets(what, source, split, columns[-1])
    path = Path(source).expanduser()
    suffix = records.suffix(path)
    if suffix not in records.ROWS:
        known = ", ".join([*records.ROWS, "hf:NAME", *SOURCES])
        raise UserError(f"{what} is none of {known}{suggestion(source, SOURCES)}")
    names = records.class_names(path, columns[-1]) if suffix == ".parquet" else None
    return records.rows(path, what, columns), functools.partial(_name_of, names)


def _name_of(names: list[str] | None, label: Any) -> Any:
    if names is None or not isinstance(label, int):
        return label
    return names[label] if 0 <= label < len(names) else None  # -1 where a test set is published without labels


def _datasets(what: str, source: str, split: str, labels: str) -> tuple[Iterator[records.Row], Callable[[Any], Any]]:
    """A data set by name, through Hugging Face's library, which downloads what it does not have."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would print, it raises too
    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, LookupError, DatasetsError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise UserError(f"cannot read {what} (data.split={split}): {reason}") from None
    feature = data.features.get(labels)  # pyright: ignore
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    return enumerate(data, start=1), functools.partial(_name_of, names)  # pyright: ignore


def _column(what: str, line: int, record: dict[str, Any], setting: str, name: str) -> Any:
    if name not in record:
        there = ", ".join(shown(column)[:60] for column in record)
        hint = "the first line names the columns" if what.endswith((".csv", ".tsv")) else f"name another: {setting}"
        if any(";" in str(column) for column in record):
            hint = "cells are separated by commas, not by semicolons, or by tabs in a .tsv"
        raise UserError(f"{what}, line {line}: there is no column {setting}={name}; there are {there}\n       {hint}")
    return record[name]


def _checked_text(what: str, line: int, text: Any) -> str:
    if not isinstance(text, str):
        raise UserError(f"{what}, line {line}: the text is {text!r:.60}, not text")
    if not text.strip():
        raise UserError(f"{what}, line {line}: the text is empty, and nothing can be told from that; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write one: "\\ud800"
        raise UserError(f"{what}, line {line}: the text holds half a character, so it is not text") from None
    return text


# ---- what every machine has -----------------------------------------------------------------------------------------


def python_examples() -> list[Example]:
    """Paragraphs of Python's documentation ("prose") and of its standard library ("code"), 1,000 of each."""
    from pydoc_data.topics import topics

    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    prose = (p for key in sorted(topics) for p in topics[key].split("\n\n") if len(p.strip()) >= 40)
    blocks = (p for path in modules for p in path.read_text("utf-8", errors="replace").split("\n\n"))
    code = (p for p in blocks if len(p.strip()) >= 40)
    found = [(text, "prose") for text in itertools.islice(prose, 1000)]
    found += [(text, "code") for text in itertools.islice(code, 0, 10_000, 10)]  # from more modules than the first
    return [Example(text, kind, number) for number, (text, kind) in enumerate(found, start=1)]


SOURCES: dict[str, Callable[[], list[Example]]] = {"python": python_examples}


# ---- splitting and tokenizing ---------------------------------------------------------------------------------------


def open_data(cfg: ClassifierConfig, known: Tokenizer | None = None) -> LabelledData:
    """The texts of cfg.data, split and tokenized by `known`, or as data.tokenizer says, if by one made for the training
    texts."""
    examples = read(cfg.data)
    labels = labels_of(examples, f"data.source={cfg.data.source}")
    parts = split(examples, cfg.data)
    tok = known or tokenizer.open_or_make(cfg.data.tokenizer, (e.text + "\n" for e in parts["train"]))
    encoder = Encoder(tok, cfg.model.block_size, cfg.data.keep)
    splits = {name: encoder.encode(part, labels) for name, part in parts.items()}
    width = width_for(splits.values(), cfg.model.block_size)
    manifest = {
        "source": {"name": cfg.data.source, "texts": len(examples), "cut_to_the_context": encoder.cut},
        "labels": labels,
        "splits": {
            name: dict(zip(map(str, labels), np.bincount(s.labels, minlength=len(labels)).tolist(), strict=True))
            for name, s in splits.items()
        },
        "tokenizer": {"kind": tok.name, "fingerprint": tok.fingerprint},
    }
    digest = hashlib.sha256(json.dumps([tok.fingerprint, labels]).encode())
    for name, s in splits.items():
        for array in (s.labels, s.starts, s.tokens):
            digest.update(name.encode() + array.tobytes())
    return LabelledData(tok, labels, splits, width, encoder.notes(), manifest, digest.hexdigest())


def labels_of(examples: list[Example], what: str) -> list[Label]:
    """The labels that occur: whole numbers in order, or names by the alphabet."""
    found = {e.label for e in examples}
    names = {str(label) for label in found}
    if len(names) < 2:
        raise UserError(f"{what} has the one label {shown(*names)}; a classifier needs two or more to tell apart")
    return sorted(found) if all(isinstance(label, int) for label in found) else sorted(names)  # pyright: ignore


def split(examples: list[Example], cfg: LabelledConfig) -> dict[str, list[Example]]:
    """{"train", "val", "test"}, each with the same share of every label.

    Texts of a label are ordered by their hash and cut, so that the split depends on nothing but the texts, and copies
    of one text fall on the same side.
    """
    parts: dict[str, list[int]] = {"test": [], "val": [], "train": []}
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, e in enumerate(examples):
        groups[str(e.label)][hashlib.sha256(e.text.encode("utf-8", "surrogatepass")).hexdigest()].append(i)
    for label, copies in groups.items():
        ordered = [copies[key] for key in sorted(copies)]
        sizes = [max(1, round(len(ordered) * f)) if f else 0 for f in (cfg.test_fraction, cfg.val_fraction)]
        if sum(sizes) >= len(ordered):
            raise UserError(
                f"data.source={cfg.source} has too few different texts with the label {shown(label)}, {len(ordered)}, "
                f"to keep data.val_fraction={cfg.val_fraction} and data.test_fraction={cfg.test_fraction} of them\n"
                "       give more of them, leave the label out, or check that data.label_column is the label"
            )
        bounds = [0, sizes[0], sum(sizes), len(ordered)]
        for name, (start, end) in zip(parts, itertools.pairwise(bounds), strict=True):
            parts[name] += itertools.chain.from_iterable(ordered[start:end])
    return {name: [examples[i] for i in sorted(parts[name])] for name in ("train", "val", "test")}


class Encoder:
    """Texts to tokens as a run does it: no more than its context, no character that its tokenizer lacks."""

    def __init__(self, tok: Tokenizer, block_size: int, keep: str):
        self._tok, self._block_size, self._keep = tok, block_size, keep
        ids = [i for i in range(tok.n_vocab) if i != tok.end_of_text]
        self._known = set(tok.decode(ids)) if tok.name == "char" else None
        self.cut = self.seen = 0  # texts longer than the context, and all
        self.dropped: Counter[str] = Counter()

    def tokens(self, texts: Sequence[str], name: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [M] int32 of all texts, and where each begins [N+1]. `name` says which text one is, in an error."""
        found = [self._encode(text, name, i) for i, text in enumerate(texts)]
        starts = np.zeros(len(found) + 1, np.int64)
        np.cumsum([len(ids) for ids in found], out=starts[1:])
        return np.concatenate([*found, np.zeros(0, np.int32)]), starts

    def _encode(self, text: str, name: Callable[[int], str], i: int) -> np.ndarray:
        if self._known is not None and (unknown := set(text) - self._known):
            self.dropped.update(c for c in text if c in unknown)
            text = text.translate(dict.fromkeys(map(ord, unknown)))
        ids = self._tok.encode(text)
        if not len(ids):
            raise UserError(f"{name(i)} has no character that the run's tokenizer knows; leave it out")
        self.seen += 1
        self.cut += len(ids) > self._block_size
        return ids[: self._block_size] if self._keep == "first" else ids[-self._block_size :]

    def encode(self, examples: list[Example], labels: list[Label], what: str = "data.source") -> Texts:
        """UserError for a label that is none of `labels`."""
        place = {str(label): i for i, label in enumerate(labels)}
        for e in examples:
            if str(e.label) not in place:
                known = ", ".join(shown(label) for label in labels[:20])
                raise UserError(f"{what}, line {e.line}: the run has no label {shown(e.label)}; it has {known}")
        texts = [e.text for e in examples]
        tokens, starts = self.tokens(texts, lambda i: f"{what}, line {examples[i].line}: the text")
        return Texts(texts, np.array([place[str(e.label)] for e in examples], np.int32), tokens, starts)

    def notes(self) -> list[str]:
        """What was left out, for people."""
        notes = []
        if self.cut:
            end = "first" if self._keep == "first" else "last"
            notes.append(
                f"{self.cut:,} of {self.seen:,} texts are longer than model.block_size={self._block_size} tokens: "
                f"their {end} {self._block_size} are read (data.keep)"
            )
        if self.dropped:
            most = " ".join(repr(c) for c, _ in self.dropped.most_common(8))
            notes.append(f"characters that the tokenizer does not know are left out, {self.dropped.total():,}: {most}")
        return notes


def width_for(parts: Any, block_size: int) -> int:
    """The width of rows for these texts: the longest's, a multiple of 64 where the context allows."""
    longest = max(int(np.diff(s.starts).max(initial=1)) for s in parts)
    return min(block_size, -(-longest // 64) * 64)


def shown(label: Label) -> str:
    """A label as it can be printed: a name from a file may hold anything, a terminal's control codes too."""
    text = str(label)
    return text if text.isprintable() else ascii(text)
