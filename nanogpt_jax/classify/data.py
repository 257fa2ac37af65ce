"""Labelled texts: read, split and tokenized, for a classifier.

A source is a file of rows (see data/records.py), `hf:NAME[:CONFIG]` for Hugging Face's `datasets` (NAME may be a local
folder), or a name in SOURCES. Each start reads all of it into memory, as labelled texts are few. rows.py decides which
rows are usable.
"""

# N texts, M tokens of all of them, W width of a padded row

import functools
import hashlib
import io
import itertools
import json
import os
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax.classify.rows import Example, Label, Rows, contradictions, label_notes, labels_of, plain
from nanogpt_jax.classify.settings import ClassifierConfig, LabelledConfig
from nanogpt_jax.config import UserError, suggestion
from nanogpt_jax.data import batches, hub, records, tables, text_file, tokenizer
from nanogpt_jax.data.shell import Source
from nanogpt_jax.data.tables import Row
from nanogpt_jax.data.tokenizer import Tokenizer, WordTokenizer
from nanogpt_jax.host.messages import listed, printable


@dataclass(frozen=True)
class Texts:
    """Labelled texts as tokens."""

    texts: list[str]
    labels: np.ndarray  # [N] int32, indices into the list of labels
    tokens: np.ndarray  # [M] int32, of all texts, concatenated
    starts: np.ndarray  # [N + 1], the start of each text in `tokens`

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, which: np.ndarray, width: int) -> np.ndarray:
        """Indices [...] -> int32 [..., W+2]: a text's tokens padded on the right with 0, their number, the label."""
        start = self.starts[which]
        length, at = self.starts[which + 1] - start, np.arange(width)
        index = np.minimum(start[..., None] + at, len(self.tokens) - 1)
        rows = np.zeros((*which.shape, width + 2), np.int32)
        rows[..., :width] = np.where(at < length[..., None], self.tokens[index], 0)
        rows[..., width], rows[..., width + 1] = length, self.labels[which]
        return rows

    def batch(
        self, steps: np.ndarray, rows: Any = slice(None), *, seed: int, batch_size: int, width: int
    ) -> np.ndarray:
        """The rows of steps [K], or some of them: int32 [K, B, W+2]. Every epoch visits each text once, in an order of
        its own."""
        which = batches.order(len(self), seed=seed, step=steps, batch_size=batch_size)[:, rows]
        return self.rows(which.astype(np.int64), width)


@dataclass(frozen=True)
class LabelledData:
    """A source, split, with all that `run/run_dir.py` records of a run's data."""

    tokenizer: Tokenizer
    labels: list[Label]
    splits: dict[str, Texts]  # train, val, test
    width: int  # of the padded rows
    notes: list[str]  # for the user, before training on it
    manifest: dict[str, Any]
    fingerprint: str  # equal for equal tokens, labels and split


# ---- reading --------------------------------------------------------------------------------------------------------


def read(cfg: LabelledConfig, notes: list[str] | None = None, flag: str = "data.source") -> list[Example]:
    """The examples of cfg.source, in its order. Appends remarks for the user to `notes`.

    UserError names the lines of unusable rows; `flag` is the one that gave the source.
    """
    if cfg.source in SOURCES:
        return SOURCES[cfg.source]()
    rows, examples = Rows(f"{flag}={cfg.source}"), []
    texts, labels = ("data.text_column", "data.label_column") if "." in flag else ("--text-column", "--label-column")
    table, name_of = _open(rows.what, cfg.source, cfg.split, [cfg.text_column, cfg.label_column])
    for line, record in table:
        if not rows.seen:  # a later row without the column has no text or no label
            _column(rows.what, line, record, texts, cfg.text_column)
            _column(rows.what, line, record, labels, cfg.label_column)
        text = rows.text(line, record.get(cfg.text_column))
        if text:
            examples.append(Example(text, rows.label(line, name_of(record.get(cfg.label_column))), line))
    rows.check()
    if notes is not None:
        notes += rows.notes()
    return examples


def read_texts(path: Path, column: str) -> list[tuple[int, Any]]:
    """(line, text) of a file without labels: a column of its rows, else a text a line. `Rows` checks them later."""
    what, place = str(path), Path(os.path.expanduser(path))
    if records.suffix(path) not in records.ROWS:
        return _text_lines(place, what)
    found = records.rows(place, what, [column])
    return [(line, _column(what, line, record, "--text-column", column)) for line, record in found]


def lines_of(content: bytes, what: str) -> list[tuple[int, Any]]:
    """(line, text) of standard input, a text a line. `Rows` checks them later."""
    return _text_lines(io.BytesIO(content), what)


def _text_lines(source: Source, what: str) -> list[tuple[int, Any]]:
    return [(number, line.rstrip("\r\n")) for number, line in text_file.lines(source, what)]


def _open(what: str, source: str, split: str, columns: Sequence[str]) -> tuple[Iterator[Row], Callable[[Any], Any]]:
    """The rows of a source, and a function from its labels, in the last column, to their names."""
    if source.startswith("hf:"):
        return _datasets(what, source, split, columns[-1])
    path = Path(os.path.expanduser(source))
    suffix = records.suffix(path)
    if suffix not in records.ROWS:
        known = ", ".join([*records.ROWS, "hf:NAME", *SOURCES])
        raise UserError(f"{what} is none of {known}{suggestion(source, SOURCES)}")
    names = records.class_names(path, columns[-1]) if suffix == ".parquet" else None
    return records.rows(path, what, columns), functools.partial(_name_of, names)


def _name_of(names: list[str] | None, label: Any) -> Any:
    if names is None or not isinstance(label, int):
        return label
    return names[label] if 0 <= label < len(names) else None  # -1 if a test set is published without labels


def _datasets(what: str, source: str, split: str, labels: str) -> tuple[Iterator[Row], Callable[[Any], Any]]:
    """A data set by name, downloaded if necessary."""
    name, _, config = source.removeprefix("hf:").partition(":")
    what = f"{what} (data.split={split})"
    data = hub.open_dataset(what, name, config, split=split, instead="a local .jsonl, .csv or .parquet file")
    names = getattr(data.features.get(labels), "names", None)  # of a ClassLabel
    return enumerate(data, start=1), functools.partial(_name_of, names)


def _column(what: str, line: int, record: dict[str, Any], setting: str, name: str) -> Any:
    if name not in record:
        there = ", ".join(printable(column)[:60] for column in record)
        hint = "the first line names the columns" if what.endswith((".csv", ".tsv")) else f"name another: {setting}"
        if any(";" in str(column) for column in record):
            hint = tables.SEMICOLONS
        raise UserError(f"{what}, line {line}: there is no column {setting}={name}; there are {there}\n       {hint}")
    return record[name]


# ---- what every machine has -----------------------------------------------------------------------------------------


def python_examples() -> list[Example]:
    """Paragraphs of Python's documentation ("prose") and of its standard library ("code"), 1,000 of each."""
    from pydoc_data.topics import topics

    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    prose = (p for key in sorted(topics) for p in topics[key].split("\n\n") if len(p.strip()) >= 40)
    blocks = (p for path in modules for p in path.read_text("utf-8", errors="replace").split("\n\n"))
    code = (p for p in blocks if len(p.strip()) >= 40)
    found = [(text, "prose") for text in itertools.islice(prose, 1000)]
    found += [(text, "code") for text in itertools.islice(code, 0, 10_000, 10)]  # not only from the first modules
    return [Example(text, kind, number) for number, (text, kind) in enumerate(found, start=1)]


SOURCES: dict[str, Callable[[], list[Example]]] = {"python": python_examples}


# ---- splitting and tokenizing ---------------------------------------------------------------------------------------


def open_data(cfg: ClassifierConfig, known: Tokenizer | None = None, run: dict[str, Any] | None = None) -> LabelledData:
    """The texts of cfg.data, split and tokenized.

    The tokenizer is `known`, else that of data.tokenizer, which may be made from the training texts.

    `run` is the manifest of a run that is resumed: its labels keep their order, and its texts their split, even if an
    earlier version made them by other rules.
    """
    what = f"data.source={cfg.data.source}"
    notes: list[str] = []
    examples = read(cfg.data, notes)
    labels, alike, several = labels_of(examples, what), label_notes(examples), contradictions(examples)
    if run and sorted(map(repr, run["labels"])) == sorted(map(repr, labels)):
        labels = run["labels"]
    by_text = run is None or run.get("split_by") == "text"
    try:
        parts = split(examples, cfg.data, by_text)
    except UserError as e:
        raise UserError("\n       ".join([str(e), *alike])) from None
    if several and not by_text:
        several = [f"{several[0]}; in this run, which an earlier version began, they may stand in several splits"]
    tok = known or tokenizer.open_or_make(cfg.data.tokenizer, (e.text + "\n" for e in parts["train"]))
    encoder = Encoder(tok, cfg.model.block_size, cfg.data.keep)
    splits = {name: encoder.encode(part, labels) for name, part in parts.items()}
    width = width_for(splits.values(), cfg.model.block_size)
    manifest = {
        "source": {"name": cfg.data.source, "texts": len(examples), "cut_to_the_context": encoder.cut},
        "labels": labels,
        **({"split_by": "text"} if by_text else {}),
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
    notes += [*alike, *several, *encoder.notes()]
    return LabelledData(tok, labels, splits, width, notes, manifest, digest.hexdigest())


def split(examples: list[Example], cfg: LabelledConfig, by_text: bool = True) -> dict[str, list[Example]]:
    """{"train", "val", "test"}, each with the same share of every label.

    The texts of a label are sorted by their hash and cut. So the split depends only on the texts, and copies of a text
    stay together. If a text has several labels, its rarest label decides. Without `by_text`, copies with different
    labels are split separately, as in earlier versions.
    """
    keys = [hashlib.sha256(e.text.encode("utf-8", "surrogatepass")).hexdigest() for e in examples]
    if not by_text:
        keys = [f"{key} {e.label}" for key, e in zip(keys, examples, strict=True)]
    texts: dict[str, set[str]] = defaultdict(set)  # label -> keys
    for key, e in zip(keys, examples, strict=True):
        texts[str(e.label)].add(key)
    wanted = {label: _sizes(len(own), cfg) for label, own in texts.items()}
    if few := {label: len(texts[label]) for label, (_, _, train) in wanted.items() if train < 1}:
        raise UserError(_too_few(few, len(texts), cfg))
    names, part_of = ("test", "val", "train"), {}
    for label in sorted(texts, key=lambda label: (len(texts[label]), label)):
        placed = Counter(part_of[key] for key in texts[label] if key in part_of)  # by a rarer label
        free = sorted(key for key in texts[label] if key not in part_of)
        missing = [max(0, n - placed[name]) for n, name in zip(wanted[label], names, strict=True)]
        while sum(missing) > len(free):  # a split already has too many
            missing[missing.index(max(missing))] -= 1
        part_of |= zip(free, (name for name, n in zip(names, missing, strict=True) for _ in range(n)), strict=True)
        for name, n in zip(names, wanted[label], strict=True):
            if n and not any(part_of[key] == name for key in texts[label]):
                raise UserError(
                    f"data.source={cfg.source}: no text with the label {printable(label)} is left for {name}, as all "
                    "have other labels, too, which are rarer\n       give each text one label, or leave the label out"
                )
    return {name: [e for key, e in zip(keys, examples, strict=True) if part_of[key] == name] for name in names[::-1]}


def _sizes(n: int, cfg: LabelledConfig) -> tuple[int, int, int]:
    """How many of a label's n texts to use for testing, validation and training."""
    test, val = (max(1, round(n * f)) if f else 0 for f in (cfg.test_fraction, cfg.val_fraction))
    return test, val, n - test - val


def _too_few(few: dict[str, int], n_labels: int, cfg: LabelledConfig) -> str:
    which = f"{len(few):,} of {n_labels:,} labels, {listed(f'{printable(label)} ({n})' for label, n in few.items())},"
    if len(few) == 1:
        which = next(f"the label {printable(label)}, {n}," for label, n in few.items())
    hint = "give more of them, leave the label out, or check that data.label_column is the label"
    if len(few) > 10 and len(few) > n_labels / 2:
        hint = (
            f"data.label_column={cfg.label_column} looks like an id, a text or a measured number; "
            "name the column that holds the labels"
        )
    return (
        f"data.source={cfg.source} has too few different texts with {which} to keep "
        f"data.val_fraction={cfg.val_fraction} and data.test_fraction={cfg.test_fraction} of them\n       {hint}"
    )


class Encoder:
    """Encodes texts as a run does: cut to its context, without characters or words that its tokenizer lacks."""

    def __init__(self, tok: Tokenizer, block_size: int, keep: str):
        self._tok, self._block_size, self._keep = tok, block_size, keep
        ids = [i for i in range(tok.n_vocab) if i != tok.end_of_text]
        self._known = set(tok.decode(ids)) if tok.name == "char" else None
        self._unit = "word" if tok.name == "word" else "character"
        self.cut = self.seen = 0  # number of texts that were cut, and of all
        self.dropped: Counter[str] = Counter()

    def tokens(self, texts: Sequence[str], name: Callable[[int], str], what: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Tokens [M] int32 of all texts, and the start of each [N+1].

        UserError if a text has no tokens; `name(i)` is the name of text i of `what`.
        """
        found = [self._encode(text) for text in texts]
        if empty := [name(i) for i, ids in enumerate(found) if not len(ids)]:
            rest = f"\n       in all {len(empty):,} texts: {listed(empty)}" if len(empty) > 1 else ""
            known = f"has no {self._unit} that the run's tokenizer knows; leave it out"
            raise UserError(f"{what}{', ' if what else ''}{empty[0]} {known}{rest}")
        starts = np.zeros(len(found) + 1, np.int64)
        np.cumsum([len(ids) for ids in found], out=starts[1:])
        return np.concatenate([*found, np.zeros(0, np.int32)]), starts

    def _encode(self, text: str) -> np.ndarray:
        if self._known is not None and (unknown := set(text) - self._known):
            self.dropped.update(c for c in text if c in unknown)
            text = text.translate(dict.fromkeys(map(ord, unknown)))
        if isinstance(self._tok, WordTokenizer):
            ids, unknown = self._tok.encode_known(text)
            self.dropped.update(word.removeprefix(" ") for word in unknown)
        else:
            ids = self._tok.encode(text)
        self.seen += 1
        self.cut += len(ids) > self._block_size
        return ids[: self._block_size] if self._keep == "first" else ids[-self._block_size :]

    def encode(self, examples: list[Example], labels: list[Label], what: str = "data.source") -> Texts:
        """The examples as `Texts`. UserError if a label is none of `labels`."""
        place = {str(label): i for i, label in enumerate(labels)}
        if unknown := Counter(str(e.label) for e in examples if str(e.label) not in place):
            line = next(e.line for e in examples if str(e.label) in unknown)
            near = {plain(name): name for name in place}
            each = listed(
                f"{printable(name)} ({n:,}{f'; is it {printable(near[plain(name)])}?' if plain(name) in near else ''})"
                for name, n in unknown.most_common()
            )
            raise UserError(
                f"{what}, line {line}: the run has no label {each}; it has {listed(map(printable, labels))}\n"
                f"       give them labels of the run, or remove the rows: {unknown.total():,} of {len(examples):,}"
            )
        texts = [e.text for e in examples]
        tokens, starts = self.tokens(texts, lambda i: f"line {examples[i].line}", what)
        return Texts(texts, np.array([place[str(e.label)] for e in examples], np.int32), tokens, starts)

    def notes(self) -> list[str]:
        """Remarks for the user on what was left out."""
        notes = []
        if self.cut:
            end = "first" if self._keep == "first" else "last"
            notes.append(
                f"{self.cut:,} of {self.seen:,} texts are longer than model.block_size={self._block_size} tokens: "
                f"their {end} {self._block_size} are read (data.keep)"
            )
        if self.dropped:
            most = " ".join(repr(c) for c, _ in self.dropped.most_common(8))
            notes.append(
                f"{self._unit}s that the tokenizer does not know are left out, {self.dropped.total():,}: {most}"
            )
        return notes


def width_for(parts: Any, block_size: int) -> int:
    """The width of rows for these texts: that of the longest, rounded up to a multiple of 64 if the context allows."""
    longest = max(int(np.diff(s.starts).max(initial=1)) for s in parts)
    return min(block_size, -(-longest // 64) * 64)
