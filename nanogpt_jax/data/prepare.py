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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from nanogpt_jax.config import DataConfig, UserError
from nanogpt_jax.data import hub, shards, tokenizer
from nanogpt_jax.data.corpus import Corpus, OnProgress, sha256_of_json
from nanogpt_jax.data.tokenizer import Tokenizer
from nanogpt_jax.host.progress import Progress

FORMAT = 1  # version of the folder and of how corpora compose their texts; a new one prepares everything anew
MIB = 1 << 20


def prepared(cfg: DataConfig, corpus: Corpus, given: Tokenizer | None) -> Path:
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
    with Progress(f"preparing {cfg.source}") as progress:
        tok = given or _tokenizer_of_before(whole) or make_tokenizer(cfg.tokenizer, [corpus], progress)
        tok.save(whole / "tokenizer")
        facts, blank = {"name": corpus.name, **corpus.origin}, []
        if corpus.documents:
            pieces = shards.of_documents(corpus.blocks(progress.update), cfg.val_fraction, blank)
            what = ""
        else:
            progress.begin("reading")
            length, facts["sha256"] = _measure(corpus, progress.update)
            cut = int(length * (1 - cfg.val_fraction))
            pieces = shards.of_text(corpus.blocks(progress.update), cut, between_words=tok.name == "word")
            what = f" ({length} characters)"
        dtype = np.dtype(np.uint16 if tok.n_vocab <= 1 << 16 else np.uint32).newbyteorder("<")
        progress.begin("tokens")
        made = shards.make(pieces, tok, dtype, partial, cfg.threads or os.cpu_count() or 1, progress)
    if corpus.documents:
        facts["documents"] = sum(s[split]["documents"] for s in made for split in ("train", "val"))
        facts["sha256"] = sha256_of_json([s["text"] for s in made])  # of the texts and of the ends of documents
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
            for number in range(len(made)):
                out.write(shards.ids(partial, number, split, dtype))
        counts = {of: sum(s[split][of] for s in made) for of in ("tokens", "bytes", "documents")}
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


def make_tokenizer(kind: str, sources: list[Corpus], progress: Progress) -> Tokenizer:
    """A tokenizer of `kind` ("char", "word", "bpe:8192") for all `sources`; UserError if they hold no text."""

    def texts() -> Iterator[str]:
        most = tokenizer.SAMPLE if kind.startswith("bpe") else sys.maxsize
        for corpus in sources:
            read = 0
            for text, ends in corpus.blocks(progress.update):
                yield text[: most - read]
                if ends and kind == "word":
                    yield "\n"  # or else the last word of a document would be one with the first of the next
                read += len(text)
                if read >= most:
                    break

    progress.begin("learning byte pairs" if kind.startswith("bpe") else "reading")
    documents = any(corpus.documents for corpus in sources)
    try:
        return tokenizer.make(kind, texts(), documents)
    except IndexError:  # no character at all
        raise _no_text(sources[0]) from None


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


def _measure(corpus: Corpus, on_progress: OnProgress) -> tuple[int, str]:
    """Number of characters, and sha256, of a corpus."""
    length, digest = 0, hashlib.sha256()
    for text, _ in corpus.blocks(on_progress):
        length += len(text)
        digest.update(text.encode())
    return length, digest.hexdigest()


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
