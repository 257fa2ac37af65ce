"""What is known of the text before anything is read: how many tokens there are, and how many different ones."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_jax.config import DataConfig

GPT2 = 50257
ASSUMED = {
    "char": 100,
    "word": 1000,
}  # tokens of a vocabulary that was not made yet: 65 to 109 and 100 to thousands here


@dataclass(frozen=True)
class Text:
    """Facts about the training text. 0 tokens: not known."""

    vocabulary: int
    whence: str  # where the vocabulary is known from
    train: int = 0  # tokens
    val: int = 0


def text(cfg: DataConfig, vocab_size: int) -> Text:
    """What prepared tokens in data.dir say, if they are there; else what the tokenizer's name says."""
    found = None if cfg.mixture else _prepared(cfg)
    train, val = (found["train"]["tokens"], found["val"]["tokens"]) if found else (0, 0)
    if vocab_size:
        return Text(vocab_size, "model.vocab_size", train, val)
    kind, _, size = cfg.tokenizer.partition(":")
    if found:
        return Text(found["n_vocab"], f"prepared in {cfg.dir}", train, val)
    if kind == "gpt2":
        return Text(GPT2, "GPT-2's")
    if kind == "bpe":
        return Text(int(size), cfg.tokenizer)
    if kind not in ASSUMED and (of_folder := _of_tokenizer(Path(cfg.tokenizer))):
        return Text(of_folder, cfg.tokenizer)
    assumed = ASSUMED.get(kind, ASSUMED["char"])
    return Text(assumed, f"assumed for {kind}; nanogpt-jax prepare makes it known, or --model.vocab-size")


def _prepared(cfg: DataConfig) -> dict[str, Any] | None:
    """The newest manifest in data.dir of such a source and tokenizer. Whether the text has changed is not asked."""
    kind, _, size = cfg.tokenizer.partition(":")
    found = []
    for path in Path(cfg.dir).glob("*/manifest.json"):
        manifest = _json(path)
        try:
            source, tokenizer = manifest["source"], manifest["tokenizer"]["kind"]
            same = cfg.source in (source["name"], source.get("source")) or Path(cfg.source).stem == source["name"]
            same = same and tokenizer == kind and manifest["val_fraction"] == cfg.val_fraction
            counts = [manifest["n_vocab"], manifest["train"]["tokens"], manifest["val"]["tokens"]]
            if same and all(type(n) is int for n in counts) and (not size or counts[0] == int(size)):
                found.append((path.stat().st_mtime, path.as_posix(), manifest))
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            continue
    return max(found)[2] if found else None


def _of_tokenizer(folder: Path) -> int:
    """The size of the vocabulary of a tokenizer's or a run's folder; 0 if it is not told."""
    for path in (folder / "tokenizer.json", folder / "tokenizer" / "tokenizer.json"):
        size = _json(path).get("n_vocab", 0)
        if isinstance(size, int) and size > 0:
            return size
    return 0


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
