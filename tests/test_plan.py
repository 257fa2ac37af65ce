"""planning/: what is said before a run is what XLA and the run then say."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import make_step, refused
from test_architecture import PACKAGE

from nanogpt_jax import cli, config
from nanogpt_jax.commands import plan as command
from nanogpt_jax.config import DataConfig
from nanogpt_jax.distributed.mesh import make_mesh
from nanogpt_jax.distributed.sharding import rule_for
from nanogpt_jax.host.memory import PROCESS
from nanogpt_jax.model import execution, gpt2, memory, sizes
from nanogpt_jax.planning import compiled, estimate, known, tables, targets, traffic
from nanogpt_jax.training.language_model import next_token
from nanogpt_jax.training.optim import OPTIMIZERS, make_optimizer
from nanogpt_jax.training.state import state_shapes

PAGE = PACKAGE / "distributed" / "README.md"
NO_DATA = "--data.dir=/nonexistent"
# six settings, each with two batch sizes: attention as a whole and in blocks, halved and not, accumulated, a large head
SIX = [
    "--model.vocab-size 65 --train.batch-size {}",
    "--model.vocab-size 65 --model.n-embd 64 --model.n-head 2 --model.block-size 32 --train.batch-size {}",
    "--model.vocab-size 300 --model.n-layer 2 --model.block-size 256 --train.batch-size {} --optim.name adamw",
    "--model.vocab-size 50257 --model.n-layer 2 --model.bias true --train.batch-size {} --optim.name lion",
    "--model.vocab-size 8192 --model.n-embd 384 --model.n-head 12 --train.batch-size {} --train.micro-batch 4",
    "--model.vocab-size 65 --model.n-embd 384 --model.n-head 6 --model.block-size 256 --train.batch-size {}",
]
CASES = [line.format(n) for line in SIX for n in (12, 24)]


def planned(line: str, target: str = "cpu") -> estimate.Plan:
    return estimate.plan(config.load([*line.split(), NO_DATA]).cfg, targets.find(target))


def one_device(p: estimate.Plan) -> compiled.Compiled:
    return compiled.of_plan(p)


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["gpt2"], ["gpt2-xl"], ["--model.bias=true", "--model.vocab-size=50257"]])
def test_the_parameter_tree_in_closed_form(flags):
    """Paths, numbers of entries and which axes of the mesh split them."""
    cfg = dataclasses.replace(config.load(flags).cfg.model, vocab_size=50257)
    tree = jax.tree_util.tree_leaves_with_path(gpt2.param_shapes(cfg))
    real = {"/".join(key.key for key in path): math.prod(leaf.shape) for path, leaf in tree}
    mine = {path: n for path, n, *_ in memory.leaves(cfg)}
    assert mine == real
    for path, _, by_fsdp, by_tensor in memory.leaves(cfg):
        spec = rule_for(path)
        assert spec is not None
        assert (by_fsdp, by_tensor) == ("fsdp" in spec, "tensor" in spec), path
    padding = (cfg.padded_vocab_size - cfg.vocab_size) * cfg.n_embd
    assert sum(real.values()) == sizes.n_params(cfg) + padding


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 4, 1)])
def test_the_bytes_of_a_state_are_exact(optimizer, mesh):
    flags = [f"--mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    cfg = config.load(["--model.vocab-size=65", "--model.bias=true", f"--optim.name={optimizer}", *flags]).cfg
    shapes = state_shapes(make_optimizer(cfg.optim, 100), next_token(cfg.model), make_mesh(cfg.mesh))
    here = [math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves((shapes.params, shapes.opt_state))]
    assert sum(memory.stored(cfg, mesh)) == pytest.approx(sum(here), abs=100)  # counters, and Muon's coefficients
    wary = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, skip_spikes=8.0))
    more = jax.eval_shape(make_optimizer(wary.optim, 100).init, shapes.params)._replace(inner=())
    added = sum(memory.stored(wary, mesh)) - sum(memory.stored(cfg, mesh))
    assert added == pytest.approx(sum(x.size * 4 for x in jax.tree.leaves(more)), abs=100)


@pytest.mark.parametrize("line", [CASES[0], CASES[4], CASES[8]])
def test_memory_is_within_a_tenth_of_what_xla_says(line):
    p = planned(line)
    its = one_device(p)
    assert p.step.state == pytest.approx(its.arguments, abs=200)  # counters
    assert p.step.total == pytest.approx(its.total, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("line", CASES)
def test_memory_of_six_settings_and_two_batch_sizes(line):
    p = planned(line)
    assert p.step.total == pytest.approx(one_device(p).total, rel=0.1)


def drawn(n: int) -> list[str]:
    """Random settings for a CPU."""
    rng = np.random.default_rng(8)
    lines = []
    for i in range(n):
        T, H, B = rng.choice([32, 64, 128, 256]), rng.choice([2, 4, 6]), rng.choice([4, 8, 12, 24])
        lines.append(
            f"--model.block-size {T} --model.n-head {H} --model.n-embd {H * rng.choice([16, 32, 64])} --model.n-layer "
            f"{rng.integers(1, 7)} --model.vocab-size {rng.choice([65, 2048, 20000])} --train.batch-size {B} --optim.name "
            f"{rng.choice(['adamw', 'muon', 'lion'])} --model.bias {rng.choice(['true', 'false'])} "
            + ("", f"--train.micro-batch {B // 4}", "--model.dropout 0.1", "--model.dtype bfloat16")[i % 4]
        )
    return lines


@pytest.mark.slow
def test_nothing_is_said_to_fit_that_does_not():
    """20 random settings, on a machine with one byte less than XLA needs."""
    said = []
    for line in drawn(20):
        p = planned(line)
        kind = dataclasses.replace(p.target.kind, memory=one_device(p).total - 1)
        said.append(dataclasses.replace(p, target=dataclasses.replace(p.target, kind=kind)).fits)
    assert said == [False] * 20


def test_the_proposed_micro_batch_is_the_largest_that_runs_or_one_below():
    """On a machine that has room for exactly some micro-batch, by XLA's own account."""
    line = "--model.vocab-size 65 --model.n-layer 2 --model.n-embd 64 --model.n-head 2 --train.batch-size 64 --optim.name adamw"
    line += " --train.save-every 0 --train.eval-every 0"  # no checkpoint beside the steps
    for n in (8, 32):
        room = one_device(planned(f"{line} --train.micro-batch {n}")).total
        cfg = config.load([*line.split(), "--train.micro-batch=-1"]).cfg
        chosen, how = execution.choose(cfg, "cpu", 1, room)
        assert how.micro_batch == chosen.train.micro_batch
        assert how.micro_batch in (n, n // 2)


SIX_LAYERS = "--model.block-size 256 --model.vocab-size 109 --optim.name adamw --train.eval-every 0 --model.n-layer 6"


@pytest.mark.parametrize(
    ("line", "peaks"),
    [
        (
            f"{SIX_LAYERS} --model.n-head 4 --model.n-embd 256 --train.batch-size 24 --train.steps 5 --train.save-every 2",
            {1: 0.653, 2: 0.631, 3: 0.679, 4: 0.706, 6: 0.798, 8: 0.843, 12: 0.967, 24: 1.395},
        ),
        (
            f"{SIX_LAYERS} --model.n-head 6 --model.n-embd 384 --train.batch-size 48 --train.steps 2",
            {2: 0.80, 3: 0.77, 4: 0.78, 6: 0.88, 8: 0.99, 12: 1.19, 16: 1.48, 24: 1.94, 48: 3.25},
        ),
    ],
)
def test_the_micro_batch_that_is_chosen_runs_by_measured_peaks(line, peaks):
    """GiB resident at the peak of real runs by micro-batch, 30 November 2026: distributed/README.md has the command."""
    cfg = planned(line).cfg
    for budget in np.linspace(min(peaks.values()), 1.1 * max(peaks.values()), 50):
        chosen = execution.largest_micro_batch(cfg, "cpu", (1, 1, 1), budget * 2**30 - PROCESS)
        runs = [0, *(n for n, peak in peaks.items() if peak <= budget)]
        chosen = chosen if chosen in peaks else 0  # 1 was not run with the larger model
        assert chosen in runs[-2:]


def test_a_micro_batch_that_was_chosen_gives_the_same_losses():
    def losses(*flags: str, room: float = 0.0) -> list[float]:
        sizes = "--model.vocab-size=65 --model.n-layer=1 --model.n-embd=32 --model.n-head=2 --model.block-size=16"
        cfg = config.load([*sizes.split(), "--train.batch-size=8", *flags]).cfg
        cfg, how = execution.choose(cfg, "cpu", 1, room)
        assert how.micro_batch == (2 if room else 8)
        step = make_step(cfg)
        from helpers import make_state

        state, found = make_state(cfg), []
        for i in range(3):
            rows = np.random.default_rng(i).integers(0, 65, (1, 8, 17), dtype=np.int32)
            state, metrics = step.jitted(state, rows, np.int32(1), step.dials(i))
            found.append(float(metrics["loss"][0]))
        return found

    p = planned(
        "--model.vocab-size 65 --model.n-layer 1 --model.n-embd 32 --model.n-head 2 --model.block-size 16 "
        "--train.batch-size 8 --train.micro-batch 2"
    )
    room = p.needed
    np.testing.assert_allclose(losses("--train.micro-batch=-1", room=room), losses(), rtol=1e-5)


def test_no_micro_batch_fits(capsys):
    cfg = config.load(["--model.vocab-size=65", "--train.micro-batch=-1"]).cfg
    with pytest.raises(config.UserError, match=r"nothing fits: 1 at a time need 0\.0 GiB a device, and 0\.0 are there"):
        execution.choose(cfg, "cpu", 1, 1e6)


def test_the_whole_process_of_runs_that_were_measured():
    """Peak resident bytes on 2 cores of an AMD EPYC, 29 November 2026: distributed/README.md has the commands."""
    large = "--model.n-embd 384 --model.n-layer 6 --model.n-head 6 --model.block-size 256 --train.steps 6000"
    adamw = "--optim.name adamw --optim.learning-rate 0.001"
    gpt2 = f"--model.vocab-size 50257 --model.n-layer 12 --model.n-head 12 --model.n-embd 768 --model.block-size 256 {adamw}"
    for line, peak in [
        ("--model.vocab-size 109 --train.steps 6000", 1238282240),
        ("--model.vocab-size 109 --train.batch-size 48 --train.steps 6000 --optim.name adamw", 1183924224),
        (f"--model.vocab-size 109 {large} --train.batch-size 16 {adamw}", 5232576512),
        (f"{gpt2} --train.batch-size 4", 6405963776),
        (f"{gpt2} --train.batch-size 8", 7608504320),
    ]:
        cfg = config.load(line.split()).cfg
        kind = dataclasses.replace(targets.here(), memory=18e9)
        target = targets.Target("cpu", kind, 1)
        assert estimate.plan(cfg, target).process[1] == pytest.approx(peak, rel=0.15)


def test_the_bytes_of_checkpoints_that_were_measured():
    """Within 1 % of what `du -sb` said of checkpoints that training had written."""
    for line, size in [
        ("--model.vocab-size 109", 6215762),
        ("--model.vocab-size 109 --optim.name adamw", 9032152),
        ("--model.vocab-size 109 --model.n-embd 64 --model.n-head 2 --model.block-size 32", 1672269),
        ("--model.vocab-size 427 --model.n-layer 2 --model.n-head 8 --model.n-embd 64", 1207615),
        ("--model.vocab-size 50257 --model.n-layer 12 --model.n-head 12 --model.n-embd 768 --model.block-size 256 "
         "--optim.name adamw", 1376352738),
    ]:  # fmt: skip
        assert planned(line).checkpoint == pytest.approx(size, rel=0.01), line


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_plan_takes_less_than_a_second_and_no_jax(clean_env):
    code = (
        "import sys, time; from nanogpt_jax.commands import plan; plan.main(sys.argv[1:]); "
        "print(time.process_time() < 1, sorted({'jax', 'flax', 'optax', 'orbax'} & set(sys.modules)))"
    )
    flags = ["gpt2", "--target", "v5e:4x4", "--mesh.data", "4", "--mesh.fsdp", "4"]
    ran = subprocess.run([sys.executable, "-c", code, *flags], env=clean_env, capture_output=True, text=True)
    assert ran.stdout.endswith("True []\n"), ran.stdout + ran.stderr


def test_a_plan_is_one_screen_and_adds_up(capsys):
    assert command.main(["gpt2", "--target", "v5e:2x2", NO_DATA]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) <= 28
    assert max(map(len, lines)) <= 140
    assert "124,439,808, without embeddings 85,056,000" in out
    named = "parameters|optimizer|gradients|activations|logits|copies"
    parts = [float(n) for n in re.findall(rf"^  (?:{named}) +([\d.]+)", out, re.M)]
    (whole,) = re.findall(r"^  in all +([\d.]+)  of 15\.75", out, re.M)
    assert sum(parts) == pytest.approx(float(whole), abs=0.03)


def test_what_does_not_fit_is_told_what_would(capsys):
    assert command.main(["gpt2-xl", "--target", "v5e:2x2", NO_DATA]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out
    (words,) = re.findall(r"would fit: (\S+ \S+) \(", out)
    flags = [f"--{word.replace('=', ' ')}" for word in words.split()]
    changed = planned(" ".join(["gpt2-xl", *flags]), "v5e:2x2")
    assert changed.fits
    assert not planned("gpt2-xl", "v5e:2x2").fits


WRONG = [
    ("no such device", "gpt2 --target h10", ["--target=h10: there is no h10 here", "did you mean h100?"]),
    ("no such topology", "gpt2 --target v5e:8", ["--target=v5e:8 must be v5e for one device", "did you mean v5e:2x4?"]),
    ("three axes", "gpt2 --target v5p:4x4", ["a topology like v5p:4x4x1", "did you mean v5p:4x4x1?"]),
    ("a topology of GPUs", "gpt2 --target h100:2x4", ["a number of devices like h100:8", "did you mean h100:8?"]),
    ("not a number", "gpt2 --target h100:many", ["--target=h100:many must be h100, or a number of devices"]),
    ("too many", "gpt2 --target v5e:100x100", ["10000 devices; plans are made for up to 4096"]),
    ("a mesh that is too large", "gpt2 --target v5e:2x2 --mesh.data 8", ["needs 8 devices, and --target=v5e:2x2 has 4"]),
    ("micro-batch below the mesh", "gpt2-large --target v5e:4x4", ["train.micro_batch=8 cannot be split", "train.micro_batch=16"]),
    ("channels and mesh", "gpt2-xl --target v5e:16x16 --mesh.data 1 --mesh.fsdp 256 --train.batch-size 512 --train.micro-batch 256", ["mesh.fsdp=256 does not divide"]),
    ("measured elsewhere", "gpt2 --target h100:8 --measure", ["--measure takes steps on this machine, so it excludes --target"]),
    ("a card for nothing", "gpt2 --card x.txtpb", ["--card=x.txtpb describes a GPU for --compile"]),
    ("tokens", "gpt2 --tokens 0", ["--tokens=0 must be at least 1"]),
    ("a wrong setting", "gpt2 --model.n-layers 3", ["did you mean model.n_layer"]),
    ("micro-batch", "--train.micro-batch -2", ["train.micro_batch=-2 must be at least -1"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_input(capsys, line, words):
    refused(command.main, line, capsys, *words)


def test_a_classifier_has_no_automatic_micro_batch(capsys):
    line = "train --data.source x.csv --train.micro-batch -1"
    refused(cli.command("classify"), line, capsys, "train.micro_batch=-1 must not be negative")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gpt2 --target h100:8 --optim.learning-rate 0.1", "optim.learning_rate=0.1 is above what is usual for adamw"),
        ("gpt2 --target h100:8 --train.steps 100", "tokens a parameter"),
        ("gpt2 --target h100:8 --train.steps 100", "optim.warmup_steps=2000 is no less than train.steps=100"),
        ("--target h100:8", "the mesh uses 1 of 8 devices"),
        ("--target h100:1", "a step is too small to fill such a device"),
        ("gpt2 --target h100:8 --tokens 1000000", "passes over the text"),
        ("--model.remat block", "model.remat=block saves no memory on a CPU"),
    ],
)
def test_what_is_unusual_is_told(capsys, line, words):
    assert command.main([*line.split(), NO_DATA]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("name", [*sorted(p.stem for p in config.parse.config_folder().glob("*.toml")), ""])
def test_a_shipped_config_has_no_unusual_rate(name):
    cfg = tables.load(name)
    if name == "finetune_shakespeare":  # which starts from a run that is not here
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, init_from="runs/gpt2"))
    p = estimate.plan(cfg, targets.find("h100"))
    assert not [line for line in estimate.warnings(p) if "learning_rate" in line]


def test_the_vocabulary_is_that_of_prepared_text(tmp_path):
    manifest = {
        "source": {"name": "python-docs"},
        "tokenizer": {"kind": "char"},
        "val_fraction": 0.1,
        "n_vocab": 109,
        "train": {"tokens": 9000},
        "val": {"tokens": 1000},
    }
    (tmp_path / "python-docs-1").mkdir()
    (tmp_path / "python-docs-1" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("[1, 2")
    cfg = DataConfig(dir=str(tmp_path))
    assert known.text(cfg, 0) == known.Text(109, f"prepared in {tmp_path}", 9000, 1000)
    assert known.text(dataclasses.replace(cfg, tokenizer="bpe:512"), 0) == known.Text(512, "bpe:512")
    assert known.text(dataclasses.replace(cfg, source="x.txt", tokenizer="gpt2"), 0).vocabulary == 50257
    assert known.text(dataclasses.replace(cfg, source="x.txt"), 0).whence.startswith("assumed for char")


@pytest.fixture
def environment(monkeypatch):
    """`compiled.set_up` writes into the environment, for JAX to read when it starts: here it has started."""
    monkeypatch.setattr(compiled.os, "environ", dict(compiled.os.environ))


SMALL = ["--model.vocab-size=65", "--model.n-layer=1", "--model.n-embd=32", "--model.n-head=2", "--model.block-size=16"]


@pytest.mark.usefixtures("environment")
def test_compile_says_what_xla_says(capsys):
    assert command.main([*SMALL, "--compile", "--mesh.data=2", "--target=cpu:8"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"XLA, compiled ahead of time: fits: 0\.\d\d of \S+ GiB: arguments 0\.00, temporaries 0\.00", out)
    assert re.search(r"sent, by its program: all-reduce [\d.]+ kB", out)


@pytest.mark.usefixtures("environment")
@pytest.mark.long
def test_compile_tells_the_changes_that_xla_accepts(capsys, monkeypatch):
    """On a machine with room for half of the batch: a smaller micro-batch is compiled before it is named."""
    line = "--model.vocab-size=65 --model.n-layer=2 --model.n-embd=64 --model.n-head=2 --train.batch-size=32"
    half = planned(line.replace("=", " ").replace("size 32", "size 16")).step
    kind = dataclasses.replace(targets.here(), memory=half.total * 1.15)
    monkeypatch.setattr(command.targets, "find", lambda name: targets.Target(name, kind, 1))
    assert command.main([*line.split(), NO_DATA, "--compile"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert re.search(r"would fit, compiled: train\.micro_batch=(8|16) \(", out)


def test_measure_takes_steps_and_says_how_long_the_run_takes(capsys):
    assert command.main([*SMALL, NO_DATA, "--measure", "--train.steps=10"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"measured here: [\d.]+ (m?s|minutes) a step; [\d,]+ tokens/s; the run takes [\d.]+ (m?s|min)", out
    )


# ---- what is sent ----------------------------------------------------------------------------------------------------

HLO = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g = bf16[16,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %s = f32[2,4]{1,0} reduce-scatter(%y), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%inside (p: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%p, %n), direction=LT
}

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {
  %e = f32[8,4]{1,0:T(8,128)} all-reduce(%p), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
}

%again (p: s32[]) -> s32[] {
  %f = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %h = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%under.1
}

%under.1 (p: f32[8,4]) -> f32[2,4] {
  %e2 = f32[8,4]{1,0} all-gather(%p), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
  %e3 = f32[8,4]{1,0} all-gather(%p), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %l = s32[] while(%t), condition=%inside, body=%again
  %r = (f32[8,4]{1,0}, f32[2]{0}) all-reduce(%u, %v), replica_groups={{0,1}}, to_apply=%add
  %q = (f32[4]{0}, f32[8]{0}) all-gather-start(%z), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}
}
"""


def test_bytes_between_devices_are_read_from_compiled_text():
    """A loop of 3 turns by XLA's note, one of 5 by its condition, a TPU's fusions, and a step's own collectives."""
    gather = 3 * 128 * 3 / 4 + 5 * 128 * 3 / 4 + 32 / 2
    scatter = 3 * 32 * 3 + 5 * 128 * 3 / 4
    sums = 2 * (128 + 8) / 2
    assert compiled.sent(HLO) == {"all-gather": gather, "reduce-scatter": scatter, "all-reduce": sums}


@pytest.mark.parametrize("flags", ["--mesh.data 4", "--mesh.data 4 --train.micro-batch 4"])
def test_gradients_over_data_are_what_xla_sends(flags):
    """All-reduce of each gradient once a step: the closed form beside the compiled program."""
    p = planned(f"--model.vocab-size 65 --model.n-layer 2 --model.scan-unroll 2 {flags}", "cpu:8")
    its = one_device(p).sent
    assert set(its) == {"all-reduce"} == set(p.sent)
    assert p.sent["all-reduce"] == pytest.approx(its["all-reduce"], rel=0.05)


def test_over_fsdp_weights_are_sent_and_not_activations():
    """A CPU's compiler sums where others scatter, so it sends twice that. Without `by_sequence` it sent 40 times as much."""
    p = planned(
        "--model.vocab-size 65 --model.n-layer 2 --model.block-size 128 --mesh.fsdp 4 --train.batch-size 64", "cpu:8"
    )
    its = one_device(p)
    assert its.sent["all-reduce"] < 4 * p.sent["reduce-scatter"]
    assert its.total < 1.1 * p.step.total


def test_a_mesh_larger_than_a_host_waits_for_the_network():
    sent = {"all-reduce": 1e9}
    h100, v5e = targets.find("h100:64"), targets.find("v5e:8x8")
    assert traffic.seconds(sent, h100, (8, 1, 1)) == pytest.approx(1e9 / 450e9)
    assert traffic.seconds(sent, h100, (64, 1, 1)) == pytest.approx(1e9 / 400e9)
    assert traffic.seconds(sent, h100, (8, 8, 1)) == pytest.approx(1e9 / 50e9)
    assert traffic.seconds(sent, v5e, (64, 1, 1)) == pytest.approx(1e9 / 100e9)


# ---- the tables ------------------------------------------------------------------------------------------------------


def test_the_tables_of_the_page_are_what_the_command_prints(capsys):
    assert command.main(["--tables"]) == 0
    page = PAGE.read_text(encoding="utf-8")
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page, f"nanogpt-jax plan --tables prints another table:\n{table}"


# ---- ahead of time, for hardware that is not here --------------------------------------------------------------------


@pytest.mark.elsewhere
@pytest.mark.parametrize(
    "flags",
    [
        "gpt2 --model.n-layer 2 --train.batch-size 8 --train.micro-batch 8 --mesh.data 1",
        "gpt2 --model.n-layer 2 --train.batch-size 16 --train.micro-batch 16 --mesh.data 1 --model.remat block",
        "gpt2 --model.n-layer 2 --train.batch-size 32 --train.micro-batch 16",
    ],
)
def test_memory_of_a_tpu_is_within_a_tenth_of_what_its_compiler_says(clean_env, flags):
    """pip install -e '.[test,tpu]': jax[tpu] compiles for v5e without one."""
    code = "from nanogpt_jax.commands import plan; import sys; sys.exit(plan.main(sys.argv[1:]))"
    words = [*flags.split(), "--target", "v5e:2x2", "--compile", NO_DATA]
    ran = subprocess.run([sys.executable, "-c", code, *words], env=clean_env, capture_output=True, text=True)
    found = re.search(r"the closed form is ([+-][\d.]+)% off", ran.stdout)
    assert found, f"is jax[tpu] installed? pip install -e '.[test,tpu]'\n{ran.stdout}{ran.stderr}"
    assert abs(float(found[1])) < 10
