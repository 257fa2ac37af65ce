"""Text to tokens on disk, once: `<data.dir>/<name>-<key>/` with train.bin, val.bin, tokenizer/ and manifest.json.

The key is a hash of everything that decides the tokens, so another text or setting has another folder. Text is streamed
and cut into shards of a few megabytes. Threads encode them and store the tokens in `.<name>-<key>.partial/`, where an
interrupted preparation finds them again. At the end, the shards are joined and the folder gets its name: it is complete
or absent. The tokens depend neither on the number of threads nor on interruptions.

A single text has no documents: its end is the validation split. If there are documents, end-of-text follows each (as in
GPT-2's data), and the number of a document decides its split.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np

from nanogpt_jax.config import DataConfig, UserError
from nanogpt_jax.data import corpora, hub, text_file, tokenizer
from nanogpt_jax.data.batches import Mixture
from nanogpt_jax.data.corpora import Block, Corpus, OnProgress, sha256_of_json
from nanogpt_jax.data.tokenizer import Tokenizer
from nanogpt_jax.host import files, terminal

FORMAT = 1  # version of the folder and of how corpora compose their texts; a new one prepares everything anew
MIB = 1 << 20
PIECE = 1 << 16  # characters of a document that are encoded at a time
SHARD = 1 << 22  # characters in a shard: the most that an interruption loses, and that a thread holds
LONGEST_CYCLE = 1 << 16  # sequences in which a mixture keeps its proportions


@dataclass(frozen=True)
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
        return _open(_prepared(cfg, corpora.read(cfg.source, cfg.dir, cfg.field), given))

    cycle = _cycle(cfg.mixture)
    sources = {name: corpora.read(name, cfg.dir, cfg.field) for name in cfg.mixture}
    if given is None and kind != "gpt2":
        given = _shared_tokenizer(cfg, list(sources.values()))
    cfgs = {name: replace(cfg, source=name, mixture={}) for name in sources}
    return _mixed(cfg, cycle, {name: _open(_prepared(cfgs[name], corpus, given)) for name, corpus in sources.items()})


def encode(corpus: Corpus, tok: Tokenizer) -> tuple[np.ndarray, int]:
    """The tokens [N] int32 of a whole corpus, as `open_data` would encode it, and its number of bytes in UTF-8."""
    if corpus.documents:
        pieces = _documents(corpus.blocks(text_file.silent), 0.0, [])
    else:
        pieces = _text(corpus.blocks(text_file.silent), 0)
    found, n_bytes = [np.array([], np.int32)], 0
    for piece in pieces:
        found += _tokens(piece, tok, np.dtype(np.int32))
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
    key = sha256_of_json([FORMAT, cfg.tokenizer, [[c.name, c.identity] for c in sources]])[:12]
    folder = Path(cfg.dir) / f"tokenizer-{key}"
    try:
        return tokenizer.load(folder)
    except UserError:  # absent or incomplete
        pass
    try:
        with _Progress("reading") as progress:
            made = _make_tokenizer(cfg.tokenizer, sources, progress)
        made.save(folder)
    except OSError as e:
        raise UserError(f"cannot write the tokenizer into data.dir={cfg.dir}: {e.strerror or e}") from None
    return made


def _make_tokenizer(kind: str, sources: list[Corpus], progress: "_Progress") -> Tokenizer:
    def texts() -> Iterator[str]:
        most = tokenizer.SAMPLE if kind.startswith("bpe") else sys.maxsize
        for corpus in sources:
            read = 0
            for text, _ in corpus.blocks(progress.update):
                yield text[: most - read]
                read += len(text)
                if read >= most:
                    break

    progress.begin("learning byte pairs" if kind.startswith("bpe") else "reading")
    documents = any(corpus.documents for corpus in sources)
    try:
        return tokenizer.make(kind, texts(), documents)
    except IndexError:  # no character at all
        raise _no_text(sources[0]) from None


# ---- one source -----------------------------------------------------------------------------------------------------


def _prepared(cfg: DataConfig, corpus: Corpus, given: Tokenizer | None) -> Path:
    """The folder with the tokens of `corpus`, prepared if absent. `given`: the tokenizer, if it exists already."""
    if given and corpus.documents and given.end_of_text is None:
        raise UserError(
            f"data.tokenizer={cfg.tokenizer} was made for a single text and has no end-of-text token, "
            f"which the documents of data.source={cfg.source} need\n"
            "       use another tokenizer, or give it a single text"
        )
    kind = given.fingerprint if given else cfg.tokenizer
    key = sha256_of_json([FORMAT, corpus.name, corpus.identity, kind, cfg.val_fraction])[:12]
    folder = Path(cfg.dir) / f"{corpus.name[:40]}-{key}"  # file systems limit names to 255 bytes
    if folder.exists():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with _alone(partial.with_suffix(".lock"), cfg.source) as lock:
            if not folder.exists():  # another process may have made it meanwhile
                with _cleaned_up(partial, lock):
                    _fill(cfg, corpus, given, partial)
                os.rename(partial / "whole", folder)
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write prepared tokens into data.dir={cfg.dir}: {e.strerror or e}") from None
    return folder


@contextlib.contextmanager
def _cleaned_up(partial: Path, lock: Path) -> Iterator[None]:
    """After an exception: keep finished shards, with a note; if there are none, remove everything. If the text itself
    is wrong, remove everything too, because the corrected text is another one."""
    try:
        yield
    except BaseException as e:
        n = len(list(partial.glob("*.shard")))
        if n == 0 or (isinstance(e, UserError) and not isinstance(e, hub.SourceFailed)):
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)
        else:
            kept = f"note: {n} finished shards are kept in {partial}; the same command goes on from there"
            print(kept, file=sys.stderr)
        raise


@contextlib.contextmanager
def _alone(path: Path, source: str) -> Iterator[Path]:
    """Holds the lock on `path`, so that no other process prepares the same."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"another process is preparing data.source={source}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield path
    finally:
        lock.release()


def _fill(cfg: DataConfig, corpus: Corpus, given: Tokenizer | None, partial: Path) -> None:
    """Make everything in `partial`/whole, reusing the shards that an earlier call left in `partial`."""
    whole = partial / "whole"
    whole.mkdir(parents=True, exist_ok=True)
    with _Progress(f"preparing {cfg.source}") as progress:
        tok = given or _tokenizer_of_before(whole) or _make_tokenizer(cfg.tokenizer, [corpus], progress)
        tok.save(whole / "tokenizer")
        facts, blank = {"name": corpus.name, **corpus.origin}, []
        if corpus.documents:
            pieces = _documents(corpus.blocks(progress.update), cfg.val_fraction, blank)
            what = ""
        else:
            progress.begin("reading")
            length, facts["sha256"] = _measure(corpus, progress.update)
            pieces = _text(corpus.blocks(progress.update), int(length * (1 - cfg.val_fraction)))
            what = f" ({length} characters)"
        dtype = np.dtype(np.uint16 if tok.n_vocab <= 1 << 16 else np.uint32).newbyteorder("<")
        progress.begin("tokens")
        shards = _make_shards(pieces, tok, dtype, partial, cfg.threads or os.cpu_count() or 1, progress)
    if corpus.documents:
        facts["documents"] = sum(s[split]["documents"] for s in shards for split in ("train", "val"))
        facts["sha256"] = sha256_of_json([s["text"] for s in shards])  # of the texts and of the ends of documents
        if facts["documents"] == 0:
            raise _no_text(corpus)
        if facts["documents"] == 1:
            raise UserError(
                f"data.source={cfg.source} holds 1 document, but training and validation need one each\n"
                "       give more documents; a single text belongs into a .txt file"
            )
        _say_blank(cfg.source, blank)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "source": facts,
        "val_fraction": cfg.val_fraction,
        "tokenizer": {"kind": tok.name, "fingerprint": tok.fingerprint},
        "n_vocab": tok.n_vocab,
        "dtype": dtype.name,
    }
    if tok.name == "bpe" and not given:
        manifest["tokenizer"]["learned_from"] = f"the first {tokenizer.SAMPLE:,} characters"
    for split in ("train", "val"):
        path = whole / f"{split}.bin"
        with path.open("wb") as out:
            for number, shard in enumerate(shards):
                out.write(_read_shard(partial, number)[1][_part(shard, split, dtype)])
        counts = {of: sum(s[split][of] for s in shards) for of in ("tokens", "bytes", "documents")}
        if not corpus.documents:
            del counts["documents"]
        if counts["tokens"] < 2:
            raise UserError(
                f"data.val_fraction={cfg.val_fraction} of data.source={cfg.source}{what} leaves "
                f"{'one token' if counts['tokens'] else 'no token'} for {split}, which needs at least 2; "
                "give a longer text or another fraction"
            )
        manifest[split] = {**counts, "fingerprint": fingerprint(path)}
    manifest["checksum"] = sha256_of_json(manifest)
    (whole / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _say_blank(source: str, blank: list[None]) -> None:
    if blank:
        rows = "row or file is" if len(blank) == 1 else "rows or files are"
        print(f"note: of data.source={source} {len(blank):,} {rows} left out, having no text", file=sys.stderr)


def _tokenizer_of_before(whole: Path) -> Tokenizer | None:
    try:
        return tokenizer.load(whole / "tokenizer")
    except UserError:
        return None


def _no_text(corpus: Corpus) -> UserError:
    return UserError(f"data.source={corpus.origin.get('source', corpus.name)} holds no text")


# ---- from blocks to pieces ------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    split: str  # "train" or "val"
    text: str  # at most a few PIECEs
    ends: bool  # end-of-text follows


def _measure(corpus: Corpus, on_progress: OnProgress) -> tuple[int, str]:
    """Number of characters, and sha256, of a corpus."""
    length, digest = 0, hashlib.sha256()
    for text, _ in corpus.blocks(on_progress):
        length += len(text)
        digest.update(text.encode())
    return length, digest.hexdigest()


def _text(blocks: Iterator[Block], cut: int) -> Iterator[Piece]:
    """A text without documents: the first `cut` characters to train on, the rest to validate."""
    rest = ""  # of the block with the cut

    def head() -> Iterator[str]:
        nonlocal rest
        left = cut
        while left and (block := next(blocks, None)):
            yield block[0][:left]
            rest = block[0][left:]
            left -= len(block[0]) - len(rest)

    def tail() -> Iterator[str]:
        yield rest
        for text, _ in blocks:
            yield text

    for text in tokenizer.pieces(head(), PIECE):
        yield Piece("train", text, False)
    for text in tokenizer.pieces(tail(), PIECE):
        yield Piece("val", text, False)


def _documents(blocks: Iterator[Block], val_fraction: float, blank: list[None]) -> Iterator[Piece]:
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


def _make_shards(
    pieces: Iterator[Piece], tok: Tokenizer, dtype: np.dtype, folder: Path, threads: int, progress: "_Progress"
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
                pending.append(pool.submit(_make_shard, folder, number, shard, tok, dtype))
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


def _make_shard(folder: Path, number: int, pieces: list[Piece], tok: Tokenizer, dtype: np.dtype) -> dict[str, Any]:
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
            before, ids = _read_shard(folder, number)
            if before["text"] == digest.hexdigest() and before["ids"] == hashlib.sha256(ids).hexdigest():
                return before
        except (ValueError, KeyError):
            pass
        print(f"note: {path}, left by an interrupted preparation, is damaged; it is made again", file=sys.stderr)
    streams: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for piece in pieces:
        streams[piece.split] += _tokens(piece, tok, dtype)
    for split, ids in streams.items():
        counts[split]["tokens"] = sum(map(len, ids))
    content = np.concatenate([np.array([], dtype), *streams["train"], *streams["val"]]).tobytes()
    header = {"text": digest.hexdigest(), "ids": hashlib.sha256(content).hexdigest(), **counts}
    with files.replacing(path) as beside:
        beside.write_bytes(json.dumps(header).encode() + b"\n" + content)
    return header


def _tokens(piece: Piece, tok: Tokenizer, dtype: np.dtype) -> list[np.ndarray]:
    ends = piece.ends and tok.end_of_text is not None
    return [tok.encode(piece.text).astype(dtype), *([np.array([tok.end_of_text], dtype)] if ends else [])]


def _read_shard(folder: Path, number: int) -> tuple[dict[str, Any], bytes]:
    header, _, content = (folder / f"{number:06d}.shard").read_bytes().partition(b"\n")
    return json.loads(header), content


def _part(shard: dict[str, Any], split: str, dtype: np.dtype) -> slice:
    cut = shard["train"]["tokens"] * dtype.itemsize
    return slice(cut) if split == "train" else slice(cut, None)


class _Progress:
    """Megabytes, MB/s and time left: a bar on a terminal, elsewhere a line now and then. Silent for the first second,
    in which most texts are done."""

    def __init__(self, title: str):
        self._title = title
        self._bar = None
        self.begin("reading")

    def begin(self, phase: str) -> None:
        self._phase, self._bytes, self._share = phase, 0, 0.0
        self._began = time.monotonic()
        self._next = self._began + (1 if sys.stderr.isatty() else 10)
        if self._bar:
            self._bar.reset(self._task, phase=phase, speed="")

    def update(self, share: float) -> None:
        self._share = share
        self._show()

    def add(self, n_bytes: int) -> None:
        self._bytes += n_bytes
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        seconds = now - self._began
        speed = f"{self._bytes / 1e6:,.0f} MB, {self._bytes / 1e6 / seconds:.1f} MB/s" if self._bytes else ""
        if sys.stderr.isatty():
            self._next = now + 0.1
            if not self._bar:
                self._start_bar()
            assert self._bar is not None
            self._bar.update(
                self._task, phase=self._phase, speed=speed, completed=self._share, total=1 if self._share else None
            )
        else:
            self._next = now + 10
            left = f", {seconds / self._share * (1 - self._share):.0f} s left" if self._share else ""
            print(f"{self._title}: {self._phase}, {self._share:.0%} {speed}{left}", file=sys.stderr, flush=True)

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}: {task.fields[phase]}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[speed]}  left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=terminal.console(), transient=True)
        self._task = self._bar.add_task(terminal.visible(self._title), total=None, phase=self._phase, speed="")
        self._bar.start()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


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
            if fingerprint(path) != wanted["fingerprint"]:
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


def fingerprint(path: Path) -> str:
    """sha256 of a file's size and content; for a large file, of 64 evenly spaced blocks of 1 MiB."""
    size = path.stat().st_size
    whole = size <= 64 * MIB
    starts = range(0, size, MIB) if whole else [i * (size - MIB) // 63 for i in range(64)]
    digest = hashlib.sha256(b"%d\n" % size)
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(MIB))
    return digest.hexdigest()
