"""The text that a run is measured on: one that is given, or a part of its own data. No jax here."""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt_jax.config import DataConfig, UserError
from nanogpt_jax.data import batches, corpora
from nanogpt_jax.data.corpus import Corpus
from nanogpt_jax.data.dataset import Dataset, encode, open_data
from nanogpt_jax.data.tokenizer import Tokenizer, UnknownText
from nanogpt_jax.host import files


@dataclass(frozen=True)
class Text:
    """A text as one run reads it."""

    name: str
    tokens: np.ndarray  # [N], of an integer type
    n_bytes: int  # in UTF-8
    tokenizer: Tokenizer
    source: str = ""  # where all of it comes from, if it is one source

    def best_possible(self, block_size: int, stride: int) -> np.ndarray | None:
        """Each token's nats [N-1] by whoever knows how the source writes, in the same windows; None if nobody does."""
        return corpora.best_possible(self.source, self.tokens, self.tokenizer, block_size, stride)

    def content(self) -> bytes:
        """The text itself, without end-of-text tokens."""
        tokens = self.tokens
        if self.tokenizer.end_of_text is not None:
            tokens = tokens[tokens != self.tokenizer.end_of_text]
        return self.tokenizer.decode_bytes(tokens)


def read(source: str, field: str) -> Corpus:
    """The corpus of --data and --field. UserError if it is unavailable."""
    with _named_as_here():
        return corpora.read(source, field=field)


def given(source: str, corpus: Corpus, tokenizer: Tokenizer, run: Path) -> Text:
    """The text of --data, encoded as training would. UserError if it is unreadable, or less than two tokens."""
    with _named_as_here():
        try:
            tokens, n_bytes = encode(corpus, tokenizer)
        except UnknownText as e:
            raise UserError(f"--data={source} cannot be read with the tokenizer of {run}: {e}") from None
    if len(tokens) < 2:
        raise UserError(f"--data={source} has {len(tokens)} tokens; at least 2 are needed to predict one")
    return Text(source, tokens, n_bytes, tokenizer, source)


@contextlib.contextmanager
def _named_as_here() -> Iterator[None]:
    """Renames settings in errors about --data."""
    try:
        yield
    except UserError as e:
        ours = {"--data.source=": "--data=", "data.source=": "--data=", "--data.field=": "--field="}
        raise UserError(functools.reduce(lambda text, name: text.replace(name, ours[name]), ours, str(e))) from None


def own(split: str, cfg: DataConfig, tokenizer: Tokenizer, run: Path) -> Text:
    """A split of the run's own data; UserError if it is no longer available or has changed."""
    data = own_data(cfg, run, "to measure it on another text: --data FILE")
    tokens = data.val if split == "val" else data.train
    if isinstance(tokens, batches.Mixture):
        tokens = np.concatenate(tokens.parts)
    source = "" if cfg.mixture else cfg.source
    return Text(f"{cfg.title} ({split})", tokens, data.manifest[split]["bytes"], tokenizer, source)


def own_data(cfg: DataConfig, run: Path, other: str) -> Dataset:
    """The data that the run was trained on. UserError, with `other` as advice, if it is gone or has changed."""
    path = run / "data.json"
    try:
        fingerprint = json.loads(files.read(path))["fingerprint"]
    except FileNotFoundError:
        raise UserError(f"{run} does not say what it was trained on: {path.name} is missing\n       {other}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e})\n       {other}") from None
    try:
        data = open_data(cfg)
    except UserError as e:
        raise UserError(f"the data of {run} is unavailable: {e}\n       {other}") from None
    if data.fingerprint != fingerprint:
        raise UserError(
            f"the data of {run} has changed: {cfg.title} gives other tokens now than it was trained on\n"
            f"       bring the old text back; {other}"
        )
    return data
