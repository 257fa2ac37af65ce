"""Multiple choice as in HellaSwag, and the last word of a passage as in LAMBADA, by lm-eval's rules (0.4.13).

Items come from a file with a JSON object a line, in the form in which these data sets are published, or from the
Hugging Face hub as hf:NAME[:CONFIG[:SPLIT]], where NAME may be a local folder. Those in `BUILT_IN` are written here.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax.config import UserError
from nanogpt_jax.data import frases, hub, records
from nanogpt_jax.evaluation.likelihood import Model, encode_pair, log_likelihoods
from nanogpt_jax.evaluation.loss import Track, silent

BUILT_IN: dict[str, Callable[[], list[dict[str, Any]]]] = {"frases": frases.items}  # a file of that name: ./frases


@dataclass(frozen=True)
class Choice:
    """A context and its possible endings; number `gold` is the true one."""

    where: str  # "FILE, line 3"
    context: str
    endings: tuple[str, ...]
    gold: int
    group: str = ""  # items of a group have a figure of their own


@dataclass(frozen=True)
class LastWord:
    where: str
    context: str
    word: str  # with the space before it


def read_choices(source: str) -> list[Choice]:
    """Items of HellaSwag's form {"ctx", "endings", "label"} or lm-eval's {"query", "choices", "gold"}, which may have a
    "group".

    If activity_label, ctx_a and ctx_b are present, as in the published HellaSwag, the texts are made from them as in
    lm-eval.
    """
    return [_choice(where, row) for where, row in _rows(source)]


def _choice(where: str, row: dict[str, Any]) -> Choice:
    known = ("query", "choices", "gold") if "query" in row else ("ctx", "endings", "label")
    context, endings, gold = (_field(where, row, name) for name in known)
    if not isinstance(context, str):
        raise UserError(f"{where}: {known[0]} must be text, but is {context!r:.80}")
    if not (isinstance(endings, Sequence) and len(endings) > 1 and all(isinstance(e, str) for e in endings)):
        raise UserError(f"{where}: {known[1]} must be a list of two or more texts, but is {endings!r:.80}")
    if isinstance(gold, str) and gold.isdecimal():  # HellaSwag's labels are text
        gold = int(gold)
    if type(gold) is not int:
        raise UserError(f"{where}: {known[2]}={gold!r:.80} must be a whole number, which of the {known[1]} is right")
    if not 0 <= gold < len(endings):
        raise UserError(f"{where}: {known[2]}={gold} must lie in 0 to {len(endings) - 1}, there are {len(endings)}")
    if {"activity_label", "ctx_a", "ctx_b"} <= row.keys():
        ctx = f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}"
        context, endings = _hellaswag(ctx), [_hellaswag(e) for e in endings]
    if not all(endings):
        raise UserError(f"{where}: {known[1]} holds an empty text")
    group = row.get("group") or ""
    if not isinstance(group, str):
        raise UserError(f"{where}: group must be text, but is {group!r:.80}")
    return Choice(where, context, tuple(endings), gold, group)


def _hellaswag(text: str) -> str:
    """`text` without WikiHow's marks: " [title]" ends a sentence, others in square brackets are removed."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def read_last_words(source: str) -> list[LastWord]:
    """Items {"text": ...}; what follows the last space is to be predicted."""
    found = []
    for where, row in _rows(source):
        text = _field(where, row, "text")
        if not isinstance(text, str):
            raise UserError(f"{where}: text must be text, but is {text!r:.80}")
        context, space, word = text.rpartition(" ")
        if not (space and word):
            raise UserError(f"{where}: text must end in a space and a word, but is {text[-60:]!r}")
        found.append(LastWord(where, context, space + word))
    return found


def score_choices(model: Model, items: Sequence[Choice], track: Track = silent) -> dict[str, np.ndarray]:
    """{"acc", "acc_norm"}, each [n]: 1 if the true ending was the likeliest, else 0.

    acc compares the log-likelihoods of the endings, acc_norm those divided by the endings' lengths in characters.
    (lm-eval's documentation says bytes, but its code divides by characters.) A space joins context and ending.
    """
    pairs = [encode_pair(model, item.context, " " + ending, item.where) for item in items for ending in item.endings]
    found = iter(log_likelihoods(model, pairs, track))
    right = []
    for item in items:
        nats = np.array([next(found).nats for _ in item.endings])
        by_length = nats / np.array([float(len(ending)) for ending in item.endings])
        right.append((nats.argmax() == item.gold, by_length.argmax() == item.gold))
    return {name: np.array([r[i] for r in right], np.float64) for i, name in enumerate(("acc", "acc_norm"))}


def score_last_words(model: Model, items: Sequence[LastWord], track: Track = silent) -> dict[str, np.ndarray]:
    """{"acc": 1 if greedy decoding writes exactly the word, else 0, "nats": -log p of the word}, each [n]."""
    pairs = [encode_pair(model, item.context, item.word, item.where) for item in items]
    found = log_likelihoods(model, pairs, track)
    return {"acc": np.array([f.greedy for f in found], np.float64), "nats": np.array([-f.nats for f in found])}


# ---- where items come from ------------------------------------------------------------------------------------------


def _field(where: str, row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise UserError(f"{where} has no {name}; it has {', '.join(map(str, row)) or 'nothing'}")
    return row[name]


def _rows(source: str) -> list[tuple[str, dict[str, Any]]]:
    if source in BUILT_IN:
        return [(f"{source}, item {number}", row) for number, row in enumerate(BUILT_IN[source](), start=1)]
    rows = list(_hub_rows(source) if source.startswith("hf:") else _file_rows(source))
    if not rows:
        raise UserError(f"{source} holds no items; give a file with one JSON object a line")
    return rows


def _file_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(os.path.expanduser(source))
    for number, row in records.rows(path, source):
        yield f"{source}, {records.unit(path)} {number}", row


def _hub_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    name, config, split, *more = (*source.removeprefix("hf:").split(":"), "", "")
    if not name or any(more):
        raise UserError(f"{source} must have the form hf:NAME[:CONFIG[:SPLIT]]")
    found = hub.open_dataset(source, name, config, instead="a local .jsonl file")
    splits = [split] if split else ["validation", "test", "train"]
    taken = next((s for s in splits if s in found), None)
    if taken is None:
        raise UserError(f"{source}: no split {split}; it has {', '.join(map(str, found))}")
    for number, row in enumerate(found[taken], start=1):
        yield f"{source} ({taken}), row {number}", dict(row)
