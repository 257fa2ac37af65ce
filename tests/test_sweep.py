"""nanogpt-jax sweep: ranges, members that are runs, what is missing and only that, honest words."""

import csv
import dataclasses
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import jax
import pytest
from helpers import interrupt_at, looked_at, numbers, refused
from test_architecture import PACKAGE

from nanogpt_jax import cli, config
from nanogpt_jax.commands import sweep as command
from nanogpt_jax.config import UserError
from nanogpt_jax.data import batches
from nanogpt_jax.host.progress import Progress
from nanogpt_jax.host.signals import StopRequest
from nanogpt_jax.inference import sampler
from nanogpt_jax.run.opened import open_run
from nanogpt_jax.run.places import checkpoint_steps
from nanogpt_jax.sweeping import conduct, faster, halve, in_turn, members, ranges, record, results, together
from nanogpt_jax.sweeping.faster import Verdict
from nanogpt_jax.sweeping.results import Figure, Row
from nanogpt_jax.training.loop import Diverged, Outcome, not_finite

TEXT = "El gato negro persigue al ratón gris; el ratón huye del gato. " * 60
TINY = (
    "--data.source=text.txt --model.n-layer=1 --model.n-head=2 --model.n-embd=16 --model.block-size=16 "
    "--train.batch-size=3 --train.steps=16 --train.eval-every=16 --train.save-every=4 --optim.warmup-steps=4 "
    "--optim.name=sgd"
).split()
RATES = "--over=optim.learning-rate=1e-3,1e-2"
NATS = Figure("val/loss", "nats a token")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


class Training:
    """In place of training: a run directory with a loss of our choice; or a divergence, a kill, a signal."""

    def __init__(self):
        self.trained: list[str] = []
        self.diverge: set[str] = set()
        self.killed_at: int | None = None  # members, after which the process ends without a word

    def __call__(self, one: in_turn.Ready, stop, steps, part) -> Outcome:
        if len(self.trained) == self.killed_at:
            raise MemoryError("killed")
        name, steps = one.member.name, one.cfg.train.steps
        self.trained.append(name)
        if any(part in name for part in self.diverge):
            raise Diverged("step 3: the loss is nan; the run stops here, and this is not saved")
        directory = one.member.command.run_dir
        (directory / "checkpoints" / str(steps)).mkdir(parents=True)
        (directory / "config.json").write_text(config.to_json(one.cfg))
        (directory / "data.json").write_text(json.dumps({"fingerprint": one.data.fingerprint}))
        row = {"step": steps, "val/loss": loss_of(one.cfg), "val/bits_per_byte": loss_of(one.cfg) * 1.5}
        (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return Outcome(steps, 0.1, None, {})


def loss_of(cfg) -> float:
    """Least at a learning rate of 0.01, lower with more steps, and one constant a seed, larger than what rates do."""
    return abs(cfg.optim.learning_rate - 0.01) + 4 / cfg.train.steps + (cfg.train.seed % 7) / 3 + 1


class Only:
    """Training itself, which notes its members."""

    def __init__(self):
        self.trained, self._train = [], in_turn._train

    def __call__(self, one: in_turn.Ready, stop, steps, part) -> Outcome:
        self.trained.append(one.member.name)
        return self._train(one, stop, steps, part)


@pytest.fixture
def training(monkeypatch) -> Training:
    fake = Training()
    monkeypatch.setattr(in_turn, "_train", fake)
    monkeypatch.setattr(together, "_size", lambda group, steps: 1)
    return fake


def tiny(*words: str) -> list[str]:
    """A command line of these words, and of TINY's settings that they do not name."""
    return [*(word for word in TINY if word.strip("-").partition("=")[0] not in " ".join(words)), *words]


def swept(capsys, *words: str) -> str:
    """The command, in this process -> what it prints."""
    assert command.main(tiny(*words)) == 0
    return capsys.readouterr().out


def lines_of(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))


# ---- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optim.learning-rate=1e-2,2e-2", (0.01, 0.02)),
        ("optim.learning_rate=log:1e-3:1e-1:5", (0.001, 0.003162, 0.01, 0.03162, 0.1)),
        ("model.dropout=lin:0:0.3:4", (0.0, 0.1, 0.2, 0.3)),
        ("model.n_layer=log:1:8:4", (1, 2, 4, 8)),
        ("optim.name=adamw, muon", ("adamw", "muon")),
        ("model.bias=true,false", (True, False)),
        ("data.source=a,b;c", ("a,b", "c")),
        ("data.mixture=A=3,B=1;A=1,B=1", ({"A": 3.0, "B": 1.0}, {"A": 1.0, "B": 1.0})),
        ("train.init_from=log:x", ("log:x",)),  # a text is no range
    ],
)
def test_values_of_a_range(text, values):
    (one,) = ranges.read([text])
    assert one.values == values
    assert [type(value) for value in one.values] == [type(value) for value in values]


def test_the_grid_and_a_sample_of_it():
    asked = ranges.read(["optim.learning_rate=1,2,3", "model.n_layer=1,2"])
    grid = ranges.grid(asked, None)
    assert [tuple(each.values()) for each in grid] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    some = ranges.grid(asked, 3)
    assert some == ranges.grid(asked, 3)
    assert [each for each in grid if each in some] == some
    huge = ranges.read([f"optim.{key}=log:1e-3:1e-1:1000" for key in ("learning_rate", "weight_decay", "beta1")])
    assert len(ranges.grid(huge, 5)) == 5  # a billion combinations are not written down


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a sweep needs --over NAME=VALUES"),
        (["--over", "optim.learning_rat=1,2"], "unknown setting optim.learning_rat (--over)\n       did you mean"),
        (["--over", "learning_rate=1,2"], "did you mean optim.learning_rate?"),
        (["--over", "optim.learning_rate"], "--over=optim.learning_rate has no values"),
        (["--over", "optim.learning_rate="], "has an empty value"),
        (["--over", "optim.learning_rate=1e-2,,1"], "has an empty value"),
        (["--over", "optim.learning_rate=fast"], "optim.learning_rate='fast' must be a finite number"),
        (["--over", "model.n_layer=1,1.5"], "model.n_layer='1.5' must be a whole number"),
        (["--over", "optim.name=adam"], "is not one of adamw, lion, muon, sgd"),
        (["--over", "optim.learning_rate=log:1e-3:1e-1"], "needs a start, an end and how many values"),
        (["--over", "optim.learning_rate=log:1e-3::7"], "needs a start, an end and how many values"),
        (["--over", "optim.learning_rate=1e-3:1e-1:7"], "needs a start, an end and how many values"),
        (["--over", "optim.learning_rate=log:1e-3:x:7"], "FROM and TO must be numbers, and N a whole number"),
        (["--over", "optim.learning_rate=log:1e-1:1e-3:7"], "FROM must be below TO"),
        (["--over", "optim.learning_rate=lin:0:inf:7"], "both finite"),
        (["--over", "optim.learning_rate=log:0:1:7"], "with log:, FROM must be above 0"),
        (["--over", "optim.learning_rate=log:1:2:1"], "N must lie in 2 to 1000"),
        (["--over", "optim.learning_rate=1e-2,0.01"], "has 0.01 twice; give it once"),
        (["--over", "model.n_layer=lin:1:2:5"], "twice; it is a whole number: ask for fewer values"),
        ([RATES, "--over=optim.learning_rate=3"], "--over optim.learning_rate was given twice"),
        ([RATES, "--optim.learning-rate=3"], "and --over optim.learning_rate exclude each other"),
        ([RATES, "--seeds=0"], "--seeds=0 must lie in 1 to 1000"),
        ([RATES, "--seeds=2", "--over=train.seed=1,2"], "--seeds=2 and --over train.seed exclude each other"),
        ([RATES, "--sample=3"], "--sample=3 exceeds the 2 combinations"),
        (["--over", "optim.beta1=lin:0:0.9:1000", "--over", "optim.beta2=lin:0:0.9:11"], "at most 10,000"),
        ([RATES, "--halve"], "--halve needs 3 configurations or more, but --over gives 2"),
        (["--over=optim.learning-rate=1e-2", "--confirm=3"], "--confirm=3 compares the best two"),
        ([RATES, "--confirm=0"], "--confirm=0 must be at least 1"),
        ([RATES, "--name=a/b"], "--name=a/b must be the name of a directory in runs/"),
        ([RATES, "--train.steps=x"], "train.steps='x' must be a whole number (command line)"),
        ([RATES, "--mesh.processes=auto"], "a sweep runs in one process"),
        (["--over=mesh.process_id=0,1"], "a sweep runs in one process"),
        ([RATES, "--overr=1"], "did you mean --over?"),
        ([RATES, "--together=yes"], "--together=yes is not one of auto, on, off"),
        ([RATES, "nowhere.toml"], "no config file nowhere.toml"),
        ([RATES, "a.toml", "b.toml"], "one config file at a time"),
        ([RATES, "--train.init-from=nowhere"], "train.init_from=nowhere is not a run directory"),
        (["--over=train.init-from=scratch,gone"], "gone,seed=1337: nothing was trained"),
        (["--over=model.n-head=2,3"], "in the member n_head=3,seed=1337: nothing was trained"),
        (["--over=model.block-size=16,9999"], "in the member block_size=9999,seed=1337: nothing was trained"),
        (["--over=mesh.data=1,16"], "in the member data=16,seed=1337: nothing was trained"),
        (["--over=data.source=text.txt,gone.txt"], "in the member source=gone.txt,seed=1337: nothing was trained"),
        (["--over=optim.learning-rate=1,2,3", "--halve"], "train.steps=16 is too short for --halve"),
    ],
)
def test_wrong_input(words, said, capsys, training):
    refused(command.main, tiny(*words), capsys, said)
    assert not training.trained
    assert not Path("runs").exists()


def test_a_fault_of_all_members_is_told_as_train_would(capsys):
    refused(command.main, [*TINY, RATES, "--optim.beta1=2"], capsys, "optim.beta1=2.0")
    with pytest.raises(UserError) as told:
        command.read([*TINY, RATES, "--optim.beta1=2"])
    assert "in the member" not in str(told.value)


def test_names_are_tame_and_different():
    values = ["a/b", "a-b", "x" * 100, "x" * 101, "../..", "ñ"]
    names = [members.name_of({"data.source": value}, 1) for value in values]
    assert len(set(names)) == len(values)
    assert all(re.fullmatch(r"[A-Za-z0-9.,=+_-]{1,150}", name) and not name.startswith(".") for name in names)
    many = {f"optim.{i}": "y" * 30 for i in range(9)}
    assert len(members.name_of(many, 1)) == 150
    assert members.name_of(many, 1) != members.name_of(many, 2)
    assert members.name_of({"model.x": 1, "optim.x": 2}, 3, 4) == "model.x=1,optim.x=2,seed=3,1of4"


# ---- members are runs ------------------------------------------------------------------------------------------------


def test_members_are_runs_equal_to_those_made_alone_bit_for_bit_and_a_signal_loses_nothing(capsys, monkeypatch):
    asked = [RATES, "--seeds=1", "--name=s", "--together=off"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, batches, 4)
        assert command.main([*TINY, *asked]) == 130
    out = capsys.readouterr().out
    first, second = (Path(f"runs/s/learning_rate={rate},seed=1337") for rate in ("0.001", "0.01"))
    assert re.search(rf"^SIGINT: saved step \d+ of 16 in {re.escape(str(first))}$", out, re.M)
    assert "0 of 2 members are done\ngo on with the same command: nanogpt-jax sweep --data.source" in out
    assert not second.exists()
    assert not Path("runs/s/best.toml").exists()

    # an ordinary run, so train.py goes on with it; what it has finished, the sweep only reads
    monkeypatch.setattr(sampler, "opening_and_continuation", lambda *_, **__: "")  # takes longer than the training
    train = cli.door("train").main
    assert train(tiny("--optim.learning-rate=1e-3", f"--run-dir={first}")) == 0
    assert f"going on in {first} from step" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(in_turn, "_train", only := Only())
        table = swept(capsys, *asked)
    assert only.trained == [second.name]
    assert "no clear winner: learning_rate=0.01 is ahead of learning_rate=0.001 by" in table
    assert "with one seed, which says nothing of chance" in table
    assert train(tiny("--optim.learning-rate=1e-2", "--run-dir=alone")) == 0
    assert numbers(second) == numbers("alone")
    final = next(row["val/loss"] for row in numbers(second) if row["step"] == 16 and "val/loss" in row)
    assert lines_of("runs/s/sweep.csv")[0]["seed_1337"] == str(final)
    assert open_run(second).load()[1] in checkpoint_steps(second)  # as sample.py, eval and report do
    best = config.load(["runs/s/best.toml"]).cfg
    assert best == config.load(tiny("--optim.learning-rate=1e-2")).cfg


def test_members_that_differ_in_numbers_share_what_is_compiled(capsys, monkeypatch):
    """Nothing is compiled for the second and the third."""
    compiled: list[int] = [0]
    heard = lambda event, _, **__: compiled.__setitem__(-1, compiled[-1] + event.endswith("backend_compile_duration"))  # noqa: E731
    before = in_turn._train
    monkeypatch.setattr(in_turn, "_train", lambda *args: (compiled.append(0), before(*args))[1])
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        over = ("--over", "optim.learning-rate=1e-2,2e-2,3e-2", "--optim.schedule=wsd", "--model.dropout=0.1")
        swept(capsys, *over, "--seeds=1", "--over", "optim.beta2=0.9", "--together=off")
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert compiled[1] > 3
    assert compiled[2:] == [0, 0]


# ---- together --------------------------------------------------------------------------------------------------------

GROUP = ["--over=optim.learning-rate=1e-3,1e-2", "--seeds=2", "--model.dropout=0.1", "--optim.name=adamw"]
ROUNDING = 2e-5  # relative: float32 sums in another order, over 16 steps


def losses(path: str | Path) -> list[float]:
    return [value for row in numbers(path) for name, value in row.items() if name.endswith("loss")]


def by_name(sweep: str) -> dict[str, Path]:
    return {path.name: path for path in Path("runs", sweep).iterdir() if path.is_dir()}


@pytest.fixture
def on_devices(monkeypatch):
    """The tests' eight devices; given a number, only so many."""
    every = jax.devices()
    return lambda n: monkeypatch.setattr(jax, "devices", lambda: every[:n])


@pytest.mark.long
def test_members_trained_together_equal_those_in_turn_to_rounding_on_one_device_and_split_over_two(
    capsys, monkeypatch, on_devices
):
    swept(capsys, *GROUP, "--name=turn", "--together=off")
    for n in (1, 2):
        on_devices(n)
        out = command.main(tiny(*GROUP, f"--name=at{n}", "--together=on"))
        assert out == 0
        err = capsys.readouterr().err
        assert "members 1 to 4 of 4: " in err
        assert re.search(r"^members 1 to 4 of 4, step \d+/16  learning_rate=0.0\d*,seed=133\d: loss ", err, re.M)
        assert set(json.loads(Path(f"runs/at{n}/sweep.json").read_text())["together"].values()) == {4}
        assert sorted(by_name(f"at{n}")) == sorted(by_name("turn"))
        for name, run in by_name("turn").items():
            mine = Path(f"runs/at{n}") / name
            assert [row["step"] for row in numbers(mine)] == [row["step"] for row in numbers(run)]
            assert losses(mine) == pytest.approx(losses(run), rel=ROUNDING)
            assert checkpoint_steps(mine) == checkpoint_steps(run)
            assert (mine / "config.json").read_text() == (run / "config.json").read_text()
    # an ordinary run, which train.py goes on with
    monkeypatch.setattr(sampler, "opening_and_continuation", lambda *_, **__: "")
    run = "runs/at2/learning_rate=0.01,seed=1338"
    flags = [f"--{word}" for word in ("optim.learning-rate=1e-2", "train.seed=1338", f"run-dir={run}")]
    assert cli.door("train").main(tiny(*flags, *GROUP[2:], "--train.steps=20")) == 0
    assert f"going on in {run} from step 16" in capsys.readouterr().out


@pytest.mark.long
def test_a_group_survives_a_member_that_diverges_and_a_signal_and_goes_on_where_all_stand(capsys, monkeypatch):
    asked = ["--over=optim.learning-rate=1e-2,1e30", "--seeds=2", "--optim.grad-clip=0", "--together=on", "--name=s"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, batches, 4 * 3 + 1)  # each member asks for the batches of two calls ahead
        assert command.main(tiny(*asked)) == 130
    out = capsys.readouterr().out
    (step,) = set(re.findall(r"^SIGINT: saved step (\d+) of 16 in runs/s/learning_rate=0.01,seed=133[78]$", out, re.M))
    assert 0 < int(step) < 16
    assert out.count("SIGINT: saved step") == 2
    assert "2 of 4 members are done" in out
    assert command.main(tiny(*asked)) == 0
    out, err = capsys.readouterr()
    assert "members 3 to 4 of 4: " in err
    assert "4 members were trained together, in one program; runs/s/sweep.json names them" in out
    assert re.search(r"^1e\+30 +0 +diverged +diverged$", out, re.M)
    swept(capsys, *asked[:3], "--name=turn", "--together=off")
    for name, run in by_name("turn").items():
        if "0.01" in name:
            assert losses(Path("runs/s") / name) == pytest.approx(losses(run), rel=ROUNDING)


def test_words_in_the_bar_of_a_group_say_whose_they_are(capsys):
    with Progress("step", 20, patience=0) as bar:
        together._Named(bar, "seed=1").update(10, "loss 4.9810")
    assert "step 10/20  seed=1: loss 4.9810  left" in capsys.readouterr().err


def test_members_are_grouped_if_they_share_a_program_and_stand_at_the_same_step(capsys):
    sweep = command.read(tiny("--over=optim.name=adamw,sgd", "--over=optim.beta1=0.8,0.9", "--seeds=2"))
    ready = in_turn.ready(sweep.members(sweep.configurations, sweep.seeds), {})
    assert [len(group) for group in together._groups(ready)] == [4, 4]
    (ready[0].member.command.run_dir / "checkpoints/8").mkdir(parents=True)
    assert [len(group) for group in together._groups(ready)] == [1, 3, 4]
    (ready[1].member.command.run_dir / "checkpoints/16").mkdir(parents=True)
    (ready[2].member.command.run_dir / "checkpoints/16").mkdir(parents=True)
    assert [len(group) for group in together._groups(ready)] == [1, 1, 1, 1, 4]  # nothing is left of two


def test_the_faster_way_is_said_taken_and_remembered(capsys, monkeypatch, on_devices):
    trained = []
    monkeypatch.setattr(together, "_train", lambda group, *_: trained.append(len(group)) or iter(()))
    monkeypatch.setattr(in_turn, "_train", lambda one, *_: trained.append(1) or Outcome(16, 0.1, None, {}))
    sweep = command.read(tiny(*GROUP))
    ready = in_turn.ready(sweep.members(sweep.configurations, sweep.seeds), {})
    for name, times, taken in [
        ("slower", (0.027, 0.0226), "in turn"),
        ("as fast", (0.0226, 0.0226), "in turn"),  # which is exact
        ("faster", (0.020, 0.0226), "together"),
    ]:
        kept = record.Record(Path("runs"), {})
        monkeypatch.setattr(faster, "measure", lambda *_, times=times: Verdict(4, [times], second=False))
        Path("runs").mkdir(exist_ok=True)
        for _ in range(2):  # the second time by the record
            trained.clear()
            list(together.train_members(ready, StopRequest(), lambda _: None, {}, kept, "auto"))
            assert trained == ([4] if taken == "together" else [1] * 4), name
            monkeypatch.setattr(faster, "measure", None)
        told = capsys.readouterr().err
        assert told.count("4 members together: ") == 1
        assert told.endswith(f"ms a member-step, in turn 22.6: {taken}\n")
    # a long run in turn gets a second program, and 0.95 of the better is enough
    assert not Verdict(4, [(0.020, 0.0226)], second=True).is_together
    assert not Verdict(4, [(0.0216, 0.0226)], second=False).is_together


@pytest.mark.long
def test_a_trial_is_made_if_the_work_is_long_and_leaves_nothing(capsys, on_devices):
    sweep, steps, nobody = command.read(tiny(*GROUP)), {}, StopRequest()
    one = in_turn.ready(sweep.members(sweep.configurations, sweep.seeds), {})[0]
    on_devices(2)
    assert faster.measure(one, 4, nobody, steps, work=100) is None
    found = faster.measure(one, 4, nobody, steps)
    assert found is not None
    assert 0 < found.together < 10
    assert len(found.rounds) == faster.ROUNDS - 1
    nobody.received = signal.SIGINT
    assert faster.measure(one, 4, nobody, steps) is None
    assert not Path("runs").exists()


def test_a_group_is_as_large_as_memory_holds(capsys, monkeypatch, on_devices):
    sweep = command.read(tiny("--over=train.seed=lin:1:40:40"))
    ready = in_turn.ready(sweep.members(sweep.configurations, sweep.seeds), {})
    for n, rooms, expected in [(1, 100, 20), (1, 7, 7), (1, 1, 1), (2, 5, 10), (8, 1, 8), (8, 0.5, 1)]:
        on_devices(n)
        monkeypatch.setattr(together.memory, "needed", lambda *_: 1.0)
        monkeypatch.setattr(together, "room", lambda mesh, rooms=rooms: rooms)
        assert together._size(ready, {}) == expected, (n, rooms)


def test_a_member_that_was_trained_further_has_the_figure_of_its_own_last_step(capsys, training):
    table = swept(capsys, RATES, "--seeds=1", "--name=s")
    run = Path("runs/s/learning_rate=0.01,seed=1337")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 32, "val/loss": 0.1}\n')
    os.rename(run / "checkpoints/16", run / "checkpoints/32")
    assert swept(capsys, RATES, "--seeds=1", "--name=s") == table


def test_the_shared_settings_may_stand_in_a_file_and_the_seeds_follow_it(capsys, training):
    Path("mine.toml").write_text("[train]\nseed = 5\nsteps = 8\n[optim]\nlearning_rate = 9.0\n")
    assert command.main(["mine.toml", *TINY[:6], RATES, "--seeds=2"]) == 0
    assert "seed 5  seed 6" in capsys.readouterr().out
    assert Path("runs/mine-sweep/learning_rate=0.01,seed=6").is_dir()
    assert config.load(["runs/mine-sweep/best.toml"]).cfg.train.seed == 5


# ---- only what is missing --------------------------------------------------------------------------------------------


def test_after_a_kill_only_what_is_missing_is_trained_and_the_table_is_the_same(capsys, training):
    asked = ["--over=optim.learning-rate=1e-3,1e-2,1e30", "--seeds=2", "--confirm=2"]
    training.diverge = {"1e+30"}
    whole = swept(capsys, *asked, "--name=whole")
    n = len(training.trained)
    assert n == 3 * 2 + 2 * 2
    for at in (0, 3, 5, 6, 9):  # within the sweep, and within its confirmation
        training.trained, training.killed_at = [], at
        with pytest.raises(MemoryError):
            swept(capsys, *asked, f"--name=k{at}")
        training.killed_at = None
        before = list(training.trained)
        assert swept(capsys, *asked, f"--name=k{at}").replace(f"k{at}", "whole") == whole
        assert len(set(training.trained)) == len(training.trained) == n
        assert training.trained[:at] == before
        for name in ("sweep.csv", "best.toml", "sweep.json"):
            mine, theirs = (Path(f"runs/{folder}/{name}").read_text() for folder in (f"k{at}", "whole"))
            assert mine.replace(f"k{at}", "whole") == theirs
    training.trained = []
    assert swept(capsys, *asked, "--name=whole") == whole
    assert training.trained == []


def test_a_run_without_its_last_checkpoint_is_missing(capsys, training):
    """Its last loss is written before its last checkpoint, and a kill may come between."""
    run = "runs/s/learning_rate=0.01,seed=1337"
    swept(capsys, RATES, "--seeds=1", "--name=s")
    os.rename(f"{run}/checkpoints/16", f"{run}/checkpoints/12")
    training.trained = []
    swept(capsys, RATES, "--seeds=1", "--name=s")
    assert training.trained == ["learning_rate=0.01,seed=1337"]


def test_a_member_that_diverges_is_a_row_and_ranked_last(capsys, training):
    training.diverge = {"0.01,seed=1338"}
    out = swept(capsys, RATES, "--seeds=2", "--name=s")
    assert re.search(r"^0.01 +\d\.\d{4} +1 +\d\.\d{4} +diverged$", out, re.M)
    assert "best: learning_rate=0.001, since 1 of 2 of learning_rate=0.01 diverged" in out
    assert json.loads(Path("runs/s/sweep.json").read_text())["diverged"] == {
        "learning_rate=0.01,seed=1338": "step 3: the loss is nan"
    }
    assert isinstance(not_finite(config.Config(), 0, 3, [], "the loss is nan"), Diverged)  # what training raises
    training.diverge = {"rate"}
    out = swept(capsys, RATES, "--seeds=1", "--name=t")
    assert "no member has reached its last step" in out
    assert not Path("runs/t/best.toml").exists()


@pytest.mark.slow
def test_a_real_divergence_is_a_row(capsys):
    out = swept(capsys, "--over=optim.learning-rate=1e30", "--optim.name=sgd", "--optim.grad-clip=0", "--seeds=1")
    assert re.search(r"^1e\+30 +0 +diverged$", out, re.M)


def test_more_seeds_are_the_same_sweep_and_anything_else_is_another(capsys, training):
    swept(capsys, RATES, "--seeds=2", "--name=s")
    training.trained = []
    swept(capsys, RATES, "--seeds=3", "--name=s", "--train.log-every=3")  # that changes no loss
    assert training.trained == ["learning_rate=0.001,seed=1339", "learning_rate=0.01,seed=1339"]
    for words, said in [
        ([RATES, "--seeds=2"], "seeds: 1337,1338,1339 there, 1337,1338 now"),
        ([RATES, "--seeds=3", "--train.seed=1"], "seeds: 1337,1338,1339 there, 1,2,3 now"),
        ([RATES, "--seeds=3", "--optim.beta1=0.8"], "optim.beta1: 0.9 there, 0.8 now"),
        ([RATES + ",3", "--seeds=3"], "--over optim.learning_rate: 0.001,0.01 there, 0.001,0.01,3.0 now"),
        ([RATES, "--seeds=3", "--over=optim.beta1=0.8"], "--over optim.beta1: not given there, 0.8 now"),
        ([RATES, "--seeds=3", "--sample=1"], "--sample: not given there, 1 now"),
    ]:
        told = refused(command.main, tiny(*words, "--name=s"), capsys, "runs/s holds another sweep", said)
        assert "choose another --name; the table of the one there is runs/s/sweep.csv" in told
    refused(command.main, tiny(RATES, "--train.steps=17", "--name=s"), capsys, "train.steps: 16 there, 17 now")


def test_a_directory_of_something_else_is_left_alone(capsys, training):
    for name, content, said in [
        ("config.json", "{}", "runs/s is a run, and no sweep"),
        ("thesis.txt", "", "runs/s holds other files (thesis.txt) and is no sweep"),
        ("sweep.json", "{", "runs/s/sweep.json is damaged"),
        ("sweep.json", "[]", "runs/s/sweep.json is damaged"),
    ]:
        Path("runs/s").mkdir(parents=True)
        Path("runs/s", name).write_text(content)
        refused(command.main, [*TINY, RATES, "--name=s"], capsys, said)
        assert os.listdir("runs/s") == [name]
        shutil.rmtree("runs/s")
    Path("runs/s").write_text("")
    refused(command.main, [*TINY, RATES, "--name=s"], capsys, "runs/s is a file, and a sweep is a directory")


MEMBER = "runs/s/learning_rate=0.01,seed=1338"


def instead(path: str, content: str | None = None) -> None:
    """A file in the place of `path`; without content, a folder."""
    place = Path(path)
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    if content is None:
        place.mkdir()
    else:
        place.write_text(content, encoding="utf-8")


def another_run() -> None:
    shutil.rmtree(MEMBER)
    shutil.copytree("runs/s/learning_rate=0.001,seed=1337", MEMBER)


@pytest.mark.parametrize(
    ("change", "seeds", "said"),
    [
        (lambda: instead("text.txt", "otra cosa " * 300), 3,
         "has changed: text.txt gives other tokens now than it was trained on\n       bring the old text"),
        (lambda: os.remove("text.txt"), 3, "data.source=text.txt is neither a file nor a folder"),
        (lambda: instead(f"{MEMBER}/data.json", "{"), 3, f"{MEMBER}/data.json is missing or damaged"),
        (lambda: instead(f"{MEMBER}/metrics.jsonl", "["), 2, "has checkpoint 16, and its metrics.jsonl no val/loss of"),
        (lambda: os.remove(f"{MEMBER}/metrics.jsonl"), 2, "or take that directory away: the same command then trains"),
        (lambda: instead(f"{MEMBER}/metrics.jsonl"), 2, f"cannot read {MEMBER}/metrics.jsonl: it is a folder"),
        (lambda: instead(f"{MEMBER}/config.json", "{"), 2, f"{MEMBER}/config.json is damaged"),
        (another_run, 2, "is another run than this sweep's\n       optim.learning_rate: 0.001 there, 0.01 asked for"),
        (lambda: instead(MEMBER, ""), 2, f"{MEMBER} is a file, and a run is a directory\n       take it away"),
        (lambda: instead("runs/s/sweep.csv"), 2, "cannot write runs/s/sweep.csv: Is a directory\n       see to that"),
        (lambda: instead("runs/s/sweep.json"), 2, "runs/s/sweep.json: it is a folder, not a file\n       bring"),
        (lambda: instead("runs/s/sweep.json", '{"settings": [], "over": 1, "sample": 1, "seeds": 5, "halve": 1}'), 2,
         "runs/s/sweep.json is damaged: it is no record of a sweep\n       bring the old one back"),
        (lambda: instead("runs", ""), 2, "runs is a file, and runs/s a directory in it\n       take it away"),
    ],
)  # fmt: skip
def test_a_sweep_that_was_tampered_with_is_refused_and_nothing_is_lost(change, seeds, said, capsys, training):
    swept(capsys, RATES, "--seeds=2", "--name=s")
    training.trained = []
    change()
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    refused(command.main, tiny(RATES, f"--seeds={seeds}", "--name=s"), capsys, said)
    assert not training.trained
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_two_at_once_are_refused(capsys, training):
    swept(capsys, RATES, "--seeds=1", "--name=s")
    with filelock.FileLock("runs/s/lock"):
        refused(command.main, [*TINY, RATES, "--seeds=2", "--name=s"], capsys, "another process is training the sweep")


# ---- what is found ---------------------------------------------------------------------------------------------------


def rows(**by_name: list[float | None]) -> list[Row]:
    made = [Row({"optim.beta1": name}, dict(enumerate(values))) for name, values in by_name.items()]
    return sorted(made, key=lambda row: row.rank)


def test_the_best_is_compared_with_the_second_seed_by_seed():
    # seeds differ much more than configurations: only pairs tell them apart
    found = results.verdict(rows(a=[1.0, 2.0, 3.0], b=[1.1, 2.1, 3.13]))
    assert found is not None
    assert found.is_clear
    assert found.ahead.value == pytest.approx(0.11)
    assert found.ahead.error == pytest.approx(0.01)
    assert results.words(found, NATS) == (
        "best: beta1=a is better than beta1=b by 0.1100 ± 0.0100 nats a token, paired by seed (3 pairs): "
        "11.0 standard errors"
    )
    close = results.words(results.verdict(rows(a=[1.0, 2.2], b=[1.1, 2.11])), NATS)
    assert close.startswith("no clear winner: beta1=a is ahead of beta1=b by 0.0050 ± 0.0950")
    assert "below 2 that may be chance" in close
    assert not results.verdict(rows(a=[1.0], b=[2.0])).is_clear
    assert "no seed is common" in results.words(results.verdict(rows(a=[1.0, None], b=[None, 2.0])), NATS)
    assert results.verdict([]) is None
    equal = results.words(results.verdict(rows(a=[1.0, 2.0], b=[1.0, 2.0])), NATS)
    assert equal.startswith("no clear winner")


def test_a_best_value_on_the_edge_is_a_warning():
    asked = ranges.read(["optim.beta1=0.8,0.9,0.95", "optim.weight_decay=0,0.1", "optim.name=adamw,lion"])

    def warned(beta1: float, decay: float) -> list[str]:
        best = Row({"optim.beta1": beta1, "optim.weight_decay": decay, "optim.name": "adamw"}, {1: 1.0})
        return results.warnings(asked, best, [best])

    assert warned(0.9, 0.0) == []  # nothing lies below 0
    assert [line.split(" lies")[0] for line in warned(0.8, 0.1)] == [
        "the best optim.beta1=0.8",
        "the best optim.weight_decay=0.1",
    ]
    assert "lower values may be better" in warned(0.8, 0.0)[0]
    assert "higher values may be better" in warned(0.95, 0.0)[0]


def test_of_one_configuration_that_is_left_no_edge_is_told(capsys, training):
    training.diverge = {"1e+30", "1e+31"}
    out = swept(capsys, "--over=optim.learning-rate=1e-2,1e30,1e31", "--seeds=1", "--name=s")
    assert "edge of its range" not in out
    assert "warning: learning_rate=0.01 is the best for want of others, as all of them diverged: try more values" in out
    training.diverge = {"1e+31"}
    out = swept(capsys, "--over=optim.learning-rate=1e-2,1e30,1e31", "--seeds=1", "--name=t")
    assert "warning: the best optim.learning_rate=0.01 lies on the edge of its range: lower values may be better" in out
    assert "for want of others" not in out


def test_the_best_of_two_sweeps_are_two_runs(capsys, training):
    for name in ("s", "t t"):
        out = swept(capsys, RATES, "--seeds=1", f"--name={name}")
        line = next(line for line in out.splitlines() if line.startswith("the best settings: "))
        told = line.removeprefix("the best settings: ")
        assert told in Path(f"runs/{name}/best.toml").read_text().splitlines()[1]
        best = config.load(shlex.split(told)[2:])
        assert best.run_dir == Path(f"runs/{name}/best")
        assert best.cfg.optim.learning_rate == 0.01
    Path("runs/s/best").mkdir()
    swept(capsys, RATES, "--seeds=2", "--name=s")  # a run of it beside the members is in nobody's way


def test_other_tokens_are_compared_by_bits_a_byte_and_other_texts_with_a_warning(capsys, training):
    assert "bits a byte" in swept(capsys, "--over=data.tokenizer=char,word", "--seeds=1")
    Path("other.txt").write_text(TEXT[::-1], encoding="utf-8")
    out = swept(capsys, "--over=data.source=text.txt,other.txt", "--seeds=1", "--name=t")
    assert "warning: data.source changes the validation text" in out


def test_fresh_seeds_confirm_the_best_two(capsys, training):
    out = swept(capsys, "--over=optim.learning-rate=1e-3,5e-3,1e-2", "--seeds=2", "--confirm=2", "--name=s")
    again = [line for line in lines_of("runs/s/sweep.csv") if line["stage"] == "confirm"]
    assert [line["optim.learning_rate"] for line in again] == ["0.01", "0.005"]
    assert all(line["seed_2337"] and line["seed_2338"] and not line["seed_1337"] for line in again)
    assert "on fresh seeds: best: learning_rate=0.01 is better than learning_rate=0.005 by 0.0050 ± 0.0000" in out


def test_a_text_from_a_pipe_is_read_once(capsys, training, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode()), isatty=lambda: False))
    swept(capsys, RATES, "--data.source=-", "--seeds=1")
    assert len(training.trained) == 2


def test_a_swept_seed_is_the_list_of_seeds(capsys, training):
    out = swept(capsys, "--over=train.seed=3,1,2", "--name=s")
    assert "there is no other to compare it with" in out
    assert lines_of("runs/s/sweep.csv")[0]["n"] == "3"
    assert Path("runs/s/seed=3").is_dir()


def test_csv_has_every_figure_and_every_digit(capsys, training):
    swept(capsys, RATES, "--seeds=2", "--name=s")
    (one, _) = lines_of("runs/s/sweep.csv")
    values = [float(one["seed_1337"]), float(one["seed_1338"])]
    assert float(one["mean"]) == sum(values) / 2
    assert float(one["standard_error"]) == pytest.approx(abs(values[0] - values[1]) / 2)
    assert (one["optim.learning_rate"], one["n"], one["diverged"], one["share_of_steps"]) == ("0.01", "2", "0", "1.0")


# ---- halving ---------------------------------------------------------------------------------------------------------


def test_halving_trains_complete_shorter_schedules_and_the_last_two_in_full(capsys, training):
    rates = "--over=optim.learning-rate=0.003,0.005,0.01,0.02,0.03,0.04,0.05,0.06"
    out = swept(capsys, rates, "--halve", "--seeds=1", "--name=s", "--train.steps=160")
    assert [name.partition("seed=1337")[2] for name in training.trained] == [",1of8"] * 8 + [",1of4"] * 4 + [""] * 2
    assert out.count("rank correlation with the round before: 1.00") == 2
    assert "round 1, 1/8 of the steps: validation loss" in out
    assert "round 3, all steps: validation loss" in out
    assert config.load(["runs/s/best.toml"]).cfg.optim.learning_rate == 0.01
    short = config.read_json(Path("runs/s/learning_rate=0.01,seed=1337,1of8/config.json"))
    assert (short.train.steps, short.optim.warmup_steps, short.train.eval_every) == (20, 1, 2)


def test_shares_of_the_steps():
    assert [halve.share(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 1, 4, 4, 8, 8, 16]
    assert halve.rounds(9) == [9, 5, 3, 2]
    cfg = config.load(["--optim.warmup-steps=20", "--train.save-every=0"]).cfg
    less = halve.shortened(cfg, 4)
    assert (less.train.steps, less.optim.warmup_steps, less.train.eval_every, less.train.save_every) == (400, 5, 100, 0)
    assert dataclasses.replace(less, train=cfg.train, optim=cfg.optim) == cfg


def test_the_correlation_of_ranks():
    assert halve.correlation([1, 2, 3, 9], [10, 20, 30, 31]) == 1
    assert halve.correlation([1, 2, 3], [3, 2, 1]) == -1
    assert halve.correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)  # scipy's
    assert halve.correlation([1, 1], [1, 2]) is None
    assert halve.correlation([], []) is None


# ---- the page --------------------------------------------------------------------------------------------------------

has_pages = pytest.mark.skipif(not (PACKAGE / "pages").exists(), reason="nanogpt_jax/pages was removed")


def page(capsys, *words: str) -> str:
    swept(capsys, *words, "--name=s")
    return Path("runs/s/sweep.html").read_text(encoding="utf-8")


@has_pages
def test_the_page_draws_a_curve_of_one_number_and_a_map_of_two_settings(capsys, training):
    training.diverge = {"1e+30"}
    one = page(capsys, "--over=optim.learning-rate=1e-3,1e-2,1e30", "--seeds=2")
    assert one.count("<svg") == 2
    assert one.count('class="error"') == 2 * 2
    assert one.count('class="single"') == 2 * 4
    assert one.count(">diverged</text>") == 2
    assert "rank" not in one
    shutil.rmtree("runs")
    two = page(capsys, RATES, "--over=optim.name=adamw,muon", "--seeds=1")
    assert two.count("<rect") == 4
    assert two.count('class="best"') == 2  # equal ones: this test's loss knows no optimizer
    assert 'class="error"' not in two  # one seed has no error
    assert "default-src 'none'" in two
    assert not re.search(r"https?:|src=|href=|@import|url\(", two)


@has_pages
@pytest.mark.browser
@pytest.mark.parametrize("more", [[], ["--over=optim.name=adamw,muon"], ["--halve", "--train.steps=160"]])
def test_the_page_in_a_browser(more, browser, axe, capsys, training):
    training.diverge = {"1e+30"}
    page(capsys, "--over=optim.learning-rate=1e-3,1e-2,2e-2,1e30", "--seeds=2", *more)
    looked_at(browser, axe, Path("runs/s/sweep.html"))


@has_pages
def test_texts_on_the_page_are_escaped(capsys, training):
    Path("<b>.txt").write_text(TEXT, encoding="utf-8")
    told = page(capsys, "--over=data.source=<b>.txt,text.txt", "--seeds=1")
    assert "<b>" not in told
    assert "source=&lt;b&gt;.txt" in told


@has_pages
def test_without_the_room_of_pages_there_is_a_table(capsys, training, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanogpt_jax.pages", None)
    out = swept(capsys, RATES, "--seeds=1", "--name=s")
    assert "page:" not in out
    assert not Path("runs/s/sweep.html").exists()
    assert Path("runs/s/sweep.csv").exists()


def test_times_in_words():
    assert [conduct.duration(s) for s in (5, 89, 600, 7200)] == ["5 s", "89 s", "10 min", "2.0 h"]


@pytest.mark.slow
def test_killed_at_random_moments_it_gives_the_same_table(tmp_path, users_env):
    def start(name: str) -> subprocess.Popen:
        words = [*TINY, RATES, "--seeds=2", f"--name={name}"]
        env = {**users_env, "PYTHONPATH": str(PACKAGE.parent)}
        run = [sys.executable, "-m", "nanogpt_jax", "sweep", *words]
        return subprocess.Popen(run, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with start("whole") as process:
        whole, _ = process.communicate()
    moment = random.Random(0)
    for n in (1, 4, 2, 6, 3):  # lines of progress, of which a member has five
        with start("s") as process:
            for _ in range(n):
                assert process.stderr is not None
                assert process.stderr.readline()
            time.sleep(moment.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
    with start("s") as process:
        out, told = process.communicate()
    assert "member 4 of 4" in told
    assert "member 1 of 4" not in told
    assert out.replace("runs/s/", "runs/whole/") == whole
    for run in sorted(Path("runs/whole").glob("*seed*")):
        assert numbers(run) == numbers(Path("runs/s") / run.name)
