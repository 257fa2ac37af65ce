"""Any text in: every form of source, any number of threads, any interruption, the same tokens; and errors."""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_jax import cli, config
from nanogpt_jax.commands import prepare as command
from nanogpt_jax.config import DataConfig, UserError, parse
from nanogpt_jax.data import batches, corpora, dataset, hub, local, prepare, records, shards, text_file, tokenizer
from nanogpt_jax.data.corpus import Corpus
from nanogpt_jax.host.progress import Progress

ROOT = Path(__file__).parent.parent
TEXTS = [f"Document {i}: Töne, 静けさ\nand {i * i} words.\r\n" for i in range(60)]
PYTHON_TEXT = "\n".join(sorted(__import__("pydoc_data.topics", fromlist=["topics"]).topics.values()))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def bpe() -> tokenizer.Tokenizer:
    return tokenizer.make("bpe:600", [PYTHON_TEXT[:100_000], "Töne 静けさ " * 50])


def write_rows(path: str, texts: list, field: str = "text", **others: list) -> str:
    """The texts as rows of a .jsonl or a .parquet."""
    if path.endswith(".parquet"):
        pq.write_table(pa.table({field: texts, **others}), path, row_group_size=7)
    else:
        rows = [{field: text, **{k: v[i] for k, v in others.items()}} for i, text in enumerate(texts)]
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_folder(name: str, texts: list[str]) -> str:
    Path(name).mkdir()
    for i, text in enumerate(texts):
        Path(name, f"{i:04d}.txt").write_bytes(text.encode())
    return name


def documents(data: dataset.Dataset) -> dict[str, list[str]]:
    """The documents in each split, cut at end-of-text."""
    found = {}
    for split in ("train", "val"):
        ids = np.asarray(getattr(data, split))
        assert ids[-1] == data.tokenizer.end_of_text  # it follows each document
        parts = np.split(ids, np.flatnonzero(ids == data.tokenizer.end_of_text) + 1)[:-1]
        found[split] = [data.tokenizer.decode(part[:-1]) for part in parts]
    return found


def said(*argv: str, code: int = 0) -> tuple[str, str]:
    """Output and errors of `nanogpt-jax prepare`, called as the command line calls it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert cli.guarded(command.main, list(argv)) == code, err.getvalue()
    return out.getvalue(), err.getvalue()


# ---- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "word", "gpt2", "bpe:400"])
def test_documents_are_the_same_in_every_form_and_keep_their_ends(kind: str):
    write_rows("rows.jsonl", TEXTS)
    write_rows("rows.parquet", TEXTS, number=list(range(60)))
    write_folder("texts", TEXTS)
    Path("deep/er").mkdir(parents=True)
    write_rows("deep/1.parquet", TEXTS[:20])
    write_rows("deep/er/2.jsonl", TEXTS[20:])
    prints = set()
    for source in ("rows.jsonl", "rows.parquet", "texts", "texts/*.txt", "deep", "deep/**/[12].*"):
        data = dataset.open_data(DataConfig(source=source, tokenizer=kind, val_fraction=0.2))
        prints.add(data.fingerprint)
        found = documents(data)
        assert sorted(found["train"] + found["val"]) == sorted(TEXTS)
        assert all(sorted(part, key=TEXTS.index) == part for part in found.values())  # in their order
        assert (found["train"][0], found["val"][0]) == (TEXTS[0], TEXTS[1])
        for split, texts in found.items():
            assert data.manifest[split]["documents"] == len(texts)
            assert data.manifest[split]["bytes"] == sum(len(text.encode()) for text in texts)
    assert len(prints) == 1


def test_the_hub_by_the_code_path_that_streams_it_but_from_local_files(monkeypatch: pytest.MonkeyPatch):
    """`datasets`, streaming, offline: a folder of Parquet and one of JSON lines, with another field."""
    Path("parquet").mkdir()
    for i in range(3):
        write_rows(f"parquet/train-{i}.parquet", TEXTS[20 * i : 20 * i + 20], url=["x"] * 20)
    Path("json").mkdir()
    write_rows("json/train.jsonl", TEXTS, field="content")
    write_rows("rows.jsonl", TEXTS)
    expected = dataset.open_data(DataConfig(source="rows.jsonl", tokenizer="gpt2"))
    for source in ("hf:parquet", "hf:json::content"):
        data = dataset.open_data(DataConfig(source=source, tokenizer="gpt2"))
        assert data.fingerprint == expected.fingerprint
        assert data.manifest["source"]["source"] == source
        with monkeypatch.context() as m:
            m.setattr(hub, "_open_stream", None)  # a second opening asks nobody
            assert dataset.open_data(DataConfig(source=source, tokenizer="gpt2")).fingerprint == data.fingerprint
    with pytest.raises(UserError, match=r"row 1 has no field 'text', but 'content'\n.*--data\.field=NAME"):
        dataset.open_data(DataConfig(source="hf:json", tokenizer="gpt2"))


def test_standard_input_is_kept_as_a_text_named_by_its_content(monkeypatch: pytest.MonkeyPatch):
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Töne\n".encode() * 50)))
        data = dataset.open_data(DataConfig(source="-"))
    (kept,) = Path("data").glob("stdin-*.txt")
    assert kept.read_bytes() == "Töne\n".encode() * 50
    assert dataset.open_data(DataConfig(source=str(kept))).folder == data.folder


def test_a_pipe_is_read_once():
    os.mkfifo("pipe")
    with subprocess.Popen(["sh", "-c", "printf 'a pipe of text %.0s' 1 2 3 4 5 6 7 8 9 > pipe"]):
        data = dataset.open_data(DataConfig(source="pipe"))
    assert data.tokenizer.decode(data.train[:14]) == "a pipe of text"


def test_a_folder_with_one_plain_text_is_that_text():
    write_folder("one", ["to be or not to be " * 20])
    data = dataset.open_data(DataConfig(source="one"))
    assert data.tokenizer.end_of_text is None
    assert "documents" not in data.manifest["train"]


def test_more_to_validate_than_to_train_on_is_announced(capsys: pytest.CaptureFixture[str]):
    write_folder("even", ["to be or not to be " * 20, "to be or not"])
    dataset.open_data(DataConfig(source="even"))
    assert "validates than trains" not in capsys.readouterr().err
    write_folder("odd", ["to be or not", "to be or not to be " * 20])
    data = dataset.open_data(DataConfig(source="odd"))
    assert f"note: of {data.folder} more validates than trains" in capsys.readouterr().err


def test_empty_documents_are_passed_over():
    write_rows("rows.jsonl", ["", "one", None, "two", "", "three"])
    with open("rows.jsonl", "a") as file:
        file.write("\n")  # an empty line too
    data = dataset.open_data(DataConfig(source="rows.jsonl", tokenizer="gpt2"))
    assert sum(map(len, documents(data).values())) == data.manifest["source"]["documents"] == 3


def test_big_files_are_known_by_size_and_time_small_ones_by_content(monkeypatch: pytest.MonkeyPatch):
    write_rows("rows.jsonl", TEXTS)
    small = corpora.read("rows.jsonl").identity
    os.utime("rows.jsonl", (1, 1))
    assert corpora.read("rows.jsonl").identity == small
    monkeypatch.setattr(local, "SMALL", 10)
    monkeypatch.setattr(local, "_sha256_of", None)  # not read
    big = corpora.read("rows.jsonl").identity
    os.utime("rows.jsonl", (2, 2))
    assert len({small, big, corpora.read("rows.jsonl").identity}) == 3


WITH_GAPS = ["one\nÜber", "", "two", None, 'thr"ee', "four, five", ""]


@pytest.mark.parametrize("kind", ["char", "word", "gpt2"])
@pytest.mark.parametrize(
    "source", ["rows.jsonl", "ROWS.NDJSON", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "rows.csv.gz", "texts"]
)
def test_a_file_gives_the_same_tokens_by_every_way(monkeypatch: pytest.MonkeyPatch, source: str, kind: str):
    """What training has in both of its splits, what `eval --data` reads, and what the classifier reads."""
    path, texts = Path(source), [text for text in WITH_GAPS if text]
    objects = [json.dumps({"text": text}) for text in WITH_GAPS]
    page = io.StringIO(newline="")
    csv.writer(page, delimiter="\t" if source.endswith("tsv") else ",").writerows(
        [["text", "n"], *((t, 1) for t in WITH_GAPS)]
    )
    if source == "texts":
        write_folder(source, [f"\ufeff{text or ''}" for text in WITH_GAPS])
    elif source == "rows.parquet":
        write_rows(source, WITH_GAPS)
    elif source == "rows.json":
        path.write_text(f"\ufeff[{', '.join(objects)}]", encoding="utf-8")
    elif "csv" in source or "tsv" in source:
        content = f"\ufeff{page.getvalue()}".encode()
        path.write_bytes(gzip.compress(content) if source.endswith("gz") else content)
    else:
        path.write_text("".join(f"\ufeff{row}\r\n" for row in objects), encoding="utf-8")
    monkeypatch.setattr(shards, "_chance", lambda number: 1.0)  # all but the second document trains
    data = dataset.open_data(DataConfig(source=source, tokenizer=kind))
    found = documents(data)
    assert [found["train"][0], *found["val"], *found["train"][1:]] == texts
    tokens, n_bytes = dataset.encode(corpora.read(source), data.tokenizer)
    expected = [np.append(data.tokenizer.encode(text), data.tokenizer.end_of_text) for text in texts]
    assert tokens.tolist() == np.concatenate(expected).tolist()
    assert n_bytes == sum(data.manifest[split]["bytes"] for split in ("train", "val"))
    if source != "texts":
        rows = records.rows(path, source, ["text"])
        assert [row["text"] for _, row in rows if row["text"]] == texts


@pytest.mark.parametrize("kind", ["char", "word", "gpt2"])
def test_a_text_gives_the_same_tokens_by_every_way(kind: str):
    text = "El gato negro\n" * 90
    for name, content in {
        "plain.txt": text.encode(),
        "MARK.TXT": f"\ufeff{text}".encode(),
        "joined.text": "".join(f"\ufeff{line}\n" for line in text.splitlines()).encode(),
        "packed.txt.gz": gzip.compress(text.encode()),
    }.items():
        Path(name).write_bytes(content)
        data = dataset.open_data(DataConfig(source=name, tokenizer=kind))
        tokens, n_bytes = dataset.encode(corpora.read(name), data.tokenizer)
        assert [*data.train.tolist(), *data.val.tolist()] == data.tokenizer.encode(text).tolist() == tokens.tolist()
        assert n_bytes == len(text)


def test_a_marked_text_is_not_taken_from_tokens_that_have_the_mark():
    Path("text.txt").write_bytes(b"a text\n" * 9)
    plain = corpora.read("text.txt").identity
    assert plain == hashlib.sha256(b"a text\n" * 9).hexdigest()  # as it ever was: prepared tokens are found again
    Path("text.txt").write_bytes(b"\xef\xbb\xbf" + b"a text\n" * 9)
    assert corpora.read("text.txt").identity != hashlib.sha256(Path("text.txt").read_bytes()).hexdigest()


def test_rows_without_text_links_to_files_that_are_taken_and_pipes_are_what_they_are(
    capsys: pytest.CaptureFixture[str],
):
    Path("rows.jsonl").write_text(
        "".join(f'{{"text": {text}}}\n' for text in ['"uno"', "null", '""', '"dos"', '"tres"'])
    )
    tokens = dataset.open_data(DataConfig(source="rows.jsonl")).manifest
    assert tokens["source"]["documents"] == 3
    assert "2 rows or files are left out, having no text" in capsys.readouterr().err
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("uno dos tres")
    Path("texts/b.txt").write_text("cuatro cinco")
    Path("texts/loop").symlink_to(".")
    assert dataset.open_data(DataConfig(source="texts/**/*.txt")).manifest["source"]["documents"] == 2
    assert "links to files that it already has" in capsys.readouterr().err
    os.mkfifo("pipe.jsonl")
    with subprocess.Popen(["sh", "-c", "cat rows.jsonl > pipe.jsonl"]):
        assert (
            dataset.open_data(DataConfig(source="pipe.jsonl")).manifest["train"]["tokens"] == tokens["train"]["tokens"]
        )
    with pytest.raises(UserError, match="neither a file nor a folder"):
        dataset.open_data(DataConfig(source="~nosuchuser/x.txt"))


@pytest.mark.parametrize(
    ("name", "content", "suffix"),
    [
        ("a.txt", '{"text": "x", "n": 1}\n' * 3, "jsonl"),
        ("-", '{"n": 1}\n{"text": null}\n{"text": "x"}\n', "jsonl"),
        ("b.txt", "label,text\na,x\nb,y\n", "csv"),
        ("c.text", 'text\t"label"\r\nx\ta\r\ny\tb\r\n', "tsv"),
        ("d.txt", "A text, and more text\nthan a, b\nor, c\n", ""),
        ("e.txt", '{"text": "x"}\n' * 2, ""),
        ("f.txt", '{"text": "x"}\n{"text": "x"}\n{"text": "x"\n', ""),
        ("g.txt", "the text,\nline by line,\nof a poem,\n", ""),
    ],
)
def test_rows_in_a_text_are_told(monkeypatch, capsys, name: str, content: str, suffix: str):
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    else:
        Path(name).write_bytes(content.encode())
    corpora.read(name)
    said = f"note: {name} looks like rows with a field 'text', and is read as one text"
    assert capsys.readouterr().err == (f"{said}\n      to read its rows, name it .{suffix}\n" if suffix else "")


def test_a_folder_says_what_it_leaves_out(capsys: pytest.CaptureFixture[str]):
    for name in ("a.TXT", "b.text", "c.Md", "d.JSONL", "e.pdf", "f.PDF", "g.csv", "h", ".i.txt", ".git/j", "k.txt.gz"):
        spoil(f"f/{name}", b'{"text": "x"}\n')
    Path("f/l.txt").symlink_to("gone")
    Path("f/m").symlink_to("..")
    corpus = corpora.read("f")
    note = "note: data.source=f leaves out 2 .pdf, 2 hidden, 1 "
    err = capsys.readouterr().err
    assert err.startswith(note)
    assert all(f"1 {what}" in err for what in (".csv", "without a suffix", ".gz", "linked folders", "broken links"))
    assert corpus.origin["files"] == 4
    Path("g").mkdir()
    spoil("g/a.txt", b"x")
    corpora.read("g")
    assert capsys.readouterr().err == ""


# ---- bitwise the same, whatever the threads, the shards and the interruptions ---------------------------------------


def naive(texts: list[str], tok: tokenizer.Tokenizer, val_fraction: float) -> dict[str, list[int]]:
    """What the tokens should be, by the definition."""
    ids: dict[str, list[int]] = {"train": [], "val": []}
    texts = [text for text in texts if text]
    for i, text in enumerate(texts):
        split = "val" if i == 1 or (i > 1 and shards._chance(i) < val_fraction) else "train"
        assert tok.end_of_text is not None
        ids[split] += [*tok.encode(text).tolist(), tok.end_of_text]
    return ids


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("ab 1'.\n静é"), max_size=60), min_size=2, max_size=12),
    st.integers(1, 200),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_tokens_are_those_of_the_documents_one_by_one(bpe, texts, shard, piece, block, threads, chars):
    if sum(map(bool, texts)) < 2:
        return

    def blocks(on_progress):  # documents come in any number of blocks
        for text in texts:
            yield from ((text[i : i + block], False) for i in range(0, len(text), block))
            yield "", True

    import tempfile

    with pytest.MonkeyPatch.context() as m, tempfile.TemporaryDirectory() as folder:
        m.setattr(shards, "SHARD", shard)
        m.setattr(shards, "PIECE", piece)
        m.setitem(corpora.CORPORA, "own", lambda _: Corpus("own", "1", {}, True, blocks))
        bpe.save(Path(folder, "bpe"))
        kind = "char" if chars else f"{folder}/bpe"
        cfg = DataConfig(source="own", tokenizer=kind, dir=f"{folder}/data", threads=threads, val_fraction=0.3)
        data = dataset.open_data(cfg)
        expected = naive(texts, data.tokenizer, 0.3)
        assert {split: getattr(data, split).tolist() for split in expected} == expected


@pytest.mark.long
def test_a_single_text_is_split_at_its_character_however_it_is_read(monkeypatch: pytest.MonkeyPatch):
    text = "".join(f"Zeile {i}: Töne 静けさ\n" for i in range(500))
    Path("text.txt").write_text(text, encoding="utf-8")
    for i, (block, shard, piece) in enumerate([(1 << 20, 1 << 22, 1 << 18), (7, 300, 50), (1000, 1, 1)]):
        for name, value in (("SHARD", shard), ("PIECE", piece)):
            monkeypatch.setattr(shards, name, value)
        monkeypatch.setattr(text_file, "BLOCK", block)
        cfg = DataConfig(source="text.txt", tokenizer="gpt2", dir=f"data{i}", threads=1 + i)
        data = dataset.open_data(cfg)
        cut = int(len(text) * 0.9)
        assert data.train.tolist() == data.tokenizer.encode(text[:cut]).tolist()
        assert data.val.tolist() == data.tokenizer.encode(text[cut:]).tolist()
        assert data.manifest["val"]["bytes"] == len(text[cut:].encode())


def test_a_text_without_any_place_to_cut_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, "LONGEST", 10)
    for blocks in (["x" * 35], ["x" * 7] * 5, ["x"] * 35):
        assert [len(piece) for piece in tokenizer.pieces(blocks, 3)] == [10, 10, 10, 5]
    assert list(tokenizer.pieces(["ab cd", "ef", "gh ijklm"], 3)) == ["ab cdefgh", " ijklm"]


def test_reading_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """However long the source, only what the threads work on and one shard more has been read."""
    read, done, ahead = 0, 0, 0
    original = tokenizer.GPT2Tokenizer.encode

    def blocks(on_progress):
        nonlocal read, ahead
        for _ in range(300):
            read += 1
            ahead = max(ahead, read - done)
            yield "a document of some words\n", True

    def encode(self, text):
        nonlocal done
        ids = original(self, text)
        time.sleep(0.0005)
        done += 1
        return ids

    monkeypatch.setattr(shards, "SHARD", 500)  # 6 documents
    monkeypatch.setattr(tokenizer.GPT2Tokenizer, "encode", encode)
    monkeypatch.setitem(corpora.CORPORA, "own", lambda _: Corpus("own", "1", {}, True, blocks))
    dataset.open_data(DataConfig(source="own", tokenizer="gpt2", threads=2))
    assert done == 300
    assert ahead <= 6 * (2 + 2)


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background, children ignore it
from nanogpt_jax import cli
from nanogpt_jax.data import shards, tokenizer
from nanogpt_jax.commands import prepare as command
shards.SHARD, shards.PIECE, calls, original = 2000, 1000, [], tokenizer.GPT2Tokenizer.encode
def encode(self, text):
    calls.append(0)
    if {stop} and len(calls) > {stop}:
        print("here", flush=True)
        time.sleep(1)
    return original(self, text)
tokenizer.GPT2Tokenizer.encode = encode
code = cli.guarded(command.main, {argv!r})
print(len(calls))
sys.exit(code)
"""


def child(stop: int, *argv: str) -> subprocess.Popen:
    code = CHILD.format(stop=stop, argv=list(argv))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_preparation_goes_on_at_its_last_shard(number: signal.Signals):
    Path("text.txt").write_text(PYTHON_TEXT[:60_000], encoding="utf-8")
    flags = ["text.txt", "--tokenizer", "gpt2", "--threads", "1"]
    whole = dataset.open_data(DataConfig(source="text.txt", tokenizer="gpt2", dir="whole"))
    process = child(0, *flags, "--dir", "uninterrupted")
    calls = int(process.communicate()[0].splitlines()[-1])
    process = child(calls // 2, *flags)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, err = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in err
        assert "finished shards are kept in data/.text-" in err
        assert "the same command goes on from there" in err
    assert [path.name for path in Path("data").glob("text-*")] == []  # nothing half-made is taken for whole
    process = child(0, *flags)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert 0 < int(out.splitlines()[-1]) <= calls - calls // 2 + 2  # the finished shards were not made again
    (folder,) = Path("data").iterdir()  # and no leftover
    for name in ("train.bin", "val.bin", "manifest.json"):
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:40], lambda b: b[:-1] + b"\7", lambda b: b""])
def test_a_damaged_shard_is_made_again(monkeypatch: pytest.MonkeyPatch, capsys, damage):
    write_rows("rows.jsonl", TEXTS)
    cfg = DataConfig(source="rows.jsonl", tokenizer="gpt2", threads=1)
    whole = dataset.open_data(dataclasses.replace(cfg, dir="whole"))
    with monkeypatch.context() as m:
        m.setattr(prepare, "fingerprint", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dataset.open_data(cfg)
    (shard,) = Path("data").glob(".rows-*/*.shard")
    shard.write_bytes(damage(shard.read_bytes()))
    assert dataset.open_data(cfg).fingerprint == whole.fingerprint
    assert f"note: {shard}, left by an interrupted preparation, is damaged; it is made again" in capsys.readouterr().err


def test_progress_tells_speed_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys):
    times = itertools.count(step=4.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    progress = Progress("preparing x")
    progress.begin("tokens")
    for share in (0.2, 0.4):
        progress.add(8_000_000)
        progress.update(share)
    lines = ["20%  16 MB, 1.3 MB/s  left 48 s", "40%  16 MB, 1.0 MB/s  left 24 s"]
    assert capsys.readouterr().err.splitlines() == [f"preparing x: tokens {line}" for line in lines]


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_bpe_has_as_many_tokens_as_were_asked_for_and_is_the_same_each_time(bpe: tokenizer.Tokenizer):
    assert (bpe.n_vocab, bpe.end_of_text, bpe.name) == (600, 599, "bpe")
    assert bpe.decode([599]) == "<|endoftext|>"
    again = tokenizer.make("bpe:600", iter([PYTHON_TEXT[:100_000], "Töne 静けさ " * 50]))
    assert again.fingerprint == bpe.fingerprint
    text = PYTHON_TEXT[100_000:110_000]
    assert len(bpe.encode(text)) < 0.55 * len(text.encode())  # it has learned something
    assert tokenizer.make("bpe:258", "abababab abab").encode("abab").tolist() == [256, 256]  # the commonest pair


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_bpe_round_trip(bpe: tokenizer.Tokenizer, text: str):
    ids = bpe.encode(text)
    assert ids.dtype == np.int32
    assert (bpe.decode(ids), bpe.decode_bytes(ids)) == (text, text.encode())


def test_tiktoken_itself_encodes_with_a_learned_vocabulary(bpe: tokenizer.Tokenizer):
    import tiktoken
    import tiktoken.load

    bpe.save(Path("t"))
    ranks = tiktoken.load.load_tiktoken_bpe("t/ranks.tiktoken")
    encoding = tiktoken.Encoding("own", pat_str=tokenizer.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert encoding.encode_ordinary(PYTHON_TEXT[:5000]) == bpe.encode(PYTHON_TEXT[:5000]).tolist()
    again = tokenizer.load(Path("t"))
    assert (again.name, again.n_vocab, again.fingerprint) == ("bpe", 600, bpe.fingerprint)


@given(st.lists(st.text("añ静\n", min_size=1), min_size=1))
def test_a_char_tokenizer_with_end_of_text(texts: list[str]):
    tok = tokenizer.make("char", texts, end_of_text=True)
    again = type(tok)(tok.stored)
    n = len(set("".join(texts)))
    assert (again.n_vocab, again.end_of_text) == (n + 1, n)
    ids = np.concatenate([np.append(again.encode(text), again.end_of_text) for text in texts])
    assert again.decode(ids) == "".join(text + "<|endoftext|>" for text in texts)
    assert again.encode(texts[0]).max() < n
    assert tok.fingerprint != tokenizer.make("char", texts).fingerprint


def test_a_tokenizer_from_a_folder():
    write_rows("a.jsonl", TEXTS)
    write_rows("b.jsonl", [text + "ab" for text in TEXTS])
    first = dataset.open_data(DataConfig(source="a.jsonl", tokenizer="bpe:300"))
    first.tokenizer.save(Path("runs/x/tokenizer"))  # as in a run directory
    by = [
        dataset.open_data(DataConfig(source="b.jsonl", tokenizer=place)) for place in (str(first.folder), "runs/x", "runs/x/tokenizer")
    ]  # fmt: skip
    assert len({data.folder for data in by}) == 1  # what it is decides, not where it lies
    assert by[0].tokenizer.fingerprint == first.tokenizer.fingerprint
    assert documents(by[0])["train"][0] == TEXTS[0] + "ab"


def test_byte_pairs_are_learned_from_a_bounded_sample(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, "SAMPLE", 600)
    write_rows("a.jsonl", ["the cat sat. " * 10] * 5 + ["xyzxyz " * 50] * 5)
    data = dataset.open_data(DataConfig(source="a.jsonl", tokenizer="bpe:262"))
    assert data.manifest["tokenizer"]["learned_from"] == "the first 600 characters"
    tokens = [data.tokenizer.decode([i]) for i in range(256, 261)]
    assert not any("x" in token for token in tokens), tokens


# ---- mixtures -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 2**40))
def test_sources_take_their_turns_in_exact_proportion(weights: list[int], turn: int):
    cycle = tuple(weights)
    n = sum(cycle)
    which, number = batches.assign(cycle, np.arange(turn * n, (turn + 2) * n, dtype=np.uint64))
    for i, m in enumerate(cycle):
        assert np.flatnonzero(which[:n] == i).size == m  # exact in every cycle
        assert number[which == i].tolist() == list(range(turn * m, (turn + 2) * m))  # none left out, none twice
        begun = np.cumsum(which[:n] == i)
        assert (abs(begun - np.arange(1, n + 1) * m / n) < len(cycle)).all()  # and spread over it


def numbered(*lengths: int) -> batches.Mixture:
    """Sources whose tokens show their place: source i has the tokens from 10,000 i on."""
    parts = tuple(np.arange(10_000 * i, 10_000 * i + n, dtype=np.uint32) for i, n in enumerate(lengths))
    return batches.Mixture(tuple("abc"[: len(parts)]), parts, (3, 1, 2)[: len(parts)])


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 8))
def test_each_source_of_a_mixture_shows_each_window_once_an_epoch(seed: int, block: int, batch_size: int):
    mixture = numbered(block + 70, block + 41, 2 * block + 1)
    steps = np.arange(1000 // batch_size)
    stream = batches.batch(mixture, seed=seed, step=steps, batch_size=batch_size, block_size=block).reshape(
        -1, block + 1
    )
    assert (np.diff(stream, axis=1) == 1).all()  # windows lie in one source
    source = stream[:, 0] // 10_000
    assert np.bincount(source[:600], minlength=3).tolist() == [300, 100, 200]
    for i, part in enumerate(mixture.parts):
        n = batches.n_windows(part, block)
        starts = stream[source == i, 0]
        for epoch in range(min(3, len(starts) // n)):
            assert (np.diff(np.sort(starts[epoch * n : (epoch + 1) * n])) == block).all()


@given(st.integers(0, 10**9), st.integers(1, 12), st.integers(0, 12))
def test_a_batch_of_a_mixture_is_the_same_on_any_number_of_processes(step: int, batch_size: int, cut: int):
    mixture, same = numbered(500, 300), {"seed": 5, "batch_size": batch_size, "block_size": 7}
    whole = batches.batch(mixture, step=step, **same)
    parts = [batches.batch(mixture, step=step, rows=rows, **same) for rows in (slice(0, cut), slice(cut, None))]
    assert np.array_equal(np.concatenate(parts), whole)
    many = batches.batch(mixture, step=np.arange(step, step + 3), **same)
    assert np.array_equal(many[0], whole)


def test_sources_of_one_length_take_different_orders():
    mixture = batches.Mixture(("a", "b"), (np.arange(1000), np.arange(1000)), (1, 1))
    rows = batches.batch(mixture, seed=1, step=0, batch_size=40, block_size=10)
    assert (rows[::2] != rows[1::2]).any()


def test_a_mixture_has_one_tokenizer_and_finds_what_prepare_has_made(monkeypatch: pytest.MonkeyPatch):
    write_rows("a.jsonl", TEXTS)
    write_folder("books", ["xyz " * 40, "zyx " * 30, "§§ " * 20])
    for kind in ("char", "bpe:300", "gpt2"):
        cfg = DataConfig(mixture={"a.jsonl": 1.5, "books/*.txt": 0.5}, tokenizer=kind)
        said("--mixture", "a.jsonl=1.5,books/*.txt=0.5", "--tokenizer", kind)
        with monkeypatch.context() as m:
            m.setattr(tokenizer, "make", None)  # nothing is learned or prepared again
            m.setattr(prepare, "_fill", None)
            data = dataset.open_data(cfg)
        assert isinstance(data.train, batches.Mixture)
        assert (data.train.names, data.train.cycle) == (("a.jsonl", "books/*.txt"), (3, 1))
        assert data.tokenizer.decode(data.train.parts[1]).startswith("xyz xyz")
        assert len(data.train) == data.manifest["train"]["tokens"] == sum(map(len, data.train.parts))
        assert len(data.val) == data.manifest["val"]["tokens"]
        assert data.tokenizer.decode(data.val).endswith("zyx <|endoftext|>")
        weights = dataset.open_data(dataclasses.replace(cfg, mixture={"a.jsonl": 1, "books/*.txt": 1}))
        assert weights.fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("weights", "cycle"),
    [((3, 1), (3, 1)), ((0.7, 0.3), (7, 3)), ((2, 4, 6), (1, 2, 3)), ((0.1, 0.2, 0.25), (2, 4, 5)), ((5,), (1,))],
)
def test_weights_are_read_as_they_were_written(weights, cycle):
    assert dataset._cycle({str(i): w for i, w in enumerate(map(float, weights))}) == cycle


def test_a_mixture_in_toml_on_the_command_line_and_in_json_are_one(here: Path):
    Path("mixed.toml").write_text('[data]\nmixture = { "books/*.txt" = 3, "code.jsonl" = 1 }\n')
    by_file = config.load(["mixed.toml"]).cfg
    assert by_file.data.mixture == {"books/*.txt": 3.0, "code.jsonl": 1.0}
    assert by_file == config.load(["--data.mixture", "books/*.txt=3,code.jsonl=1"]).cfg
    assert by_file == config.load(['--data.mixture={"books/*.txt": 3, "code.jsonl": 1}']).cfg
    Path("again.toml").write_text(parse.render(by_file, {}))
    assert config.load(["again.toml"]).cfg == by_file
    Path("config.json").write_text(config.to_json(by_file))
    assert config.read_json(Path("config.json")) == by_file


# ---- the command ----------------------------------------------------------------------------------------------------


def test_prepare_says_what_it_made_and_training_finds_it(monkeypatch: pytest.MonkeyPatch):
    write_rows("rows.jsonl", TEXTS, field="story")
    out, _ = said("rows.jsonl", "--tokenizer", "bpe:300", "--field=story", "--val-fraction", "0.2", "--threads", "2")
    assert "vocabulary 300" in out
    line = next(line for line in out.splitlines() if line.startswith("next: "))
    argv = line.split()[line.split().index("train") + 1 :] if " train " in line else line.split()[3:]
    monkeypatch.setattr(prepare, "_fill", None)
    data = dataset.open_data(config.load(argv).cfg.data)
    assert str(data.folder) in out


def test_the_configs_for_the_hub_are_known_by_name():
    for name, source in (
        ("gpt2-openwebtext", "Skylion007/openwebtext"),
        ("gpt2-fineweb-edu", "HuggingFaceFW/fineweb-edu"),
    ):
        cfg = command.read(["--config", name]).cfg.data
        assert cfg.source.startswith(f"hf:{source}")
        assert cfg.tokenizer == "gpt2"
        assert corpora.read(cfg.source, field=cfg.field).documents


@pytest.mark.long
def test_train_and_sample_on_a_mixture_of_documents(capsys):
    """Prepared on first use, trained, sampled from its start, with a vocabulary that has no newline."""
    letters = "".join(c for c in PYTHON_TEXT if c.isalpha() or c == " ")
    write_rows("a.jsonl", [letters[i * 1000 : i * 1000 + 1000] for i in range(30)] + ["short"])
    write_rows("b.jsonl", ["El gato persigue al ratón. " * 200, "corto"])  # its validation opens the sample
    small = "--model.block-size 16 --model.n-layer 1 --model.n-head 2 --model.n-embd 16 --train.batch-size 4".split()
    mixture = ["--data.mixture", "b.jsonl=1,a.jsonl=2", "--train.steps", "8"]
    assert cli.guarded(cli.door("train").main, [*mixture, *small]) == 0
    out = capsys.readouterr().out
    assert "b.jsonl + a.jsonl: " in out
    assert "a sample:\n\ncorto" in out
    assert cli.guarded(cli.door("sample").main, ["--max-new-tokens", "9"]) == 0
    assert len(capsys.readouterr().out) <= 9 + 1  # end-of-text may come earlier


# ---- wrong inputs ---------------------------------------------------------------------------------------------------


def spoil(name: str, content: bytes) -> None:
    Path(name).parent.mkdir(exist_ok=True, parents=True)
    Path(name).write_bytes(content)


def write_hf_tokenizer(folder: str) -> None:
    spoil(f"{folder}/tokenizer.json", json.dumps({"version": "1.0", "added_tokens": [], "model": {}}).encode())


def truncated(path: str) -> None:
    write_rows(path, TEXTS)
    spoil(path, Path(path).read_bytes()[:-20])


# (what is wrong, how it comes about, command line, words of the message)
WRONG = [
    ("truncated Parquet", lambda: truncated("a.parquet"), "a.parquet", ["a.parquet cannot be read as Parquet", "is it whole?"]),
    ("Parquet that is none", lambda: spoil("a.parquet", b"hello"), "a.parquet", ["a.parquet cannot be read as Parquet"]),
    ("no such column", lambda: write_rows("a.parquet", TEXTS, "content"), "a.parquet", ["a.parquet, row 1 has no field 'text', but 'content'", "--data.field=NAME"]),
    ("a misspelt column", lambda: write_rows("a.parquet", TEXTS, "texts"), "a.parquet", ["did you mean texts?"]),
    ("a column of numbers", lambda: write_rows("a.parquet", [1, 2, 3]), "a.parquet", ["a.parquet, row 1: the field 'text' is not text but int"]),
    ("a field that is missing", lambda: spoil("a.jsonl", b'{"text": "x"}\n{"title": "y"}\n'), "a.jsonl", ["a.jsonl, line 2 has no field 'text', but 'title'"]),
    ("a field of another type", lambda: spoil("a.jsonl", b'{"text": ["x"]}\n'), "a.jsonl", ["line 1: the field 'text' is not text but list"]),
    ("a broken line", lambda: spoil("a.jsonl", b'{"text": "x"}\n\n{"text": "y"\n'), "a.jsonl", ["a.jsonl, line 3 is not JSON", "fix or delete this one"]),
    ("a column that a table lacks", lambda: spoil("a.csv", b"id,body\n1,x\n"), "a.csv", ["a.csv, line 2 has no field 'text', but 'id', 'body'", "--data.field=NAME"]),
    ("semicolons", lambda: spoil("a.csv", b"id;text\n1;x\n"), "a.csv", ["a.csv, line 2 has no field 'text', but 'id;text'", "not by semicolons"]),
    ("a list of texts", lambda: spoil("a.json", b'["x"]'), "a.json", ["a.json, line 1 is not a JSON object", "jq -c '.[] | {\"text\": .}' a.json > a.jsonl"]),
    ("UTF-16", lambda: spoil("a b.jsonl", '{"text": "x"}\n'.encode("utf-16")), "*.jsonl", ["a b.jsonl is UTF-16", "iconv -f UTF-16 -t UTF-8 'a b.jsonl' > 'a b-utf8.jsonl'"]),
    ("Parquet by another name", lambda: (write_rows("b.parquet", TEXTS), os.rename("b.parquet", "b.txt")), "b.txt", ["b.txt is not text but Parquet", "mv b.txt b.parquet"]),
    ("a line that is no object", lambda: spoil("a.jsonl", b'"x"\n'), "a.jsonl", ['line 1 is not a JSON object, like {"text": "..."}']),
    ("JSON that is not UTF-8", lambda: spoil("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n'), "a.jsonl", ["a.jsonl, line 2 is not UTF-8 text: byte 0xff at offset 24"]),
    ("half a character", lambda: spoil("a.jsonl", b'{"text": "\\ud800"}\n'), "a.jsonl", ["a.jsonl, line 1 holds '\\ud800', which is half a character"]),
    ("a file in a folder that is not UTF-8", lambda: (write_folder("f", ["a", "b"]), spoil("f/x.txt", b"ab\xffc")), "f", ["f/x.txt is not UTF-8 text: byte 0xff at offset 2", "iconv"]),
    ("an empty folder", lambda: Path("f").mkdir(), "f", ["data.source=f is a folder that holds no .txt, .text, .md, .jsonl, .ndjson, .parquet file", "'f/**/*.py'"]),
    ("a folder of empty files", lambda: write_folder("f", ["", ""]), "f", ["data.source=f is empty"]),
    ("a pattern without matches", lambda: None, "books/*.txt", ["data.source=books/*.txt matches no file"]),
    ("an empty file", lambda: spoil("a.jsonl", b""), "a.jsonl", ["data.source=a.jsonl is empty"]),
    ("documents without text", lambda: write_rows("a.jsonl", ["", ""]), "a.jsonl", ["data.source=a.jsonl holds no text"]),
    ("documents without characters", lambda: write_rows("a.jsonl", ["", ""]), "a.jsonl --tokenizer gpt2", ["data.source=a.jsonl holds no text"]),
    ("one document", lambda: write_rows("a.jsonl", ["x"]), "a.jsonl", ["data.source=a.jsonl holds 1 document", "belongs into a .txt file"]),
    ("an unknown tokenizer", lambda: None, "python-docs --tokenizer gtp2", ["data.tokenizer=gtp2 is none of char, word, gpt2, bpe:8192 or a folder", "did you mean gpt2?"]),
    ("no number", lambda: None, "python-docs --tokenizer bpe", ["data.tokenizer=bpe must name its number of tokens, like bpe:8192"]),
    ("nothing after bpe", lambda: None, "python-docs --tokenizer bpe:0", ["must lie in bpe:257 to bpe:1048576"]),
    ("no number after bpe", lambda: None, "python-docs --tokenizer bpe:abc", ["data.tokenizer=bpe:abc must name its number of tokens"]),
    ("more tokens than pairs", lambda: spoil("a.txt", b"abcd abcd " * 9), "a.txt --tokenizer bpe:1000", ["data.tokenizer=bpe:1000 is more than this text has pairs for: at most bpe:2"]),
    ("a folder without a tokenizer", lambda: Path("f").mkdir(), "python-docs --tokenizer f", ["data.tokenizer=f holds no tokenizer"]),
    ("a tokenizer of another program", lambda: spoil("f/tokenizer.json", b'{"model": {}}'), "python-docs --tokenizer f", ["f/tokenizer.json is damaged"]),
    ("a tokenizer that lacks end-of-text", lambda: (tokenizer.make("char", "ab").save(Path("f")), write_folder("g", ["a", "b"])), "g --tokenizer f", ["has no end-of-text token"]),
    ("a tokenizer that lacks a character", lambda: (tokenizer.make("char", "ab").save(Path("f")), spoil("a.txt", b"abcab" * 9)), "a.txt --tokenizer f", ["character 'c' at position 2 is not among the 2"]),
    ("a data set without a network", lambda: None, "hf:nobody/nothing", ["data.source=hf:nobody/nothing cannot be"]),
    ("a data set without a name", lambda: None, "hf:", ["must read hf:NAME[:CONFIG][:FIELD]"]),
    ("a data set without train", lambda: (Path("d").mkdir(), write_rows("d/test.jsonl", TEXTS)), "hf:d", ["data.source=hf:d cannot be opened", "train"]),
    ("a data directory that is a file", lambda: spoil("a.txt", b"text " * 99), "a.txt --dir a.txt", ["cannot write prepared tokens into data.dir=a.txt"]),
    ("standard input without text", lambda: None, "-", ["data.source=- gave no text"]),
    ("an unknown flag", lambda: None, "python-docs --tokeniser gpt2", ["unknown flag --tokeniser", "did you mean --tokenizer?"]),
    ("a tokenizer of Hugging Face's", lambda: write_hf_tokenizer("hf"), "python-docs --tokenizer hf", ["hf/tokenizer.json is a tokenizer of Hugging Face's", "import-hf hf RUN"]),
    ("two sources", lambda: None, "a.txt b.txt", ["one source at a time, but got a.txt and b.txt", "--mixture A=3,B=1"]),
    ("source and mixture", lambda: None, "a.txt --mixture a=1,b=1", ["data.source=a.txt and data.mixture exclude each other"]),
    ("a mixture without weights", lambda: None, "--mixture a,b", ["data.mixture='a,b' must be sources and their weights: A=3,B=1"]),
    ("a weight of nothing", lambda: None, "--mixture a=1,b=0", ["data.mixture: the weight of b is 0.0, and must be above 0"]),
    ("a mixture that is no JSON", lambda: None, "--mixture {a:1}", ["must be sources and their weights"]),
    ("a source twice", lambda: None, "--mixture a=1,a=2", ["data.mixture=a=1,a=2 names a source twice"]),
    ("weights that are too exact", lambda: None, "--mixture a=0.1234567,b=1", ["its weights are exact only in 11,234,567 sequences", "round them"]),
    ("no threads", lambda: None, "python-docs --threads=-1", ["data.threads=-1 must not be negative"]),
    ("a file as a folder", lambda: spoil("a.txt", b"x"), "a.txt/b.txt", ["cannot read data.source=a.txt/b.txt: Not a directory"]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "argv", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_inputs(monkeypatch: pytest.MonkeyPatch, make, argv: str, words: list[str]):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    make()
    _, err = said(*argv.split(), code=2)
    assert err.startswith("error: ")
    for word in words:
        assert word in err, err
    left = [path.name for path in Path("data").iterdir()] if Path("data").is_dir() else []
    assert left == [], "nothing of it stays"


def test_no_network_is_told_quickly(clean_env):
    env = {k: v for k, v in clean_env.items() if k != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    began = time.monotonic()
    words = [sys.executable, "-m", "nanogpt_jax", "prepare", "hf:nobody/nothing"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    words = ["error: data.source=hf:nobody/nothing cannot be reached", "connect to the network"]
    refusal(done.returncode, done.stdout, done.stderr, *words)
    assert time.monotonic() - began < 15


def test_a_source_that_breaks_off_keeps_what_was_made_of_it(monkeypatch: pytest.MonkeyPatch):
    broken = True

    class Stream:
        def __iter__(self):
            for i, text in enumerate(TEXTS):
                if broken and i == 40:
                    raise ConnectionError("reset by peer")
                yield {"text": text}

    monkeypatch.setattr(hub, "_open_stream", lambda *_: (Stream(), 60))
    monkeypatch.setattr(shards, "SHARD", 500)
    _, err = said("hf:a/b", "--tokenizer", "gpt2", "--threads", "1", code=2)
    assert "data.source=hf:a/b broke off: ConnectionError: reset by peer" in err
    assert "finished shards are kept in data/.b-" in err
    broken = False
    said("hf:a/b", "--tokenizer", "gpt2")
    write_rows("rows.jsonl", TEXTS)
    prints = [dataset.open_data(DataConfig(source=s, tokenizer="gpt2")).fingerprint for s in ("hf:a/b", "rows.jsonl")]
    assert prints[0] == prints[1]


def test_a_full_disk_is_told_and_keeps_finished_shards(clean_env):
    """A limit on the size of files stands in for a full disk: joining the shards fails, not the shards."""
    Path("text.txt").write_text(PYTHON_TEXT[:60_000], encoding="utf-8")
    limited = """
import resource, signal, sys
from nanogpt_jax import cli
from nanogpt_jax.data import shards
from nanogpt_jax.commands import prepare as command
shards.SHARD, shards.PIECE = 2000, 1000
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
sys.exit(cli.guarded(command.main, ["text.txt"]))
"""
    done = subprocess.run([sys.executable, "-c", limited], env=clean_env, capture_output=True, text=True)
    words = ["error: cannot write prepared tokens into data.dir=data: File too large", "finished shards are kept"]
    refusal(done.returncode, done.stdout, done.stderr, *words)
    said("text.txt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "word", "gpt2", "bpe:1024"])
def test_memory_does_not_grow_with_the_text(clean_env, kind: str):
    """Peak resident memory for 2 MB and for 200 MB; the page of data has 2 GB."""
    words, chance = PYTHON_TEXT.split(), random.Random(0)
    peaks = []
    for megabytes in (2, 200):
        block = " ".join(chance.choices(words, k=150_000))[:1_000_000] + "\n"
        with open("big.txt", "w") as file:
            for _ in range(megabytes):
                file.write(block)
        argv = [sys.executable, "-m", "nanogpt_jax", "prepare", "big.txt", "--tokenizer", kind]
        code = f"import subprocess, resource; subprocess.run({argv!r}, check=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        done = subprocess.run([sys.executable, "-c", code], env=clean_env, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 200, peaks
