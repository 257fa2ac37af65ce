"""Text to tokens on disk, once: `<data.dir>/<name>-<key>/` with train.bin, val.bin, tokenizer/ and manifest.json.

The key is a hash of all that decides the tokens, so another text or setting is another folder. A folder is made under
another name and then renamed: it is there whole or not at all, also when two processes prepare it at once.
"""

import hashlib
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax.config import DataConfig, UserError
from nanogpt_jax.data import corpora, tokenizer
from nanogpt_jax.data.corpora import Corpus
from nanogpt_jax.data.tokenizer import Tokenizer

FORMAT = 1  # of the folder, and of how corpora compose their texts; a new number prepares everything anew
MIB = 1 << 20


@dataclass(frozen=True)
class Dataset:
    """Prepared tokens, checked."""

    folder: Path
    train: np.memmap  # [N] uint16 or uint32, read-only
    val: np.memmap
    tokenizer: Tokenizer
    manifest: dict[str, Any]  # "train" and "val" hold the counts "tokens" and "bytes" (of UTF-8)
    fingerprint: str  # equal where tokens and tokenizer are, on any machine


def open_data(cfg: DataConfig) -> Dataset:
    """The tokens of `cfg`, prepared on first use. UserError if the text cannot be had or the folder is damaged."""
    corpus = corpora.read(cfg.source, cfg.dir)
    key = _sha256([FORMAT, corpus.name, corpus.identity, tokenizer.identity(cfg.tokenizer), cfg.val_fraction])[:12]
    folder = Path(cfg.dir) / f"{corpus.name[:40]}-{key}"  # file systems end names at 255 bytes
    if not folder.exists():
        _prepare(cfg, corpus, folder)
    return _open(folder)


def _prepare(cfg: DataConfig, corpus: Corpus, folder: Path) -> None:
    text = corpus.text
    cut = int(len(text) * (1 - cfg.val_fraction))
    parts = {"train": text[:cut], "val": text[cut:]}
    tok = tokenizer.make(cfg.tokenizer, text)
    tokens = {split: tok.encode(part) for split, part in parts.items()}
    for split, ids in tokens.items():
        if len(ids) < 2:
            raise UserError(
                f"data.val_fraction={cfg.val_fraction} of data.source={cfg.source} ({len(text)} characters) leaves "
                f"{len(ids)} tokens for {split}, which needs at least 2; give a longer text or another fraction"
            )
    dtype = np.dtype(np.uint16 if tok.n_vocab <= 1 << 16 else np.uint32).newbyteorder("<")
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.mkdir(parents=True)
        tok.save(partial / "tokenizer")
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "source": corpus.facts,
            "val_fraction": cfg.val_fraction,
            "tokenizer": {"kind": tok.name, "fingerprint": tok.fingerprint},
            "n_vocab": tok.n_vocab,
            "dtype": dtype.name,
        }
        for split, ids in tokens.items():
            path = partial / f"{split}.bin"
            ids.astype(dtype).tofile(path)
            manifest[split] = {
                "tokens": len(ids),
                "bytes": len(parts[split].encode()),
                "fingerprint": fingerprint(path),
            }
        manifest["checksum"] = _sha256(manifest)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():
                raise
            # another process was quicker: its folder holds the same
    except OSError as e:
        raise UserError(f"cannot write prepared tokens into data.dir={cfg.dir}: {e.strerror or e}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        raise damaged(path, "is damaged: it is no manifest") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if checksum != _sha256(manifest):
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
            if fingerprint(path) != wanted["fingerprint"]:
                raise damaged(path, "is damaged: its fingerprint is not the one in manifest.json")
            splits[split] = np.memmap(path, dtype, mode="r")
        except FileNotFoundError:
            raise damaged(path, "is missing") from None
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None
    identity = _sha256([tok.fingerprint, manifest["train"]["fingerprint"], manifest["val"]["fingerprint"]])
    return Dataset(folder, splits["train"], splits["val"], tok, manifest, identity)


def fingerprint(path: Path) -> str:
    """sha256 over a file's size and up to 64 evenly spaced blocks of 1 MiB: a small file whole, a big one sampled."""
    size = path.stat().st_size
    whole = size <= 64 * MIB
    starts = range(0, size, MIB) if whole else [i * (size - MIB) // 63 for i in range(64)]
    digest = hashlib.sha256(b"%d\n" % size)
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(MIB))
    return digest.hexdigest()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
