"""The command line as a person meets it: real processes, and for each wrong input its message and exit code 2."""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from helpers import refusal, refused

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, UserError, command_line
from nanogpt_jax.config.settings import types_of
from nanogpt_jax.config.train_command import command_line_of
from nanogpt_jax.data import tokenizer
from nanogpt_jax.host import files
from nanogpt_jax.run import run_dir
from nanogpt_jax.run.metrics import MetricsLog, read_metrics, wandb_id
from nanogpt_jax.run.opened import newest
from nanogpt_jax.run.run_dir import IMPORTED, claim, prepare

ROOT = Path(__file__).parent.parent
SMALL = (
    "--data.source text.txt --model.block-size 16 --model.n-layer 1 --model.n-head 2 --model.n-embd 16 "
    "--optim.warmup-steps 2 --train.batch-size 4 --train.log-every 1 --train.eval-every 10 --train.save-every 5"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty directory with a text, a finished run in runs/done, and ways to spoil things."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("El gato persigue al ratón. " * 100, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.door("train").main([*SMALL, "--train.steps", "10", "--run-dir", "runs/done"]) == 0
    return folder


def run(folder: Path, env: dict, script: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def go(place, monkeypatch, capsys):
    """go("train", *arguments): train.py in this process and in `place`, for what needs no process of its own."""
    monkeypatch.chdir(place)

    def call(script: str, *arguments: str) -> SimpleNamespace:
        code = cli.guarded(cli.door(script).main, list(arguments))
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return call


def failed(result: Any, *words: str) -> None:
    refusal(result.returncode, result.stdout, result.stderr, *words)


# (what is wrong, command line, words of the message)
WRONG_SETTINGS = [
    ("unknown setting", "--model.n-layers 8", ["unknown setting model.n_layers (command line)", "did you mean model.n_layer?"]),
    ("unknown section", "--modle.n-layer 8", ["unknown setting modle.n_layer", "model.n_layer"]),
    ("right name, wrong section", "--train.learning-rate 1", ["unknown setting train.learning_rate", "learning_rate"]),
    ("a misspelt flag", "--run-dirs x", ["unknown flag --run-dirs (command line)", "did you mean --run-dir?"]),
    ("right name, a section near by", "--train.n-layer 5", ["did you mean model.n_layer?"]),
    ("a setting begun", "--data.tok gpt2", ["did you mean data.tokenizer?"]),
    ("nothing near", "--optim.lr 1", ["unknown setting optim.lr (command line)\n       sections are model, data, optim"]),
    ("no section", "--n-layer 8", ["unknown flag --n-layer", "did you mean --model.n_layer?"]),
    ("unknown flag", "--quiet", ["unknown flag --quiet"]),
    ("flag with one dash", "-q", ["unknown flag -q"]),
    ("no directory", "--run-dir=", ["--run-dir needs a value"]),
    ("no value", "--model.n-layer", ["--model.n-layer needs a value"]),
    ("value for a switch", "--overwrite=yes", ["--overwrite takes no value"]),
    ("twice", "--model.n-layer 2 --model.n_layer 3", ["given twice"]),
    ("not a number", "--model.n-layer four", ["model.n_layer='four' must be a whole number (command line)"]),
    ("not whole", "--model.n-layer 1.5", ["must be a whole number"]),
    ("not finite", "--optim.learning-rate nan", ["must be a finite number"]),
    ("not a bool", "--model.bias maybe", ["must be true or false"]),
    ("not a choice", "--model.dtype flaot32", ["not one of float32, bfloat16", "did you mean float32?"]),
    ("negative", "--train.steps -3", ["train.steps=-3 must be at least 1"]),
    ("more steps than are counted", "--train.steps 3000000000", ["train.steps=3000000000 must be at most 2147483647"]),
    ("a rate beyond float32", "--optim.learning-rate 1e39", ["optim.learning_rate=1e+39 must be below 1e38"]),
    ("zero", "--train.batch-size 0", ["train.batch_size=0 must be at least 1"]),
    ("heads", "--model.n-embd 100 --model.n-head 12", ["model.n_embd=100 must be a multiple of model.n_head=12", "nearest: 96 or 108"]),
    ("dropout", "--model.dropout 1.0", ["model.dropout=1.0 must lie in [0, 1)"]),
    ("back-end without dropout", "--model.attention xla --model.dropout 0.1", ["has no dropout"]),
    ("cudnn in float32", "--model.attention cudnn", ["needs 16-bit numbers"]),
    ("micro-batch", "--train.micro-batch 5", ["train.micro_batch=5 does not divide train.batch_size=12", "nearest: 4"]),
    ("mesh and batch", "--mesh.data 5", ["must be a multiple of mesh.data * mesh.fsdp = 5", "nearest: 15"]),
    ("heads alone", "--model.n-head 3", ["model.n_embd=128 must be a multiple of model.n_head=3 (command line)"]),
    ("mesh and heads", "--mesh.tensor 3", ["mesh.tensor=3 must divide model.n_head=4"]),
    ("two rests", "--mesh.data -1 --mesh.fsdp -1", ["only one axis can be -1"]),
    ("warm-up", "--optim.warmup-steps=-1", ["optim.warmup_steps=-1 must not be negative"]),
    ("spikes", "--optim.skip-spikes=2", ["optim.skip_spikes=2.0 must be 0 (never) or lie in 3 to 1000 standard"]),
    ("resume", "--resume perhaps", ["--resume=perhaps is not one of auto, never, must"]),
    ("must and overwrite", "--resume must --overwrite", ["exclude each other"]),
    ("no such config", "shakespeare_chr", ["no config file shakespeare_chr", "did you mean shakespeare_char?"]),
    ("two configs", "gpt2 gpt2-xl", ["one config file at a time"]),
    ("a directory for a config", "runs", ["runs is a directory, not a config file"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), [w[1:] for w in WRONG_SETTINGS], ids=[w[0] for w in WRONG_SETTINGS])
def test_wrong_settings(place, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(place)
    refused(cli.door("train").main, arguments, capsys, *words)


def test_a_platform_that_is_not_there_is_named(place, clean_env):
    env = {**clean_env, "JAX_PLATFORMS": "abacus"}
    failed(run(place, env, "sample.py", "runs/done"), "JAX cannot start on JAX_PLATFORMS=abacus", "unset it")


WRONG_FILES = [
    ("not TOML", "model = {", ["is not valid TOML"]),
    ("unknown key", "[model]\nn_layers = 3", ["unknown setting model.n_layers (bad.toml)", "did you mean model.n_layer?"]),
    ("unknown section", "[network]\nn_layer = 3", ["unknown setting network.n_layer (bad.toml)"]),
    ("no section", "n_layer = 3", ["unknown setting n_layer (bad.toml)", "in a section [model]"]),
    ("text for a number", '[model]\nn_layer = "3"', ["model.n_layer='3' must be a whole number (bad.toml)"]),
    ("a number for a bool", "[model]\nbias = 1", ["model.bias=1 must be true or false (bad.toml)"]),
    ("a bool for a number", "[model]\nn_layer = true", ["model.n_layer=True must be a whole number"]),
    ("impossible", "[model]\nn_embd = 30", ["model.n_embd=30 must be a multiple of model.n_head=4 (bad.toml)"]),
    ("not text", b"\xff\xfe\xfa", ["is not UTF-8 text"]),
    ("UTF-16", "[model]".encode("utf-16"), ["bad.toml is UTF-16 or binary", "iconv -f UTF-16 -t UTF-8 bad.toml > bad-utf8.toml"]),
    ("UTF-16 without a mark", "[model]".encode("utf-16-be"), ["iconv -f UTF-16BE -t UTF-8 bad.toml > bad-utf8.toml"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), [w[1:] for w in WRONG_FILES], ids=[w[0] for w in WRONG_FILES])
def test_wrong_config_files(tmp_path, monkeypatch, capsys, content, words):
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(cli.door("train").main, "bad.toml", capsys, *words)


WRONG_DATA = [
    ("no file", "--data.source gone.txt", ["data.source=gone.txt"]),
    ("misspelt corpus", "--data.source python-doc", ["did you mean python-docs?"]),
    ("a directory", "--data.source runs", ["metrics.jsonl, line 1 has no field 'text'", "--data.field=NAME"]),
    ("not UTF-8", "--data.source latin1.txt", ["not UTF-8", "offset"]),
    ("empty", "--data.source empty.txt", ["is empty"]),
    ("too short", "--data.source short.txt", ["model.block_size=64", "tokens"]),
    ("vocabulary too small", "--data.source text.txt --model.vocab-size 3", ["model.vocab_size=3 is too small"]),
    ("documents without a token between them", "--data.source text.txt --model.separate-documents true", ["model.separate_documents needs an end-of-text token", "command line"]),
    ("run directory is a file", "--data.source text.txt --run-dir text.txt", ["is a file"]),
    ("nothing to resume", "--data.source text.txt --run-dir runs/new --resume must", ["has no checkpoint"]),
    ("somebody's directory", "--data.source text.txt --run-dir home", ["holds other files", "is not a run"]),
    ("somebody's directory, overwrite", "--data.source text.txt --run-dir home --overwrite", ["holds other files"]),
    ("another program's config.json", "--data.source text.txt --run-dir model --overwrite", ["unknown setting", "model/config.json"]),
    ("a run stands there", "--data.source text.txt --run-dir runs/done --resume never", ["holds a run", "--overwrite"]),
    ("another run's directory", "--data.source text.txt --run-dir runs/done", ["with other settings", "model.n_layer: 1 in the run, 4 now"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), [w[1:] for w in WRONG_DATA], ids=[w[0] for w in WRONG_DATA])
def test_wrong_data_and_run_directories(place, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(place)
    (place / "latin1.txt").write_bytes("ratón".encode("latin-1") * 30)
    (place / "empty.txt").touch()
    (place / "short.txt").write_text("corto " * 5)
    (place / "home").mkdir(exist_ok=True)
    (place / "home" / "thesis.txt").write_text("mine")
    (place / "model").mkdir(exist_ok=True)
    (place / "model" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    refused(cli.door("train").main, arguments, capsys, *words)
    assert (place / "home" / "thesis.txt").read_text() == "mine"
    assert (place / "model" / "config.json").is_file()
    assert (place / "runs/done/checkpoints/10").is_dir()


LONG = "n" * 300  # file systems allow 255
LONG_NAMES = [
    *("train {}", "train {}.toml", "train --data.source {}", "train --data.source text.txt --data.dir {}"),
    *("train --data.source text.txt --data.tokenizer {}", "train --data.source text.txt --run-dir {}"),
    *("train --data.source text.txt --init-from {}", "sample {}", "sample runs/done --prompt-file {}"),
    *("prepare {}", "prepare text.txt --config {}", "prepare text.txt --dir {}", "prepare text.txt --tokenizer {}"),
    *("eval {}", "eval runs/done --data {}", "eval runs/done --choices {}", "eval runs/done --json {}"),
    *("attend {} gato", "attend runs/done gato --out {}", "attend runs/done --text-file {}"),
    *("attend runs/done gato --npz {}", "attend runs/done gato --picture {}.svg", "attend runs/done gato --versus {}"),
    *("eval runs/done --lm-eval a --include-path {}", "classify train --data.source {}.csv", "classify eval {}"),
    *("classify predict {} --file text.txt", "import-hf {} new", "import-hf {}.safetensors new"),
    *("export-hf {} new", "export-hf runs/done {}", "export-hf runs/done {}.gguf", "bench {}", "bench --json {}"),
    *("scaling --json {}", "scaling --picture {}.svg"),
]


@pytest.mark.parametrize("line", [line for line in LONG_NAMES if line.split()[0] in cli.offered()])
def test_a_name_that_is_too_long_is_no_traceback(place, monkeypatch, capsys, line):
    monkeypatch.chdir(place)
    refused(cli._main, line.format(LONG), capsys, LONG)


@pytest.mark.parametrize("line", [line for line in LONG_NAMES if line.split()[0] in cli.offered()])
def test_a_folder_that_may_not_be_searched_is_no_traceback(place, monkeypatch, capsys, line):
    """Root may search any, so the system's answer is made here."""
    monkeypatch.chdir(place)
    real = {name: getattr(os, name) for name in ("stat", "lstat", "open", "mkdir", "scandir", "listdir", "readlink")}

    def barred(name: str) -> Callable[..., Any]:
        def call(path: Any = ".", *rest: Any, **more: Any) -> Any:
            if isinstance(path, str | Path) and "locked/" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return real[name](path, *rest, **more)

        return call

    for name in real:
        monkeypatch.setattr(os, name, barred(name))
    refused(cli._main, line.format("locked/n"), capsys)


def test_help_and_print_config_name_every_setting(place, go, monkeypatch, clean_env):
    monkeypatch.setenv("COLUMNS", "80")
    page = go("train", "--help").stdout
    assert re.search(r"--model.n-layer INT +L, transformer blocks \(default: 4\)", page)
    assert re.search(r"--optim.schedule \{cosine,linear,wsd,constant\}\s+from the peak .* in the last 20\s+%", page)
    assert not re.search(r"(INT|FLOAT|TEXT|\})\s+\(default", page), "a setting without a comment"
    assert max(map(len, page.splitlines())) < 110
    page = page.replace("-", "_")
    shown = go("train", "gpt2", "--model.n-layer=3", "--model.n_head", "4", "--print-config")
    for key in types_of():
        assert key in page
        assert re.search(rf"^{key.split('.')[1]} = .* # ", shown.stdout, re.M)
    assert re.search(r"n_layer = 3 +# command line", shown.stdout)
    assert re.search(r"n_head = 4 +# command line", shown.stdout)
    assert re.search(r"n_embd = 768 +# .*gpt2.toml", shown.stdout)
    assert re.search(r"dropout = 0.0 +# default", shown.stdout)
    assert re.search(r"^# how it runs on this machine.*:\n# attention=blocked\n# scan_unroll=3\n", shown.stdout, re.M)
    (place / "again.toml").write_text(shown.stdout, encoding="utf-8")
    again = go("train", "again.toml", "--print-config").stdout
    assert re.sub("#.*", "", again) == re.sub("#.*", "", shown.stdout)
    code = "import sys; from nanogpt_jax import cli, config; config.load(['gpt2']); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=clean_env, check=True)


def test_settings_are_shown_on_a_machine_that_cannot_run_them(place, clean_env, go):
    abacus = run(place, {**clean_env, "JAX_PLATFORMS": "abacus"}, "train.py", "gpt2", "--print-config")
    for shown, reason in (
        (go("train", "gpt2", "--mesh.data=16", "--print-config"), "mesh data=16 .* needs 16 devices"),
        (abacus, "JAX cannot start on .*abacus"),
    ):
        assert shown.returncode == 0, shown.stderr
        assert re.search(r"n_embd = 768 +# .*gpt2.toml", shown.stdout)
        assert re.search(rf"^# it cannot run on this machine:\n# {reason}", shown.stdout, re.M)
        assert not [line for line in shown.stdout.splitlines() if line and not re.match(r"#|\[\w+\]$|\w+ = ", line)]


def command_lines() -> list[command_line.CommandLine]:
    """Those of every module that is there: a slice may have been removed."""
    rooms = ("inference", "commands", "bench")
    paths = [path for room in rooms for path in sorted((ROOT / "nanogpt_jax" / room).glob("*.py"))]
    paths = [path for path in paths if "CommandLine(" in path.read_text(encoding="utf-8")]
    modules = [importlib.import_module(f"nanogpt_jax.{path.parent.name}.{path.stem}") for path in paths]
    found = [x for module in modules for x in vars(module).values() if isinstance(x, command_line.CommandLine)]
    return [command_line_of(Config), *{command.name: command for command in found}.values()]


@pytest.mark.parametrize("command", command_lines(), ids=lambda command: command.name)
def test_a_command_says_what_each_flag_means_and_refuses_a_typo_by_name(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    page = command.help()
    assert page.startswith(f"usage: nanogpt-jax {command.name} ")
    assert max(map(len, page.splitlines())) < 110
    for one in [one for one in dataclasses.fields(command.options) if one.metadata]:
        flag = command_line.flag_of(one.name)
        row = re.search(rf"^  {flag}( \S+)?(  +|\n {{9,}})\w[^\n]*((\n {{9,}}\S.*)*)", page, re.M)
        assert row, flag
        if one.default not in (None, (), False):
            assert "(default:" in row[0]
        with pytest.raises(UserError, match=rf"unknown flag {flag}z.*\n       did you mean {flag}\?"):
            command.read([f"{flag}z", "1"])


@dataclasses.dataclass(frozen=True)
class Asked(command_line.Options):
    size: int = command_line.flag("N", "how many", 1, must=command_line.COUNT)
    kind: Literal["a", "b"] | None = command_line.flag("", "which")
    stop: tuple[str, ...] = command_line.flag("TEXT", "ends", ())
    bare: bool = command_line.flag("", "without", False)


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ("", Asked([], {})),
        ("x --size=3 --kind b y --bare", Asked(["x", "y"], {}, 3, "b", bare=True)),
        ("--stop a --stop=b --stop a", Asked([], {}, stop=("a", "b", "a"))),
        ("--size 2 --size 2 -- --size --help -x", Asked(["--size", "--help", "-x"], {}, 2)),
        ("--size 2 --size 3", "--size was given twice: 2 and 3"),
        ("--size 0", "--size=0 must be a whole number, at least 1"),
        ("--size many", "--size=many must be a whole number"),
        ("--kind c", "--kind=c is not one of a, b"),
        ("--bare=yes", "--bare takes no value, but was given 'yes'"),
        ("--kind --bare", "--kind needs a value; see --help"),
        ("--model.n-layer 3", "unknown flag --model.n-layer\n       see nanogpt-jax ask --help"),
    ],
)
def test_the_reader_of_every_command(argv, found):
    command = command_line.CommandLine("ask", Asked, "")
    if isinstance(found, Asked):
        assert command.read(argv.split()) == found
        assert cli.asks_for_help(argv.split()) is False
    else:
        with pytest.raises(UserError) as e:
            command.read(argv.split())
        assert str(e.value) == found


def test_a_program_in_any_folder_is_a_word_of_a_shell_and_its_help_has_its_name_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/ä b/x/train.py"])
    assert shlex.split(config.program("sample")) == ["python", "/home/ä b/x/sample.py"]
    assert config.help_text().startswith("usage: python train.py [CONFIG.toml]")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert config.program("train") == "python train.py"


def test_sizes_of_gpt2():
    """Radford et al. 2019, table 2, as counted from the released weights."""
    from dataclasses import replace

    from nanogpt_jax.model import sizes

    of = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for name, size in of.items():
        assert sizes.n_params(replace(config.load([name]).cfg.model, vocab_size=50257)) == size


def test_the_package_is_a_command_too(place, clean_env):
    def command(*arguments):
        words = [sys.executable, "-m", "nanogpt_jax", *arguments]
        return subprocess.run(words, cwd=place, env=clean_env, capture_output=True, text=True)

    assert "train" in command("--help").stdout
    failed(command("trian"), "unknown command trian", "did you mean train?")
    failed(command("train", "--model.n-layers", "3"), "did you mean model.n_layer?")
    assert "[model]" in command("train", "shakespeare_char", "--print-config").stdout
    assert command("train", "--help").stdout.startswith("usage: nanogpt-jax train [CONFIG.toml]")
    failed(command("train", "train.steps=20"), "no config file train.steps=20", "did you mean --train.steps=20?")


def test_every_command_has_a_page_of_its_own(capsys):
    for name in cli.offered():
        assert cli.command(name)(["--help"]) == 0
        assert capsys.readouterr().out.startswith("usage: ")


def test_every_command_answers_a_typo_before_jax_starts(tmp_path, clean_env):
    code = (
        "import sys; from nanogpt_jax import cli\n"
        "for name in cli.offered():\n"
        "    assert cli.guarded(cli.command(name), ['--nonsense']) == 2, name\n"
        "    assert 'jax' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(cli.offered())


def test_a_command_goes_with_its_slice(capsys, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "paint", ("draw a picture", "paint.oil", "main"))
    assert cli.guarded(cli._main, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert "prepare" in shown
    assert "paint" not in shown
    assert cli.guarded(cli._main, ["paint"]) == 2
    assert "unknown command paint" in capsys.readouterr().err


def test_a_want_of_memory_is_an_error_and_no_other_one_is_hidden(capsys):
    import jax.numpy as jnp

    assert cli.guarded(lambda _: int(jnp.zeros(2**50).sum()), []) == 2  # four million gigabytes
    error = capsys.readouterr().err
    assert error.startswith("error: Out of memory allocating 4503599627370496 bytes")
    assert "use fewer or shorter texts at once" in error
    assert cli.guarded(lambda _: len(bytearray(2**50)), []) == 2
    assert capsys.readouterr().err.startswith("error: out of memory\n")

    for said in ("INTERNAL: RESOURCE_EXHAUSTED: Out of memory", "DefaultCPUAllocator: can't allocate memory"):
        assert cli.out_of_memory(RuntimeError(said))

    def other(_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded")

    with pytest.raises(RuntimeError, match="Shared memory"):
        cli.guarded(other, [])


def test_a_finished_run_is_left_alone(place, go):
    before = {p: p.stat().st_mtime_ns for p in (place / "runs/done/checkpoints").rglob("*")}
    again = go("train", *SMALL, "--train.steps", "10", "--run-dir", "runs/done")
    assert again.returncode == 0
    assert "is finished: step 10 of 10\n" in again.stdout
    fewer = go("train", *SMALL, "--train.steps", "6", "--run-dir", "runs/done")
    assert "is at step 10 already, beyond train.steps=6" in fewer.stdout
    assert "--train.steps 20" in fewer.stdout
    assert {p: p.stat().st_mtime_ns for p in (place / "runs/done/checkpoints").rglob("*")} == before


def start(popen, place: Path, env: dict, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--train.steps", "100000", *arguments]
    process = popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(process, place, arguments[-1])
    return process


def wait_for_steps(process: subprocess.Popen, place: Path, run_dir: str, terminal: int | None = None) -> None:
    metrics = place / run_dir / "metrics.jsonl"
    before = metrics.read_text().count("\n") if metrics.exists() else 0
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > before + 20):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        if terminal is not None:  # one that nobody reads fills up
            with contextlib.suppress(BlockingIOError):
                os.read(terminal, 65536)
        time.sleep(0.05)


@pytest.mark.long
def test_a_signal_saves_and_says_how_to_go_on_and_a_second_process_is_refused(place, clean_env, popen):
    process = start(popen, place, clean_env, "--run-dir", "runs/cut")
    second = run(place, clean_env, "train.py", *SMALL, "--train.steps", "100000", "--run-dir", "runs/cut")
    failed(second, "another process is training in runs/cut")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    step = int(re.search(r"SIGINT: saved step (\d+) of 100000", out)[1])
    assert (place / "runs/cut/checkpoints" / str(step)).is_dir()
    program = shlex.quote(str(ROOT / "train.py"))
    assert f"go on with the same command: python {program} --data.source text.txt" in out
    # the lock of a process that is gone does not count, and the same command goes on
    process = start(popen, place, clean_env, "--run-dir", "runs/cut")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert f"going on in runs/cut from step {step}" in out
    assert "SIGTERM: saved step" in out
    assert process.returncode == 143


ON_ITS_OWN_TERMINAL = f"""
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that it hears SIGHUP when the terminal goes away
signal.signal(signal.SIGHUP, signal.{{}})
sys.path.insert(0, {str(ROOT)!r})
from nanogpt_jax import cli
sys.exit(cli.guarded(cli.door("train").main))
"""


@pytest.mark.parametrize(("hangup", "steps", "code"), [("SIG_DFL", 100000, 129), ("SIG_IGN", 100, 0)])
@pytest.mark.long
def test_a_terminal_that_is_closed_saves_the_run_and_under_nohup_ends_nothing(
    place, clean_env, popen, hangup, steps, code
):
    run_dir = f"runs/{hangup}"
    flags = [*SMALL, "--train.steps", str(steps), "--run-dir", run_dir]
    command = [sys.executable, "-c", ON_ITS_OWN_TERMINAL.format(hangup), *flags]
    leader, follower = os.openpty()
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
    process = popen(command, cwd=place, env=clean_env, start_new_session=True, **terminal)
    os.close(follower)
    os.set_blocking(leader, False)
    wait_for_steps(process, place, run_dir, leader)
    os.close(leader)
    assert process.wait(60) == code
    rows = (place / run_dir / "metrics.jsonl").read_text().splitlines()
    last = max(int(path.name) for path in (place / run_dir / "checkpoints").iterdir())
    assert last == json.loads(rows[-1])["step"]
    if hangup == "SIG_IGN":
        assert last == steps
        assert len(rows) == steps + steps // 10


@pytest.mark.slow  # test_host.py has the same without a training
def test_a_reader_that_goes_away_and_a_closed_stderr_end_no_run(place, clean_env):
    words = [sys.executable, str(ROOT / "train.py"), *SMALL, "--train.steps", "20", "--run-dir", "runs/head"]
    line = f"({shlex.join(words)} 2>&-; echo $? > code) | head -1"
    shown = subprocess.run(["sh", "-c", line], cwd=place, env=clean_env, capture_output=True, text=True, timeout=120)
    assert shown.stdout.startswith("training in runs/head: ")
    assert (place / "code").read_text() == "0\n"
    assert (place / "runs/head/checkpoints/20").is_dir()


def test_a_signal_before_the_first_step_ends_the_process_without_a_traceback(place, clean_env, popen):
    """Ctrl-C while jax is being imported or the step compiled: nothing to lose, and nothing to read but one line."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--train.steps", "100000", "--run-dir", "runs/early"]
    process = popen(command, cwd=place, env=clean_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (place / "runs/early/config.json").exists():  # written just before jax is imported
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "go on with the same command" in out


def test_a_start_that_fails_leaves_no_directory(place, go):
    failed(go("train", "--data.source", "gone.txt", "--run-dir", "runs/none"), "gone.txt")
    assert not (place / "runs/none").exists()
    longer = ("--data.source", "text.txt", "--model.block-size", "999999", "--run-dir", "runs/none")
    failed(go("train", *longer), "set model.block_size to at most")
    assert not (place / "runs/none").exists()


@pytest.mark.long
def test_a_terminal_sees_a_bar_with_loss_speed_and_time_left(place, clean_env):
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--train.steps", "20", "--run-dir", "runs/bar"]
    env = {**clean_env, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # what reading says on Linux when the other end is closed
        while piece := os.read(leader, 4096):
            shown += piece
    os.close(leader)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"step +0/20 .*compiling the step +left", text), text
    assert re.search(r"step +\d+/20 .*loss \d\.\d{4} +[\d,]+ tokens/s +left \d+:\d\d:\d\d", text), text


def test_a_truncated_checkpoint_is_refused_by_name_and_the_one_before_it_serves(place, go):
    shutil.copytree(place / "runs/done", place / "runs/truncated")
    big = max(
        (place / "runs/truncated/checkpoints/10").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    os.truncate(big, 10)
    longer = [*SMALL, "--train.steps", "20", "--run-dir", "runs/truncated"]
    result = go("train", *longer)
    failed(result, "checkpoints/10 is damaged", f"{big.relative_to(place)} has 10 bytes")
    advice = re.search("go on from checkpoint 5: (.*)", result.stderr)
    assert advice
    subprocess.run(shlex.split(advice[1]), cwd=place, check=True)  # to the letter
    result = go("train", *longer)
    assert result.returncode == 0, result.stderr
    assert "from step 5" in result.stdout


# a limit on the size of files stands in for a full disk: writes fail in the same place
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param("resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))", id="disk is full"),
        pytest.param("os.mkdir = refuse", id="folder cannot be made", marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_a_save_that_fails_is_an_error_and_keeps_what_was_saved(place, tmp_path, clean_env, go, monkeypatch, spoil):
    shutil.copytree(place / "runs/done", tmp_path / "runs/full")
    shutil.copy(place / "text.txt", tmp_path)
    limited = f"""
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, {str(ROOT)!r})
import jax, orbax.checkpoint, train
from nanogpt_jax import cli
mkdir = os.mkdir
def refuse(path, *rest, **options):
    if "checkpoint-tmp" in str(path):
        raise PermissionError(13, "Permission denied", str(path))
    mkdir(path, *rest, **options)
{spoil}
sys.exit(cli.guarded(train.main))
"""
    longer = [*SMALL, "--train.steps", "20", "--run-dir", "runs/full"]
    command = [sys.executable, "-c", limited, *longer]
    result = subprocess.run(command, cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=120)
    failed(result, "could not save step 1", "the last whole checkpoint is step 10")
    monkeypatch.chdir(tmp_path)
    result = go("train", *longer)
    assert result.returncode == 0, result.stderr
    assert "from step 10" in result.stdout


@pytest.mark.long
def test_a_command_does_not_wait_for_a_compilation_that_nobody_will_use(tmp_path, place, clean_env):
    shutil.copy(place / "text.txt", tmp_path)
    busy = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from nanogpt_jax import cli
from nanogpt_jax.model import execution
from nanogpt_jax.training import compiled
execution.RECOMPILE_AFTER = execution.RECOMPILE_LEFT = 0
compiled.CompiledStep._compile_apart = lambda self: time.sleep(300)
sys.exit(cli.guarded(train.main))
"""
    command = [sys.executable, "-c", busy, *SMALL, "--train.steps", "20", "--run-dir", "runs/busy"]
    result = subprocess.run(command, cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "next:" in result.stdout


def test_a_run_with_damaged_files_goes_on_or_says_which(place, go):
    shutil.copytree(place / "runs/done", place / "runs/worn")
    longer = [*SMALL, "--train.steps", "20", "--run-dir", "runs/worn"]
    scores = place / "runs/worn/checkpoints/10/metrics/metrics"
    kept = scores.read_bytes()
    scores.write_bytes(kept[:5])
    for script, arguments in (("train", longer), ("sample", ["runs/worn"])):
        failed(go(script, *arguments), "checkpoints/10 is damaged", "metrics/metrics has 5 bytes")
    scores.write_bytes(kept)
    log = place / "runs/worn/metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], b"\xff\x00\n", b"7\n", *lines[1:], b'{"step": 1']))
    result = go("train", *longer)
    assert result.returncode == 0, result.stderr
    assert log.read_bytes().startswith(b"".join(lines))
    shutil.rmtree(place / "runs/worn/checkpoints")
    result = go("train", *longer)
    assert result.returncode == 0, result.stderr
    assert "note: runs/worn has no checkpoint to go on from, so it starts over" in result.stderr


def test_a_start_that_failed_late_leaves_nothing_behind(place, clean_env):
    flags = [*SMALL, "--run-dir", "runs/late"]
    failed(run(place, {**clean_env, "JAX_PLATFORMS": "abacus"}, "train.py", *flags), "abacus")
    assert not (place / "runs/late").exists()


def test_overwriting_deletes_nothing_before_there_are_devices(place, clean_env, go):
    flags = [*SMALL, "--run-dir", "runs/done", "--overwrite"]
    before = sorted((place / "runs/done").rglob("*"))
    failed(run(place, {**clean_env, "JAX_PLATFORMS": "abacus"}, "train.py", *flags))
    failed(go("train", *flags, "--model.attention=splash"))
    assert sorted((place / "runs/done").rglob("*")) == before


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_is_the_same_run(tmp_path, clean_env):
    """20 times SIGKILL, some of them during a save: losses and parameters equal the uninterrupted run's, bit for bit."""
    import json
    import random

    import jax
    import numpy as np
    from helpers import load

    (tmp_path / "text.txt").write_text("El gato persigue al ratón. " * 200, encoding="utf-8")
    flags = [*SMALL[:-1], "7", "--train.steps", "400", "--model.dropout", "0.1"]

    def outcome(run_dir):
        lines = (tmp_path / run_dir / "metrics.jsonl").read_text().splitlines()
        rows = [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]
        return rows, load(tmp_path / run_dir, "latest")

    assert run(tmp_path, clean_env, "train.py", *flags, "--run-dir", "whole").returncode == 0
    expected_rows, (expected, expected_step) = outcome("whole")
    assert expected_step == 400
    chance = random.Random(0)
    kills, during_save = 0, 0
    for trial in range(20):
        run_dir = f"cut{trial}"
        # the first seconds are imports and compilation; then wait for a step, and perhaps for a save under way
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags, "--run-dir", run_dir],
            cwd=tmp_path, env=clean_env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        at, want_save = chance.randrange(1, 350), trial % 2
        while process.poll() is None:
            metrics = tmp_path / run_dir / "metrics.jsonl"
            if metrics.exists() and metrics.read_text().count("\n") >= at:
                saving = list((tmp_path / run_dir / "checkpoints").glob("*tmp*"))
                if saving or not want_save:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    during_save += bool(saving)
                    break
            time.sleep(0.001)
        process.wait()
        assert run(tmp_path, clean_env, "train.py", *flags, "--run-dir", run_dir).returncode == 0
        rows, (params, step) = outcome(run_dir)
        assert (rows, step) == (expected_rows, expected_step), trial
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    print(f"{kills} kills, {during_save} of them during a save")
    assert kills >= 15
    assert during_save >= 3


# ---- the run directory, in this process and without jax --------------------------------------------------------------

DATA = SimpleNamespace(tokenizer=tokenizer.make("char", "abc"), fingerprint="abc", manifest={})


def attempt(*flags: str, begin: bool = False, data: Any = DATA, then: Callable[[Path], None] = lambda _: None) -> None:
    """A start of train.py with these flags, which stops before it trains, or when it has logged a line."""
    source = [] if "--data.source" in flags else ["--data.source", "text.txt"]
    command = config.load([*source, *flags])
    with claim(command) as run:
        prepare(run, command, command.cfg, data)
        then(run)
        with MetricsLog(run, command.cfg.train, 0) as log:
            if begin:
                log.write(1, {"train/loss": 1.0})


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fail(error: BaseException) -> Callable[[Path], None]:
    def do(_: Path) -> None:
        raise error

    return do


@pytest.fixture
def done(tmp_path, monkeypatch):
    """A run in its own directory, with a checkpoint that is only a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_dir, "execution_here", lambda _: None)
    attempt("--run-dir", "done", begin=True)
    (tmp_path / "done/checkpoints/10/params").mkdir(parents=True)
    return tmp_path / "done"


PLACES = [
    *("config.json", "data.json", "metrics.jsonl", "lock", "tokenizer/tokenizer.json", "tokenizer/characters.txt"),
    *("checkpoints", "tokenizer", "tensorboard", "wandb", "checkpoints/10", "checkpoints/10/params/d"),
]


@pytest.mark.parametrize("flag", [[], ["--overwrite"]], ids=["going on", "starting over"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "the other kind"])
@pytest.mark.parametrize("name", PLACES)
def test_nothing_is_written_through_what_a_stranger_put_into_a_run(done, name, kind, flag):
    place, elsewhere = done / name, done.with_name("elsewhere")
    folder = place.is_dir() or name in ("tensorboard", "wandb")
    if kind == "the other kind" and name == "checkpoints/10/params/d":
        return  # a file is as good there
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    if kind == "link" and folder:
        elsewhere.mkdir()
    elif kind == "link":
        elsewhere.write_text("precious")
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "the other kind" and folder:
        place.touch()
    elif kind == "the other kind":
        place.mkdir()
    else:
        place.symlink_to(elsewhere)
    before = content(elsewhere) if folder else elsewhere.exists() and elsewhere.read_text()
    with pytest.raises(UserError, match=re.escape(str(Path("done", name)))):
        attempt("--run-dir", "done", *flag)
    assert (content(elsewhere) if folder else elsewhere.exists() and elsewhere.read_text()) == before
    assert os.path.lexists(place)


def test_a_run_directory_may_be_a_link(done):
    done.rename(done.with_name("disk"))
    done.symlink_to("disk")
    attempt("--run-dir", "done")
    attempt("--run-dir", "done", "--overwrite", then=save)
    assert done.is_symlink()
    assert [p.name for p in (done / "checkpoints").iterdir()] == ["5"]


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_start_that_fails_takes_away_what_it_made_and_nothing_else(done, error):
    mine = done.with_name("mine")
    mine.mkdir()
    with pytest.raises(type(error)):
        attempt("--run-dir", "mine", then=fail(error))
    assert list(mine.iterdir()) == []

    def meanwhile(run: Path) -> None:
        (run / "notes.txt").write_text("mine")
        raise error

    with pytest.raises(type(error)):
        attempt("--run-dir", "a/b/c", then=meanwhile)
    assert content(done.with_name("a")) == {"b/c/notes.txt": b"mine"}
    shutil.rmtree(done.with_name("a"))
    with pytest.raises(type(error)):
        attempt("--run-dir", "a/b/c", then=fail(error))
    assert not done.with_name("a").exists()


def save(run: Path) -> None:
    """A checkpoint that is only a folder."""
    (run / "checkpoints/5/params").mkdir(parents=True)


def test_a_run_is_overwritten_when_the_new_one_has_a_checkpoint_and_not_before(done, capsys):
    before = content(done)
    with pytest.raises(UserError, match="no such mesh"):
        attempt("--run-dir", "done", "--overwrite", "--train.seed", "7", then=fail(UserError("no such mesh")))
    assert content(done) == before
    assert (done / "checkpoints/10/params").is_dir()
    assert capsys.readouterr().err == ""
    attempt("--run-dir", "done", "--overwrite", "--train.seed", "7", begin=True)
    assert content(done) == before
    assert capsys.readouterr().err == "note: no checkpoint was made, so the run before is back in done\n"
    attempt("--run-dir", "done", "--overwrite", "--train.seed", "7", then=save)
    assert config.read_json(done / "config.json").train.seed == 7
    assert [p.name for p in (done / "checkpoints").iterdir()] == ["5"]
    assert not [p for p in done.iterdir() if p.name.startswith(".")]


def test_a_runs_id_in_wandb_is_its_path_below_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = {"runs/a": "a", "mine": "mine", "runs/s/lr=0.02,seed=1": "s-lr=0.02,seed=1", "runs/x/runs/t/b:c#": "t-b-c-"}
    assert {run: wandb_id(Path(run)) for run in ids} == ids


def test_of_two_runs_without_a_checkpoint_the_later_one_stays(done, capsys):
    """A run that diverges before its first checkpoint is to be replayed: not the one that diverged there earlier."""
    offered = []

    def diverges(run: Path) -> None:
        with MetricsLog(run, config.Config().train, 0) as log:
            log.write(2, {"diverged": 1.0})
        offered.append(run_dir.how_to_replay(run, config.Config()))
        raise UserError("step 2: the loss is nan")

    for rate in ("5.0", "7.0"):
        with pytest.raises(UserError, match="the loss is nan"):
            attempt("--run-dir", "wild", "--optim.learning-rate", rate, then=diverges)
        assert config.read_json(Path("wild/config.json")).optim.learning_rate == float(rate)
        assert read_metrics(Path("wild/metrics.jsonl")) == [{"step": 2, "diverged": 1.0}]
    assert offered == ["nanogpt-jax replay wild"] * 2
    assert capsys.readouterr().err == "note: wild has no checkpoint to go on from, so it starts over\n"
    with pytest.raises(UserError, match="no such mesh"):  # one that has not even begun brings it back
        attempt("--run-dir", "wild", "--optim.learning-rate", "9", then=fail(UserError("no such mesh")))
    assert config.read_json(Path("wild/config.json")).optim.learning_rate == 7
    assert not [p for p in Path("wild").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("moves", range(7))
def test_a_start_killed_while_it_overwrites_is_taken_back_by_the_next(done, moves, monkeypatch):
    """`moves`: renames that the killed process had made; what it would have done on its way out is left undone."""
    before, rename = content(done), os.rename

    def killed(*names):
        nonlocal moves
        moves -= 1
        if moves < 0:
            raise SystemExit
        rename(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        patch.setattr(run_dir, "_settle", lambda *_, **__: None)
        with contextlib.suppress(SystemExit):
            attempt("--run-dir", "done", "--overwrite", "--train.seed", "7")
    (done / "tokenizer").mkdir(exist_ok=True)
    (done / "tokenizer/.characters.txt.0123456789ab.tmp").touch()
    with pytest.raises(UserError, match="with other settings"):
        attempt("--run-dir", "done", "--train.seed", "8")
    assert content(done) == before
    assert (done / "checkpoints/10/params").is_dir()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.tensorboard", "true"], "needs pip install 'nanogpt-jax[tensorboard]'"),
        (["--train.wandb", "true"], "needs pip install 'nanogpt-jax[wandb]'"),
        (["--init-from", "done"], "--overwrite would delete train.init_from=done"),
        (["--init-from", "./done/../done"], "--overwrite would delete train.init_from="),
    ],
)
def test_what_cannot_be_is_known_before_a_run_is_touched(done, flags, words, monkeypatch):
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    before = content(done)
    with pytest.raises(UserError, match=re.escape(words)):
        attempt("--run-dir", "done", "--overwrite", *flags)
    assert content(done) == before


@pytest.mark.parametrize("writes", range(4))
def test_a_disk_that_is_full_at_the_start_leaves_nothing_begun(done, writes, monkeypatch):
    sync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal writes
        writes -= 1
        if writes < 0:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            attempt("--run-dir", "new/run")
    assert not done.with_name("new").exists()
    attempt("--run-dir", "new/run", begin=True)


def test_a_disk_that_fills_up_while_training_stops_it_with_a_word_about_the_last_checkpoint(done, monkeypatch):
    cfg = config.Config().train
    with MetricsLog(done, cfg, 10) as log:
        log.write(11, {"train/loss": 1.0, "perplexity": math.inf})
        with monkeypatch.context() as patch:
            taken = iter([3])  # what a disk takes that is about to be full
            patch.setattr(os, "write", lambda *_: next(taken, None) or fail(OSError(28, os.strerror(28)))(done))
            with pytest.raises(UserError, match=r"No space left on device(.|\n)*goes on from checkpoint 10"):
                log.write(12, {"train/loss": 1.0})
    assert read_metrics(done / "metrics.jsonl")[-1] == {"step": 11, "train/loss": 1.0, "perplexity": None}


@pytest.mark.parametrize("folder", ["done", "tokenizer", "checkpoints"])
def test_a_folder_that_cannot_be_written_is_known_at_the_start(done, folder, monkeypatch):
    def refuse(path: Path) -> None:
        if path.parent.name == folder:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "check_writable", refuse)
    with pytest.raises(UserError, match=rf"cannot write in .*{folder}: Permission denied"):
        attempt("--run-dir", "done")


def test_leftovers_of_killed_processes_are_taken_away(done):
    left = [".config.json.0123456789ab.tmp", "config.json.tmp", "metrics.tmp", "tokenizer/.characters.txt.01234567.tmp"]
    for name in left:
        (done / name).touch()
    (done / "checkpoints/20.orbax-checkpoint-tmp/params").mkdir(parents=True)
    kept = done / "notes.tmp"
    kept.touch()
    attempt("--run-dir", "done")
    assert not [name for name in left if (done / name).exists()]
    assert [p.name for p in (done / "checkpoints").iterdir()] == ["10"]
    assert kept.exists()


def test_changed_text_is_refused_on_resume(done):
    with pytest.raises(UserError, match="the data of done has changed"):
        attempt("--run-dir", "done", data=SimpleNamespace(**{**vars(DATA), "fingerprint": "abd"}))


def test_the_same_text_in_another_place_is_the_same_data(done, capsys):
    attempt("--run-dir", "done", "--data.source", "./text.txt")
    assert "note: data.source=text.txt is ./text.txt now" in capsys.readouterr().err
    assert config.read_json(done / "config.json").data.source == "./text.txt"
    attempt("--run-dir", "done", "--data.mixture", "a.txt=1,b.txt=2", "--data.source", config.DataConfig.source)
    with pytest.raises(UserError, match=r"data.source: python-docs in the run, other.txt now"):
        attempt(
            "--run-dir", "done", "--data.source", "other.txt", data=SimpleNamespace(**{**vars(DATA), "fingerprint": 1})
        )


@pytest.mark.parametrize("name", ["n" * 300, "a/" + "n" * 300, "n/" * 2500, "text.txt/run"])
@pytest.mark.parametrize("flag", ["--run-dir", "--init-from"])
def test_a_name_that_no_file_system_takes_is_an_error(done, flag, name):
    done.with_name("text.txt").touch()
    with pytest.raises(UserError):
        attempt(flag, name)


def test_a_name_that_is_no_text(done):
    """A source may have it. A run directory may not: orbax could save no checkpoint."""
    odd = os.fsdecode(b"odd \xff")
    attempt("--run-dir", "new", "--data.source", odd, begin=True)
    assert config.read_json(Path("new/config.json")).data.source == odd
    with pytest.raises(UserError, match="not UTF-8"):
        attempt("--run-dir", odd)
    assert not os.path.lexists(odd)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        ("[]", "holds no settings"),
        ("{", "is damaged"),
        (b"\xff", "is damaged"),
        (os.mkfifo, "it is a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a link"),
    ],
)
def test_a_configuration_that_is_none_is_refused_by_name(done, content, words):
    path = done / "config.json"
    path.unlink()
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"done/config.json.*{words}"):
        config.read_json(path)
    with pytest.raises(UserError, match=r"done/config\.json"):
        attempt("--run-dir", "done")


def test_commands_that_are_printed_can_be_typed(monkeypatch):
    argv = ["--run-dir", "my run", "--resume", "must", "--overwrite", "--data.source=a'b", "--train.steps", "5"]
    again = shlex.split(config.command_again(argv, steps=10))
    assert again[-5:] == ["--run-dir", "my run", "--data.source=a'b", "--train.steps", "10"]
    monkeypatch.setattr(sys, "argv", ["/my tools/sample.py", "my run", "--checkpoint", "10", "--top-k=5"])
    typed = shlex.split(command_line.typed_again(("--checkpoint",), "--checkpoint=5"))
    assert typed == ["python", "/my tools/sample.py", "my run", "--top-k=5", "--checkpoint=5"]
    assert shlex.split(config.program("train")) == ["python", "/my tools/train.py"]
    monkeypatch.setattr(sys, "argv", ["nanogpt-jax", "classify", "predict", "r", "--", "--checkpoint", "5"])
    assert config.quoted(os.fsdecode(b"fo\xff'")) == r"$'fo\xff\x27'"
    typed = shlex.split(command_line.typed_again(("--checkpoint",), "--checkpoint=5"))
    assert typed[3:] == ["r", "--checkpoint=5", "--", "--checkpoint", "5"]
    assert shlex.split(config.word(Path("-x"))) == ["./-x"]


def test_the_newest_run_is_one_that_has_learned(tmp_path):
    for name, step, saved in [("old", 5, 1), ("new", 5, 2), ("stopped", 0, 3), (".new.0123456789ab.tmp", 5, 4)]:
        (tmp_path / name / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(config.to_json(config.Config()))
        os.utime(tmp_path / name / "checkpoints" / str(step), (saved, saved))
    (tmp_path / "old" / "checkpoints" / "try").touch()  # a start that is refused tries whether it could write
    assert newest(tmp_path).name == "new"
    (tmp_path / "stopped" / IMPORTED).touch()  # all of an imported model's steps were made elsewhere
    assert newest(tmp_path).name == "stopped"
    shutil.rmtree(tmp_path / "old")
    shutil.rmtree(tmp_path / "new")
    (tmp_path / "stopped" / IMPORTED).unlink()
    assert newest(tmp_path).name == "stopped"


def test_sample_without_an_argument_takes_the_newest_run(place, go):
    result = go("sample", "--prompt", "El gato", "--max-new-tokens", "9")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == len("El gato") + 9 + 1
    assert result.stdout.startswith("El gato")
