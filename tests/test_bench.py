"""The bench, run as a command in its own processes, and the cost of a token as a model grows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import refused

from nanogpt_jax.bench import bench, scaling
from nanogpt_jax.config import UserError

TINY = "--model.block-size 16 --model.n-layer 1 --model.n-head 2 --model.n-embd 16 --train.batch-size 4".split()


@pytest.mark.parametrize(
    ("work", "rounds", "flags"),
    [("train", 1, []), ("decode", 1, ["--batch", "2", "--prompt", "3", "--new", "9"]), ("data", 3, [])],
)
@pytest.mark.long
def test_the_bench_measures_and_writes_what_it_shows(work, rounds, flags, tmp_path, clean_env):
    flags = [*TINY, *flags, "--rounds", str(rounds), "--seconds", "1"]
    command = [sys.executable, "-m", "nanogpt_jax", "bench", work, *flags]
    done = subprocess.run([*command, "--json", "b.json"], cwd=tmp_path, env=clean_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "b.json").read_text())
    (result,) = written["results"]
    assert (written["work"], written["rounds"], written["seconds"]) == (work, rounds, 1)
    assert len(result["rounds"]) == rounds
    assert result["tokens_per_second"] == sorted(result["rounds"])[rounds // 2] > 0
    assert f"{result['tokens_per_second']:,.1f}" in done.stdout
    assert ("a single round" in done.stdout) == (rounds == 1)
    assert result["times_as_fast"] == 1
    assert result["first_step_seconds"] > 0
    assert result["peak_memory_bytes"] > 10e6
    assert (result["share_of_peak"] > 0) == (work != "data")
    assert (result["share_of_bandwidth"] > 0) == (work == "decode")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rounds 0", "--rounds=0 must be a whole number, at least 1"),
        ("--seconds", "--seconds needs a value"),
        ("--versus tensorflow", "--versus=tensorflow is not one of torch"),
        ("decode --prompt 60 --new 60", "--prompt=60 and --new=60 exceed model.block_size=64"),
        ("decode --prompt 64", "--prompt=64 leaves no room in model.block_size=64"),
        ("--batch 4", "--batch is about generation, which is nanogpt-jax bench decode"),
        ("--model.n-layers 3", "did you mean model.n_layer?"),
        ("--run-dir x", "unknown flag --run-dir"),
        ("frases", "data.tokenizer=word has as many tokens as the text has words; say how many: --model.vocab-size N"),
        ("trian", "trian is neither a kind of work nor a config file\n       did you mean train?"),
        ("nowhere", "no config file nowhere"),
        ("train data", "one kind of work at a time, but got train and data"),
        ("--json=", "--json needs the name of a file"),
        ("--json tests", "--json=tests is a directory; give a file"),
        ("--json nowhere/x.json", "--json=nowhere/x.json: there is no directory nowhere"),
        ("--mesh.data 12", "mesh data=12 fsdp=1 tensor=1 needs 12 devices"),  # which the measuring process knows
    ],
)
def test_wrong_input_of_the_bench(flags, message, capfd, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    refused(bench.main, flags, capfd, message)


def test_a_peer_that_is_not_installed_is_told_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    needs = "error: --versus=torch needs torch and transformers: pip install 'nanogpt-jax[compare]'\n"
    assert refused(bench.main, "decode --versus torch", capsys) == needs


def test_the_kind_of_work_may_stand_behind_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.toml").write_text("[model]\nn_layer = 2\n")  # as like "data" as a slip of the finger
    for words in (["decode", "data.toml", "--new", "5"], ["data.toml", "--new=5", "decode"]):
        work, cfg, options = bench.read(words)
        assert (work, cfg.model.n_layer, options.new) == ("decode", 2, 5)


def test_a_prompt_that_nobody_asked_for_fits_into_any_context():
    lengths = {T: bench.read(["decode", "--model.block-size", str(T)])[2] for T in (2, 8, 64)}
    assert {T: (o.prompt, o.new) for T, o in lengths.items()} == {2: (1, 1), 8: (4, 4), 64: (16, 48)}


def test_a_measuring_process_that_dies_is_an_error():
    worker = bench._Worker({"engine": "nobody", "work": "train", "cfg": {}, "seconds": "1"})
    with pytest.raises(UserError, match="the measuring process of nobody ended"):
        worker.ask("start")
    worker.close()


def test_the_exponent_of_a_power_law_is_found():
    row = [{"value": v, "cost": 3 * v**1.5} for v in (1, 2, 4, 8)]
    assert scaling._exponent(row, "cost") == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--picturs x", "did you mean --picture?"),
        ("foo", "foo is not a flag"),
        ("--model.n-head 0", "model.n_head=0 must be at least 1"),
        ("--json nowhere/x.json", "--json=nowhere/x.json: there is no directory nowhere"),
        ("--picture nowhere/x.svg", "--picture=nowhere/x.svg: there is no directory nowhere"),
        ("--picture x.docx", "--picture=x.docx must end in one of"),
    ],
)
def test_wrong_input_of_scaling(flags, message, capsys):
    refused(scaling.main, flags, capsys, message)
