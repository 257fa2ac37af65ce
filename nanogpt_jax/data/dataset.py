"""Prepared tokens, opened: those of one source, or a mixture of several."""

import json
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax.config import DataConfig, UserError
from nanogpt_jax.data import corpora, prepare, shards, text_file, tokenizer
from nanogpt_jax.data.batches import Mixture
from nanogpt_jax.data.corpus import Corpus, sha256_of_json
from nanogpt_jax.data.tokenizer import Tokenizer
from nanogpt_jax.host.progress import Progress

LONGEST_CYCLE = 1 << 16  # sequences in which a mixture keeps its proportions


@dataclass(frozen=True, eq=False)  # the same object or another one: arrays have no other order
class Dataset:
    """Prepared tokens, checked."""

    folder: Path
    train: np.memmap | Mixture  # [N] uint16 or uint32, read-only
    val: np.ndarray  # for a mixture: those of its sources, concatenated
    tokenizer: Tokenizer
    manifest: dict[str, Any]  # "train" and "val" hold the counts "tokens" and "bytes" (of UTF-8)
    fingerprint: str  # equal for equal tokens and tokenizers, on any machine


def open_data(cfg: DataConfig) -> Dataset:
    """The tokens of `cfg`, prepared on first use. UserError if the text is unavailable or the folder damaged."""
    kind = cfg.tokenizer.partition(":")[0]
    given = None if kind in tokenizer.TOKENIZERS else tokenizer.load(tokenizer.find(cfg.tokenizer))
    if not cfg.mixture:
        return _open(prepare.prepared(cfg, corpora.read(cfg.source, cfg.dir, cfg.field), given))

    cycle = _cycle(cfg.mixture)
    sources = {name: corpora.read(name, cfg.dir, cfg.field) for name in cfg.mixture}
    if given is None and kind != "gpt2":
        given = _shared_tokenizer(cfg, list(sources.values()))
    cfgs = {name: replace(cfg, source=name, mixture={}) for name in sources}
    parts = {name: _open(prepare.prepared(cfgs[name], corpus, given)) for name, corpus in sources.items()}
    return _mixed(cfg, cycle, parts)


def encode(corpus: Corpus, tok: Tokenizer) -> tuple[np.ndarray, int]:
    """The tokens [N] int32 of a whole corpus, as `open_data` would encode it, and its number of bytes in UTF-8."""
    if corpus.documents:
        pieces = shards.of_documents(corpus.blocks(text_file.silent), 0.0, [])
    else:
        pieces = shards.of_text(corpus.blocks(text_file.silent), 0)
    found, n_bytes = [np.array([], np.int32)], 0
    for piece in pieces:
        found += shards.tokens(piece, tok, np.dtype(np.int32))
        n_bytes += len(piece.text.encode())
    return np.concatenate(found), n_bytes


# ---- mixtures -------------------------------------------------------------------------------------------------------


def _cycle(mixture: dict[str, float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of the weights, taken as the decimals that were written."""
    exact = [Fraction(str(weight)) for weight in mixture.values()]
    whole = [int(weight * lcm(*(w.denominator for w in exact))) for weight in exact]
    cycle = tuple(n // gcd(*whole) for n in whole)
    if sum(cycle) > LONGEST_CYCLE:
        raise UserError(
            f"data.mixture: its weights are exact only in {sum(cycle):,} sequences, more than {LONGEST_CYCLE:,}\n"
            "       round them, for example to 0.7 and 0.3"
        )
    return cycle


def _mixed(cfg: DataConfig, cycle: tuple[int, ...], parts: dict[str, Dataset]) -> Dataset:
    every = list(parts.values())
    train = Mixture(tuple(parts), tuple(d.train for d in every if isinstance(d.train, np.ndarray)), cycle)
    manifest = {
        "mixture": {
            name: {"sequences": n, **data.manifest} for (name, data), n in zip(parts.items(), cycle, strict=True)
        },
        "n_vocab": every[0].tokenizer.n_vocab,
    }
    for split in ("train", "val"):
        manifest[split] = {of: sum(d.manifest[split][of] for d in every) for of in ("tokens", "bytes")}
    val = np.concatenate([d.val for d in every])
    identity = sha256_of_json([[d.fingerprint, n] for d, n in zip(every, cycle, strict=True)])
    return Dataset(Path(cfg.dir), train, val, every[0].tokenizer, manifest, identity)


def _shared_tokenizer(cfg: DataConfig, sources: list[Corpus]) -> Tokenizer:
    """One tokenizer for all sources, made once and stored in <data.dir>/tokenizer-<key>/."""
    key = sha256_of_json([prepare.FORMAT, cfg.tokenizer, [[c.name, c.identity] for c in sources]])[:12]
    folder = Path(cfg.dir) / f"tokenizer-{key}"
    try:
        return tokenizer.load(folder)
    except UserError:  # absent or incomplete
        pass
    try:
        with Progress("reading") as progress:
            made = prepare.make_tokenizer(cfg.tokenizer, sources, progress)
        made.save(folder)
    except OSError as e:
        raise UserError(f"cannot write the tokenizer into data.dir={cfg.dir}: {e.strerror or e}") from None
    return made


# ---- opening --------------------------------------------------------------------------------------------------------


def _open(folder: Path) -> Dataset:
    def damaged(path: Path, what: str) -> UserError:
        return UserError(f"{path} {what}\n       delete the folder {folder} and run again: it is prepared anew")

    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        checksum = manifest.pop("checksum")
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged(path, "is damaged: it is not a manifest") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if checksum != sha256_of_json(manifest):
        raise damaged(path, "is damaged: its checksum is wrong")

    try:
        tok = tokenizer.load(folder / "tokenizer")
    except UserError as e:
        raise damaged(folder / "tokenizer", f"cannot be used: {e}") from None
    if tok.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise damaged(folder / "tokenizer", "is not the tokenizer that these tokens were made with")

    splits: dict[str, np.memmap] = {}
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    for split in ("train", "val"):
        path, wanted = folder / f"{split}.bin", manifest[split]
        try:
            size = path.stat().st_size
            if size != wanted["tokens"] * dtype.itemsize:
                raise damaged(path, f"is damaged: {size} bytes instead of {wanted['tokens'] * dtype.itemsize}")
            if prepare.fingerprint(path) != wanted["fingerprint"]:
                raise damaged(path, "is damaged: its fingerprint is not the one in manifest.json")
            splits[split] = np.memmap(path, dtype, mode="r")
        except FileNotFoundError:
            raise damaged(path, "is missing") from None
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None
    if splits["val"].size > splits["train"].size:
        print(f"note: of {folder} more validates than trains, as whole documents are kept together", file=sys.stderr)
    identity = sha256_of_json([tok.fingerprint, manifest["train"]["fingerprint"], manifest["val"]["fingerprint"]])
    return Dataset(folder, splits["train"], splits["val"], tok, manifest, identity)
