"""Blocks of text to pieces, each of which belongs to one split, and pieces to shards: files of tokens."""

import hashlib
import json
import re
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanogpt_jax.data import tokenizer
from nanogpt_jax.data.corpus import Block
from nanogpt_jax.data.tokenizer import Tokenizer
from nanogpt_jax.host import files
from nanogpt_jax.host.progress import Progress

PIECE = 1 << 16  # characters of a document that are encoded at a time
SPACE = re.compile(r"\s")  # a word begins at each
SHARD = 1 << 22  # characters in a shard: the most that an interruption loses, and that a thread holds


# ---- from blocks to pieces ------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    split: str  # "train" or "val"
    text: str  # at most a few PIECEs
    ends: bool  # end-of-text follows


def of_text(blocks: Iterator[Block], cut: int, between_words: bool = False) -> Iterator[Piece]:
    """A text without documents: the first `cut` characters to train on, the rest to validate.

    `between_words`: if the cut falls into a word, it is moved to the word's end.
    """
    rest = ""  # of the block with the cut

    def head() -> Iterator[str]:
        nonlocal rest
        left = cut
        while left and (block := next(blocks, None)):
            yield block[0][:left]
            rest = block[0][left:]
            left -= len(block[0]) - len(rest)
        if between_words:
            while not (space := SPACE.search(rest)) and (block := next(blocks, None)):
                yield rest
                rest = block[0]
            end = space.start() if space else len(rest)
            yield rest[:end]
            rest = rest[end:]

    def tail() -> Iterator[str]:
        yield rest
        for text, _ in blocks:
            yield text

    for text in tokenizer.pieces(head(), PIECE):
        yield Piece("train", text, False)
    for text in tokenizer.pieces(tail(), PIECE):
        yield Piece("val", text, False)


def of_documents(blocks: Iterator[Block], val_fraction: float, blank: list[None]) -> Iterator[Piece]:
    """Documents, each in one split. The first trains and the second validates, so that neither split is empty; for the
    others, a hash of the number decides. Documents without text get no number; each adds an entry to `blank`."""
    number = 0
    for block in blocks:
        pieces = tokenizer.pieces(_rest_of_document(block, blocks), PIECE)
        text = next(pieces, "")
        if not text:
            blank.append(None)
            continue
        split = "val" if number == 1 or (number > 1 and _chance(number) < val_fraction) else "train"
        number += 1
        for following in pieces:
            yield Piece(split, text, False)
            text = following
        yield Piece(split, text, True)


def _rest_of_document(block: Block, blocks: Iterator[Block]) -> Iterator[str]:
    text, ends = block
    yield text
    while not ends:
        text, ends = next(blocks)
        yield text


def _chance(number: int) -> float:
    """A hash of `number`, uniform in [0, 1)."""
    return int.from_bytes(hashlib.sha256(b"%d" % number).digest()[:6], "big") / (1 << 48)


# ---- from pieces to shards ------------------------------------------------------------------------------------------


def make(
    pieces: Iterator[Piece], tok: Tokenizer, dtype: np.dtype, folder: Path, threads: int, progress: Progress
) -> list[dict[str, Any]]:
    """Write the shards of all pieces into `folder` -> their headers.

    Threads, not processes: tiktoken releases Python's lock, nothing is copied, and scripts need no __main__ guard.
    """
    made: list[dict[str, Any]] = []
    pending: deque[Future[dict[str, Any]]] = deque()

    def collect() -> None:
        made.append(pending.popleft().result())
        progress.add(sum(made[-1][split]["bytes"] for split in ("train", "val")))

    with ThreadPoolExecutor(threads, thread_name_prefix="tokens") as pool:
        try:
            for number, shard in enumerate(_shards(pieces)):
                pending.append(pool.submit(_make_one, folder, number, shard, tok, dtype))
                while len(pending) > threads:  # one shard read ahead
                    collect()
            while pending:
                collect()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return made


def _shards(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    shard: list[Piece] = []
    size = 0
    for piece in pieces:
        shard.append(piece)
        size += len(piece.text) + 64  # many short documents take memory too
        if size >= SHARD:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _make_one(folder: Path, number: int, pieces: list[Piece], tok: Tokenizer, dtype: np.dtype) -> dict[str, Any]:
    """Write a file with a line of JSON and the ids of train and val, unless it exists with this text -> the JSON."""
    digest = hashlib.sha256()
    counts = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in ("train", "val")}
    for piece in pieces:
        utf8 = piece.text.encode()
        digest.update(b"%s %d %d\n%s" % (piece.split.encode(), piece.ends, len(utf8), utf8))
        counts[piece.split]["bytes"] += len(utf8)
        counts[piece.split]["documents"] += piece.ends
    path = folder / f"{number:06d}.shard"
    if path.exists():
        try:
            before, content = _read(folder, number)
            if before["text"] == digest.hexdigest() and before["ids"] == hashlib.sha256(content).hexdigest():
                return before
        except (ValueError, KeyError):
            pass
        print(f"note: {path}, left by an interrupted preparation, is damaged; it is made again", file=sys.stderr)
    streams: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for piece in pieces:
        streams[piece.split] += tokens(piece, tok, dtype)
    for split, found in streams.items():
        counts[split]["tokens"] = sum(map(len, found))
    content = np.concatenate([np.array([], dtype), *streams["train"], *streams["val"]]).tobytes()
    header = {"text": digest.hexdigest(), "ids": hashlib.sha256(content).hexdigest(), **counts}
    with files.replacing(path) as beside:
        beside.write_bytes(json.dumps(header).encode() + b"\n" + content)
    return header


def tokens(piece: Piece, tok: Tokenizer, dtype: np.dtype) -> list[np.ndarray]:
    """The ids of a piece, with end-of-text if it ends there: arrays [N] of `dtype`."""
    ends = piece.ends and tok.end_of_text is not None
    return [tok.encode(piece.text).astype(dtype), *([np.array([tok.end_of_text], dtype)] if ends else [])]


def ids(folder: Path, number: int, split: str, dtype: np.dtype) -> bytes:
    """The ids of one split in a shard."""
    header, content = _read(folder, number)
    cut = header["train"]["tokens"] * dtype.itemsize
    return content[:cut] if split == "train" else content[cut:]


def _read(folder: Path, number: int) -> tuple[dict[str, Any], bytes]:
    header, _, content = (folder / f"{number:06d}.shard").read_bytes().partition(b"\n")
    return json.loads(header), content
