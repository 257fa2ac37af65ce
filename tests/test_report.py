"""The page about a run."""

import json
import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
from helpers import looked_at, refused

from nanogpt_jax import cli, config
from nanogpt_jax.commands import report

RUN = Path(__file__).parent / "fixtures/run.tar.gz"  # of an earlier version: it has no origin.json


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    with tarfile.open(RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


def written(*words: str) -> str:
    assert report.main(["run", *words]) == 0
    return Path("run/report.html").read_text(encoding="utf-8")


def test_the_page_says_what_the_run_was_and_how_to_make_it_again(capsys):
    Path("run/origin.json").write_text('{"settings": {"model.n_layer": "mine.toml"}, "versions": {"jax": "1.2.3"}}')
    page = written()
    assert capsys.readouterr().out == "run/report.html: open it in a browser\n"
    row = '<th scope="row">{}</th><td>{}</td>'
    assert row.format("model.n_layer", "1</td><td>4</td><td>mine.toml") in page
    assert row.format("model.n_head", "2</td><td>4</td><td>not recorded") in page
    assert row.format("jax", "1.2.3") in page
    assert row.format("nats per token", "2.6913") in page  # what eval says: test_training.py
    assert page.count("<polyline") == 4
    assert page.count("<circle") == 2
    assert "El gato persigue al ratón." not in page  # the vocabulary of this run lacks its letters
    assert page.count("<rect") == 16 * 17 / 2  # one head, 16 tokens: nobody looks ahead
    (command,) = re.findall("<pre>((?:python|nanogpt-jax) .*)</pre>", page)
    again = config.load(shlex.split(command.partition("train ")[2]))
    old = config.read_json(Path("run/config.json"))
    assert again.run_dir == Path("run")
    assert config.with_vocabulary(again.cfg, old.model.vocab_size, None, again.origin) == old


def test_the_page_runs_and_fetches_nothing():
    page = written()
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)


@pytest.mark.browser
def test_the_page_in_a_browser(browser, axe):
    written()
    looked_at(browser, axe, Path("run/report.html"))


def test_the_same_run_gives_the_same_page():
    assert written() == written("--checkpoint=best")


def test_what_is_missing_or_damaged_is_said_and_the_rest_is_shown():
    shutil.rmtree("data", ignore_errors=True)
    os.rename("text.txt", "other.txt")
    Path("run/metrics.jsonl").write_text('{"step": 1, "train/loss": null}\n{"step": 2, "grad_norm": 0.5}\n[]\n{"st')
    Path("run/origin.json").write_text("[]")
    page = written()
    assert "Not measured: the data of run is unavailable" in page
    assert page.count("<polyline") == 1
    Path("run/metrics.jsonl").unlink()
    assert "<polyline" not in written()


def test_a_link_in_the_place_of_the_page_is_not_followed(capsys):
    os.symlink("../text.txt", "run/report.html")
    refused(report.main, "run", capsys, "run/report.html is a link, and not a file", "--out")
    assert Path("text.txt").read_text() != ""


def test_texts_are_escaped():
    os.rename("run", "<b>&")
    told = json.loads(Path("<b>&/config.json").read_text())
    told["data"]["source"] = "<script>alert(1)</script>"
    Path("<b>&/config.json").write_text(json.dumps(told))
    assert report.main(["<b>&", "--out", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nowhere", "no run nowhere"),
        ("run run", "one run at a time, but got run, run"),
        ("run --checkpoint 7", "run has no checkpoint 7; it has 10, best and latest"),
        ("run --out .", "--out=. is a directory; give a file"),
        ("run --out none/page.html", "--out=none/page.html: there is no directory none"),
        ("run --out=", "--out needs the name of a file"),
        ("run --outt page.html", "did you mean --out?"),
        ("run --out /dev/full", "cannot write --out=/dev/full: No space left on device"),
        ("text.txt", "text.txt is a file; a run is a directory"),
        ("", "no run with a checkpoint in runs/"),
    ],
)
def test_wrong_input(line, words, capsys):
    refused(report.main, line, capsys, words)
    assert not Path("run/report.html").exists()


@pytest.mark.long
def test_a_run_that_was_extended_says_so_and_one_that_is_finished_keeps_its_settings(capsys):
    flags = "--model.n-layer 1 --model.n-head 2 --model.n-embd 16 --model.block-size 16 --train.batch-size 4".split()
    flags += "--data.source text.txt --train.eval-every 5 --run-dir run".split()
    assert cli.door("train").main([*flags, "--train.steps", "4"]) == 0
    assert "run is at step 10 already, beyond train.steps=4" in capsys.readouterr().out
    assert config.read_json(Path("run/config.json")).train.steps == 10
    for _ in range(2):
        assert cli.door("train").main([*flags, "--train.steps", "12"]) == 0
    page = written()
    assert page.count("Its steps were 10 until step 10, and more were asked for then: train with --train.steps=10") == 1
    assert "--train.steps=12" in page
