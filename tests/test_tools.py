"""The bench, in processes of its own as a person starts it, and what JAX is told before it starts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from nanogpt_jax import cli, config, runtime
from nanogpt_jax.config import UserError
from nanogpt_jax.model import sizes
from nanogpt_jax.tools import bench, scaling

TINY = "--model.block-size 16 --model.n-layer 1 --model.n-head 2 --model.n-embd 16 --train.batch-size 4".split()


@pytest.mark.parametrize(
    ("work", "rounds", "flags"),
    [("train", 1, []), ("decode", 1, ["--batch", "2", "--prompt", "3", "--new", "9"]), ("data", 3, [])],
)
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
    assert ("one round alone" in done.stdout) == (rounds == 1)
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
    assert cli.guarded(bench.main, flags.split()) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_peer_that_is_not_installed_is_told_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert cli.guarded(bench.main, ["decode", "--versus", "torch"]) == 2
    needs = "error: --versus=torch needs torch and transformers: pip install 'nanogpt-jax[compare]'\n"
    assert capsys.readouterr().err == needs


def test_a_want_of_memory_is_an_error_and_no_other_one_is_hidden(capsys):
    assert cli.guarded(lambda _: int(jnp.zeros(2**50).sum()), []) == 2  # four million gigabytes
    error = capsys.readouterr().err
    assert error.startswith("error: Out of memory allocating 4503599627370496 bytes")
    assert "less is needed for fewer and shorter texts" in error
    assert cli.guarded(lambda _: len(bytearray(2**50)), []) == 2
    assert capsys.readouterr().err.startswith("error: out of memory\n")

    for said in ("INTERNAL: RESOURCE_EXHAUSTED: Out of memory", "DefaultCPUAllocator: can't allocate memory"):
        assert cli.out_of_memory(RuntimeError(said))

    def other(_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded")

    with pytest.raises(RuntimeError, match="Shared memory"):
        cli.guarded(other, [])


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


def test_operations_of_a_training_step_are_those_of_its_matrix_products():
    """6 a token for each weight that multiplies, and 12 L C T for the scores and the sums: counted by hand here."""
    cfg = config.load("--model.vocab-size 128 --model.n-layer 3 --model.n-embd 32 --model.n-head 2".split()).cfg
    C, T, V = 32, cfg.model.block_size, 128
    products = 3 * (C * 3 * C + C * C + 2 * C * 4 * C) + V * C
    norms = (2 * 3 + 1) * C
    assert sizes.flops_per_token(cfg.model) == 6 * (products + norms) + 12 * 3 * C * T


def test_a_users_own_settings_stand(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "XLA_FLAGS": "--mine"})
    runtime.set_up()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
    assert os.environ["XLA_FLAGS"] == "--mine"
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0.1"
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "2"
    assert "# XLA_FLAGS=--mine" in runtime.describe()


def test_programs_are_kept_in_the_cache_folder_and_not_where_none_can_be(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    runtime.set_up()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / "nanogpt_jax"))
    assert "JAX_ENABLE_COMPILATION_CACHE" not in os.environ
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path / "file")})
    runtime.set_up()
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"


CACHED = """
import os, sys
from nanogpt_jax import cli
def main(_):
    import jax, jax.numpy as jnp
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for n in (1, 2):
        assert jax.jit(lambda x: jnp.sin(x) * n)(jnp.ones(3)).shape == (3,)
    return 0
sys.exit(cli.guarded(main))
"""


def test_damaged_entries_of_the_compile_cache_are_replaced_in_silence(tmp_path, clean_env):
    def run() -> dict[str, bytes]:
        env = {**clean_env, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-W", "error", "-c", CACHED], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return {path.name: path.read_bytes() for path in sorted(tmp_path.glob("*-cache"))}

    whole = run()
    (one, first), (two, second), *_ = [(n, c) for n, c in whole.items() if "lambda" in n]
    (tmp_path / one).write_bytes(first[:50])
    (tmp_path / two).write_bytes(second[:40] + bytes(20) + second[60:])
    third = next(name for name in whole if name not in (one, two))
    (tmp_path / third).unlink()  # must be kept again, though a killed process has left entries without a note
    (tmp_path / one.replace("-cache", "-atime")).unlink()
    (tmp_path / "jit_x-0123-cache").write_bytes(b"")
    found = run()
    assert found.keys() == {*whole, "jit_x-0123-cache"}
    assert len(found[one]) > 50
    assert bytes(20) not in found[two]
    assert (tmp_path / "jit_x-0123-atime").exists()
    assert run() == found  # read, and not written anew


def test_a_compile_cache_of_any_size_is_looked_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "1000")
    for i in range(1000):
        (tmp_path / f"jit_f-{i}-cache").touch()
        (tmp_path / f"jit_f-{i}-atime").touch()
    began = time.process_time()
    runtime._complete_cache()
    assert time.process_time() - began < 0.02


def test_the_exponent_of_a_power_law_is_found():
    row = [{"value": v, "cost": 3 * v**1.5} for v in (1, 2, 4, 8)]
    assert scaling._exponent(row, "cost") == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--picturs x", "did you mean --picture?"),
        ("foo", "foo is no flag"),
        ("--model.n-head 0", "model.n_head=0 must be at least 1"),
        ("--json nowhere/x.json", "--json=nowhere/x.json: there is no directory nowhere"),
        ("--picture nowhere/x.svg", "--picture=nowhere/x.svg: there is no directory nowhere"),
    ],
)
def test_wrong_input_of_scaling(flags, message, capsys):
    assert cli.guarded(scaling.main, flags.split()) == 2
    assert message in capsys.readouterr().err
