"""The laws of the training room: golden losses, sharding, accumulation, resume, checkpoints, schedules, metrics."""

import json
import math
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import interrupt_at, load, make_state, make_step, numbers, trees, with_flags
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanogpt_jax import cli, config
from nanogpt_jax.cli import door
from nanogpt_jax.config import Config, ModelConfig, OptimConfig, TrainConfig, UserError
from nanogpt_jax.config.validate import validate
from nanogpt_jax.data import batches
from nanogpt_jax.distributed.mesh import make_mesh
from nanogpt_jax.distributed.sharding import spec_for
from nanogpt_jax.host import memory, progress, signals
from nanogpt_jax.host.progress import Progress
from nanogpt_jax.host.signals import stop_on_signals
from nanogpt_jax.model import attention, execution, gpt2
from nanogpt_jax.run import checksums, metrics
from nanogpt_jax.run.checkpoint import Checkpointer, load_first_params, load_params
from nanogpt_jax.run.recording import Recording
from nanogpt_jax.run.run_dir import checkpoint_steps
from nanogpt_jax.training import language_model, loop
from nanogpt_jax.training.compiled import CompiledStep
from nanogpt_jax.training.gradients import make_gradients
from nanogpt_jax.training.optim import decay_mask, make_optimizer, make_schedule
from nanogpt_jax.training.state import first_state
from nanogpt_jax.training.step import TrainStep, update

GOLDEN = Path(__file__).parent / "fixtures" / "golden.json"
TEXT = "El gato negro persigue al ratón gris; el ratón huye del gato. " * 60
TINY = Config(
    model=ModelConfig(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=32, bias=True),
    optim=OptimConfig(name="adamw", learning_rate=1e-3, min_learning_rate=0.1, warmup_steps=3, schedule="cosine"),
    train=TrainConfig(steps=10, batch_size=8),
)


def change(cfg: Config, **settings: object) -> Config:
    """change(cfg, model__dropout=0.1): double underscores stand for dots."""
    return config.merge(cfg, {key.replace("__", "."): value for key, value in settings.items()}, "test")


def take_steps(cfg: Config, n: int, per_dispatch: int = 1, stream: np.ndarray | None = None):
    """The state and the losses after n steps on fixed tokens, random ones by default."""
    cfg = validate(cfg, {})
    state, step = make_state(cfg), make_step(cfg, per_dispatch)
    stream = np.random.default_rng(0).integers(0, cfg.model.vocab_size, 2000) if stream is None else stream
    t, losses = cfg.train, []
    for first, count in loop.calls(0, n, per_dispatch, ()):
        stack = np.zeros((per_dispatch, t.batch_size, cfg.model.block_size + 1), np.int32)
        for i in range(count):
            stack[i] = batches.batch(
                stream, seed=1, step=first + i, batch_size=t.batch_size, block_size=cfg.model.block_size
            )
        state, values = step.jitted(state, stack, np.int32(count), step.dials(first))
        losses += [float(x) for x in values["loss"][:count]]
    return state, losses


def assert_trees_close(a, b, tolerance: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tolerance, rtol=0), a, b)


def assert_trees_equal(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# ---- the step -------------------------------------------------------------------------------------------------------


def test_golden_losses():
    """A refactor keeps these; a change of the numbers renews the file in the same commit and says why."""
    _, losses = take_steps(TINY, 10)
    # other processors sum in another order: hence a tolerance, far below what any change of the algorithm makes
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text()), rtol=2e-5)


RECIPE = Path(__file__).parent / "fixtures" / "recipe.json"


def sentences(n: int) -> str:
    """A text that is the same with every Python, unlike its documentation."""
    chance = random.Random(0)
    nouns, verbs = "gato perro ratón niña casa luna".split(), "persigue mira sueña encuentra".split()
    names = [f"{chance.choice('el la un'.split())} {chance.choice(nouns)}" for _ in range(2 * n)]
    return "\n".join(f"{a} {chance.choice(verbs)} {b}." for a, b in zip(names[::2], names[1::2], strict=True))


@pytest.mark.long
def test_the_default_recipe_learns_and_resumes_exactly_with_the_compiler_flags_of_users(tmp_path, users_env):
    """`python train.py`, shorter and with half the layers: its losses, gradient norms and weights."""
    (tmp_path / "text.txt").write_text(sentences(2000), encoding="utf-8")
    flags = "--data.source text.txt --train.steps 60 --train.save-every 30 --train.eval-every 0 --model.n-layer 2"
    command = [sys.executable, str(Path(__file__).parent.parent / "train.py"), *flags.split(), "--run-dir", "run"]

    def train() -> tuple[list[dict[str, Any]], tuple[Any, int]]:
        subprocess.run(command, cwd=tmp_path, env=users_env, capture_output=True, check=True, timeout=300)
        return numbers(tmp_path / "run"), load(tmp_path / "run", "latest")

    logged, whole = train()
    params = {name: float(optax.tree.norm(tree)) for name, tree in whole[0].items()}
    found = {"logged": logged, "norms": params}
    expected = json.loads(RECIPE.read_text())
    assert logged[0]["train/loss"] > 2 * logged[-1]["val/loss"]
    # limited to AVX2, AVX and SSE4.2 (--xla_cpu_max_isa), an Intel Xeon differed from AVX-512 by up to 1.3e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)
    shutil.rmtree(tmp_path / "run/checkpoints/60")
    again, resumed = train()
    assert again == logged
    assert_trees_equal(resumed, whole)


def test_python_looks_through_a_layer_once(monkeypatch):
    """Two layers of two halves are four of them: half a second at the start of a run, more for a deep model."""
    seen = []
    plain = attention.reference
    backend = lambda q, *rest, **more: seen.append(q.shape) or plain(q, *rest, **more)  # noqa: E731
    monkeypatch.setitem(attention.BACKENDS, "reference", backend)
    make_step(TINY).jitted.lower(
        make_state(TINY), np.zeros((1, 8, 17), np.int32), np.int32(1), make_step(TINY).dials(0)
    )
    assert [shape for shape in seen if shape[1] > 1] == [(4, 16, 4, 8)]  # of length 1: where weights are made


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)]


@pytest.mark.long
def test_sharding_is_a_layout_not_an_algorithm():
    cfg = change(TINY, model__dropout=0.2, model__n_layer=1)  # the masks too; the tests below go without
    expected, expected_losses = take_steps(cfg, 3)
    for data, fsdp, tensor in MESHES:
        state, losses = take_steps(change(cfg, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor), 3)
        np.testing.assert_allclose(losses, expected_losses, atol=2e-6, err_msg=f"{data} {fsdp} {tensor}")
        # Adam divides by the root of a tiny second moment: rounding in a gradient near zero grows to 1e-4 of a step
        assert_trees_close(state.params, expected.params, 2e-5)
        whole = state.params["h"]["mlp"]["c_fc"]["kernel"]
        part = whole.addressable_shards[0].data
        assert whole.size == part.size * fsdp * tensor
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == whole.shape]
        assert len(moments) == 2
        assert all(m.sharding == whole.sharding for m in moments)


@pytest.mark.parametrize(
    "optimizer", ["muon", pytest.param("lion", marks=pytest.mark.slow), pytest.param("sgd", marks=pytest.mark.slow)]
)
@pytest.mark.long
def test_every_optimizer_shards(optimizer):
    cfg = change(TINY, optim__name=optimizer, model__n_layer=1)
    expected, _ = take_steps(cfg, 2)
    state, _ = take_steps(change(cfg, mesh__data=2, mesh__fsdp=2, mesh__tensor=2), 2)
    # lion takes the sign of what may be zero to rounding: one step's length apart is then all that can be said
    assert_trees_close(state.params, expected.params, 2.1e-3 if optimizer == "lion" else 5e-5)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 1), (2, 2, 2)])
@pytest.mark.long
def test_accumulated_micro_batches_equal_one_batch(mesh):
    expected, expected_losses = take_steps(TINY, 3)
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    state, losses = take_steps(change(TINY, train__micro_batch=4, **sizes), 3)
    np.testing.assert_allclose(losses, expected_losses, atol=2e-6)
    assert_trees_close(state.params, expected.params, 2e-5)


@pytest.mark.parametrize("micro_batch", [0, 4])
@pytest.mark.long
def test_each_device_calls_cudnn_with_its_own_part(monkeypatch, micro_batch):
    """XLA cannot split that call beside an axis that is split by hand, as with micro-batches: no step would compile."""
    cfg = change(TINY, train__micro_batch=micro_batch, model__attention="xla", model__n_layer=1)
    expected, expected_losses = take_steps(cfg, 2)
    attend, by_hand = jax.nn.dot_product_attention, []

    def stand_in(*args, implementation, **kind):
        assert implementation == "cudnn"
        mesh = jax.sharding.get_abstract_mesh()
        by_hand.append(set(mesh.axis_names) == set(mesh.manual_axes))
        return attend(*args, implementation="xla", **kind)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setitem(attention.BACKENDS, "xla", attention.BACKENDS["cudnn"])
    state, losses = take_steps(change(cfg, mesh__data=2, mesh__tensor=2), 2)
    assert by_hand
    assert all(by_hand)
    np.testing.assert_allclose(losses, expected_losses, atol=2e-6)
    assert_trees_close(state.params, expected.params, 2e-5)


def compiled_step(cfg) -> str:
    """The text of the program of a step of TINY, changed, with shapes alone."""
    state, tokens = make_step(cfg).state, jax.ShapeDtypeStruct((1, 8, 17), np.int32)
    step = make_step(cfg)
    return step.jitted.lower(state, tokens, np.int32(1), step.dials(0)).compile().as_text()


def test_devices_that_split_the_batch_exchange_gradients_alone():
    """No activation is gathered: what `linear` tells XLA of one device's memory order would have it do so."""
    text = compiled_step(change(TINY, mesh__data=2, model__attention="reference"))
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_gradients_of_micro_batches_meet_once_a_step():
    """No sum over devices in a loop of the compiled step: not one a micro-batch, and not one a layer."""
    cfg = change(TINY, train__micro_batch=4, mesh__data=2, model__scan_unroll=2, model__attention="reference")
    text = compiled_step(cfg)
    bodies = re.findall(r"body=%?([\w.\-]+)", text)
    parts = {part.split()[0].lstrip("%"): part for part in text.split("\n\n")[1:] if part.strip()}
    assert bodies
    assert "all-reduce" in text
    assert not [body for body in bodies if "all-reduce" in parts[body]]


@pytest.mark.long
def test_update_is_a_function_that_vmap_takes():
    """Four runs with seeds and learning rates of their own, together, are the four runs alone."""
    cfg, how = execution.choose(change(TINY, model__n_layer=1), "cpu")
    objective = language_model.next_token(cfg.model)
    gradients = make_gradients(cfg, make_mesh(cfg.mesh), objective, how)
    rows = jnp.asarray(np.random.default_rng(0).integers(0, 65, (3, 8, 17)), jnp.int32)

    def run(seed, rate):
        tx = make_optimizer(replace(cfg.optim, learning_rate=rate), 3)
        state = first_state(tx, objective, jax.random.key(seed))
        for batch in rows:
            state, metrics = update(tx, gradients, state, batch, None)
        return state, metrics

    seeds, rates = jnp.arange(4), jnp.float32([1e-3, 2e-3, 4e-3, 8e-3])
    together, losses = jax.jit(jax.vmap(run))(seeds, rates)
    alone = jax.jit(run)
    for i in range(4):
        state, metrics = alone(seeds[i], rates[i])
        np.testing.assert_allclose(losses["loss"][i], metrics["loss"], atol=2e-6)
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], together.params), state.params, 2e-5)
    assert len({float(loss) for loss in losses["loss"]}) == 4


@pytest.mark.parametrize("per_dispatch", [3, 8])
@pytest.mark.long
def test_steps_per_dispatch_changes_no_number(per_dispatch):
    cfg = change(TINY, model__dropout=0.1, model__n_layer=1)
    expected, expected_losses = take_steps(cfg, 10)
    state, losses = take_steps(cfg, 10, per_dispatch)
    np.testing.assert_allclose(losses, expected_losses, atol=2e-6)
    assert_trees_close(state.params, expected.params, 2e-5)


@pytest.mark.parametrize(
    ("platform", "settings", "expected"),
    [
        ("cpu", {}, 8),
        ("gpu", {}, 32),
        ("tpu", {}, 1),
        ("gpu", {"train__steps_per_dispatch": 3}, 3),
        ("cpu", {"train__batch_size": 1200}, 1),
        ("gpu", {"train__batch_size": 1200}, 1),
    ],
)
def test_small_steps_are_dispatched_together(platform, settings, expected):
    _, how = execution.choose(change(Config(), model__vocab_size=65, **settings), platform)
    assert how.steps_per_dispatch == expected


def test_metrics_that_are_there_are_read_at_once(tmp_path):
    """Read with those of the next call instead, they would be counted in the wrong time."""
    done = {name: jnp.ones(2).block_until_ready() for name in ("loss", "grad_norm", "learning_rate")}
    cfg = change(TINY, train__log_every=1)
    with Recording(tmp_path, cfg.train) as run:
        reader = loop._Reader(cfg, SimpleNamespace(tokens_per_step=128), run, Progress("step", 10))  # pyright: ignore
        reader.add(0, 2, done)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_compiling_counts_neither_in_the_speed_nor_in_the_time_left(train, monkeypatch, capsys):
    """By a clock that goes on by a hundredth of a second when it is read, and by a thousand when a step is compiled."""
    now = [0.0]

    def tick() -> float:
        now[0] += 0.01
        return now[0]

    def slow(*args, **kwargs):
        now[0] += 1000
        return CompiledStep(*args, **kwargs)

    for module in (loop, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=tick))
    monkeypatch.setattr(loop, "CompiledStep", slow)
    assert train("--train.steps", "200", "--train.save-every", "0", "--train.eval-every", "0", "--run-dir", "r") == 0
    left = int(re.search(r"step \d+/200 .* left (\d+) s", capsys.readouterr().err)[1])
    assert left < 100
    assert rows("r")[0]["tokens_per_second"] > 1000


def test_a_long_run_without_a_terminal_says_something_every_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bar = Progress("step", 100_000, patience=0)
    for step in range(1, 151):
        now[0] += 1
        bar.update(step, "loss 1.0")
    assert re.findall(r"step (\d+)/", capsys.readouterr().err) == ["1", "61", "121"]


@pytest.mark.long
def test_the_second_program_takes_over_and_gives_the_same_bits(capfd):
    """Else a run that goes on from a checkpoint would differ from one that was never stopped."""
    cfg = change(TINY, model__dropout=0.2, model__n_layer=1, optim__name="muon")
    tokens = np.random.default_rng(0).integers(0, 65, (2, 8, 17), dtype=np.int32)
    dials = make_step(cfg, 2).dials
    step = CompiledStep(make_step(cfg, 2), make_state(cfg), tokens)  # pyright: ignore[reportArgumentType]

    def three_steps():
        state, _ = step(make_state(cfg), tokens, 2, dials(0))
        state, metrics = step(state, tokens, 1, dials(2))
        return state, metrics, step._program.memory_analysis().temp_size_in_bytes

    *expected, before = three_steps()
    step.improve(at_once=True)
    *state, after = three_steps()
    assert after > 1.2 * before
    assert_trees_equal(state, expected)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (memory, "free", lambda: 2**10),
        (execution, "RECOMPILE_TEMPORARY", -1),
        (CompiledStep, "_compile_apart", lambda self: 1 / 0),  # an XLA without that option
        (execution, "RECOMPILE_COST", execution.RECOMPILE_COST),  # nothing changed: there is one
    ],
)
def test_no_second_program_where_memory_is_scarce_or_xla_refuses(monkeypatch, place, name, value):
    monkeypatch.setattr(place, name, value)
    x, rows = jnp.ones((64, 64)), jnp.ones(1)
    step = CompiledStep(as_step(lambda x, rows, n, dials: (jnp.sin(x @ x) @ x, {})), x, rows)  # pyright: ignore
    first, expected = step._program, step(x, rows, 1, ())  # pyright: ignore
    step.improve(at_once=True)
    assert_trees_equal(step(x, rows, 1, ()), expected)  # pyright: ignore
    assert (step._program is first) == (name != "RECOMPILE_COST")


def as_step(function: Any) -> TrainStep:
    """Any function of (state, rows, n, dials) as a step that may be compiled twice."""
    _, how = execution.choose(TINY, "cpu")
    return TrainStep(jax.jit(function), None, None, None, how, lambda first: ())  # pyright: ignore[reportArgumentType]


def test_a_signal_is_heard_while_the_step_is_compiled():
    """XLA takes half a minute for 124M parameters, and minutes for some shapes."""
    signalled = threading.Event()

    class Step:
        def lower(self, *_):
            return self

        def compile(self):
            os.kill(os.getpid(), signal.SIGTERM)
            assert signalled.wait(60), "the program was waited for"

    with stop_on_signals(str) as stop:
        _, how = execution.choose(TINY, "cpu")
        step = TrainStep(Step(), None, None, None, how, lambda first: ())  # pyright: ignore[reportArgumentType]
        CompiledStep(step, jnp.ones(()), jnp.ones(1), stop=stop)  # pyright: ignore[reportArgumentType]
        assert stop.received == signal.SIGTERM
        signalled.set()


@pytest.mark.parametrize("reader", ["there", "gone"])  # as `2>&1 | tee log`, where Ctrl-C ends tee too
@pytest.mark.long
def test_a_step_that_hears_no_signal_is_spoken_for_and_ended_by_the_second(reader, popen):
    deep = (
        "import hashlib; from nanogpt_jax.host.signals import stop_on_signals\n"
        "with stop_on_signals(lambda: 'the last checkpoint is step 8'):\n"
        "    print('inside', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"  # minutes, in which Python calls no handler
    )
    command = [sys.executable, "-c", deep]
    process = popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "inside\n"
    if reader == "gone":
        process.stderr.close()
    process.send_signal(signal.SIGINT)
    if reader == "there":
        said = process.stderr.readline()
        assert said.startswith("SIGINT: saves and ends when the step under way is done; once more ends at once")
    else:
        time.sleep(signals.PATIENCE + 1)  # until it would have spoken
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    if reader == "there":
        assert process.stderr.read() == "ended at once; the last checkpoint is step 8\n"


@pytest.mark.parametrize(
    ("during", "words"),
    [
        (
            "save",
            "nothing was saved in r\nstart over with the same command: nanogpt-jax train --data.* --resume never$",
        ),
        (
            "wait",
            r"the last checkpoint in r is step \d+\ngo on with the same command: (?!.*--resume)nanogpt-jax train --",
        ),
    ],
)
def test_a_second_signal_says_where_the_run_stands(train, monkeypatch, capsys, during, words):
    """Before the save that the first one asked for, and while it is under way."""
    method = getattr(Checkpointer, during)

    def interrupted(self, *args):
        if during == "save" or self.latest is not None:
            os.kill(os.getpid(), signal.SIGINT)
        return method(self, *args)

    interrupt_at(monkeypatch, batches, 9)  # when the step is compiled
    monkeypatch.setattr(Checkpointer, during, interrupted)
    monkeypatch.setattr(signals, "PATIENCE", 100)  # else it would end these tests if the save takes longer
    flags = "--train.steps 1000 --train.save-every 0 --train.eval-every 0 --run-dir r --resume never".split()
    assert cli._answer(lambda _: train(*flags), []) == 130
    said = capsys.readouterr().err
    assert re.search(f"^ended at once; {words}", said, re.M), said
    assert checkpoint_steps(Path("r")) == [int(step) for step in re.findall("is step (.*)", said)]


def test_a_closed_terminal_is_one_signal_however_often_it_comes():
    """Its shell sends one and the kernel another; and what whoever started us has us ignore stays ignored."""
    before = {s: signal.signal(s, signal.SIG_DFL) for s in signals.LISTENED}
    try:
        with stop_on_signals(str) as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0.01)
            assert stop.received == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        for number in signals.LISTENED:
            signal.signal(number, signal.SIG_IGN)
        with stop_on_signals(str) as stop:
            for number in signals.LISTENED:
                os.kill(os.getpid(), number)
                assert signal.getsignal(number) == signal.SIG_IGN
            time.sleep(0.01)
            assert stop.received is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_nor_does_it_end_a_step_that_hears_no_signal(monkeypatch):
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(signals, "PATIENCE", 0.001)
    reading, writing = socket.socketpair()
    answer = threading.Thread(target=signals._answer, args=[reading, str])
    answer.start()
    with writing:
        for _ in range(3):
            writing.send(bytes([signal.SIGHUP]))
        answer.join(0.1)
        assert not ends
        writing.send(bytes([signal.SIGINT]))
        answer.join(10)
        assert ends == [128 + signal.SIGHUP]


def test_a_run_that_wants_more_memory_than_is_free_says_so(train, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free", lambda: 1000)
    assert train("--train.steps", "2", "--run-dir", "r") == 0
    assert re.search(r"note: a step takes 0\.\d GB of memory, and about 0\.0 are free; with", capsys.readouterr().err)


def test_a_step_that_takes_minutes_is_announced(train, monkeypatch, capsys):
    assert train("--train.steps", "1", "--run-dir", "quick") == 0
    assert "minutes" not in capsys.readouterr().err
    monkeypatch.setattr(execution, "CORE_FLOPS", 100.0)
    assert train("--train.steps", "1", "--run-dir", "slow") == 0
    said = capsys.readouterr().err
    assert re.search(
        r"note: at 0 GFLOP/s a core, a step takes \d+ minutes on this machine; with train\.batch_size", said
    )


def test_several_devices_have_no_second_program():
    mesh = make_mesh(change(TINY, mesh__data=2).mesh)
    x = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, P("data")))
    step = CompiledStep(as_step(lambda x, rows, n, dials: (x @ x, {})), x, jnp.ones(1))  # pyright: ignore
    step.improve(at_once=True)
    assert step._second is None


def test_free_memory_is_what_the_control_groups_leave(monkeypatch, tmp_path):
    for name in ("MEMORY", "OWN_GROUPS", "GROUPS"):
        monkeypatch.setattr(memory, name, tmp_path / name)
    (tmp_path / "MEMORY").write_text("MemTotal: 16000 kB\nMemAvailable:   8000 kB\n")
    (tmp_path / "OWN_GROUPS").write_text("3:cpu:/\n2:memory:/old\n0::/job/step\n")
    job, old = tmp_path / "GROUPS" / "job", tmp_path / "GROUPS" / "memory"
    (job / "step").mkdir(parents=True)
    old.mkdir()
    assert memory.free() == 8000 * 1024
    (job / "memory.current").write_text("1000000\n")
    (job / "memory.max").write_text("max\n")
    assert memory.free() == 8000 * 1024
    (job / "memory.max").write_text("6000000\n")  # of the group above the process's own
    assert memory.free() == 5_000_000
    (job / "memory.stat").write_text("anon 5\ninactive_file 500000\n")
    assert memory.free() == 5_500_000
    (old / "memory.usage_in_bytes").write_text("1000000\n")
    (old / "memory.limit_in_bytes").write_text("3000000\n")
    assert memory.free() == 2_000_000
    (tmp_path / "MEMORY").unlink()
    assert memory.free() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@pytest.mark.long
def test_only_a_long_run_is_compiled_twice(train, monkeypatch):
    asked = []
    monkeypatch.setattr(CompiledStep, "improve", lambda self: asked.append(self))
    monkeypatch.setattr(execution, "RECOMPILE_AFTER", 0)
    flags = "--train.steps 20 --train.save-every 0 --train.eval-every 0 --run-dir".split()
    assert train(*flags, "short") == 0
    assert not asked
    monkeypatch.setattr(execution, "RECOMPILE_LEFT", 0)
    assert train(*flags, "off", "--train.recompile", "off") == 0
    assert not asked
    assert train(*flags, "long") == 0
    assert asked


def test_a_run_takes_the_second_program_and_says_so(train, monkeypatch, capsys):
    improve = CompiledStep.improve
    monkeypatch.setattr(
        CompiledStep, "improve", lambda self: improve(self) or wait([self._second] if self._second else [])
    )
    for name in ("RECOMPILE_AFTER", "RECOMPILE_LEFT", "RECOMPILE_TOLD"):
        monkeypatch.setattr(execution, name, 0)
    assert train(*"--train.steps 60 --train.save-every 0 --train.eval-every 0 --run-dir r".split()) == 0
    told = re.findall(
        r"step \d+: (a faster program .* is being compiled, in about|a second, faster program)", capsys.readouterr().err
    )
    assert [words.split()[1] for words in told] == ["faster", "second,"]


RESIDENT = """
import resource
from nanogpt_jax.distributed.mesh import start
assert start() == "cpu"
import jax
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
def run(n):
    for _ in range(3):
        program(jax.numpy.ones((n, 8))).block_until_ready()
program = jax.jit(lambda x: (x @ x.T) @ x)  # n^2 numbers of temporary memory, as one product is another's input
run(16)
before = resident()
run(8192)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory by its own rules")
@pytest.mark.parametrize("kept", [True, False])
def test_a_step_takes_the_memory_of_the_last_one(kept, clean_env):
    env = clean_env if kept else {**clean_env, "MALLOC_TRIM_THRESHOLD_": "131072"}  # a user's own setting stands
    run = subprocess.run([sys.executable, "-c", RESIDENT], env=env, capture_output=True, text=True, check=True)
    assert (int(run.stdout) > 128 * 2**20) == kept, run.stdout  # of 256 MiB


def test_training_learns_and_the_step_is_donated():
    flags = {"optim__learning_rate": 1e-2, "train__steps": 60}
    state, losses = take_steps(change(TINY, **flags), 60, stream=np.arange(2000) % 7)
    assert losses[0] > 4
    assert losses[-1] < 0.5
    assert int(state.step) == 60
    old = make_state(TINY)
    make_step(TINY).jitted(old, np.zeros((1, 8, 17), np.int32), np.int32(1), make_step(TINY).dials(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(old))


def test_initial_state_depends_on_the_seed_alone():
    one = make_state(TINY)
    assert_trees_equal(one.params, make_state(TINY, mesh=make_mesh(config.MeshConfig(2, 2, 2))).params)
    other = make_state(change(TINY, train__seed=1))
    assert not np.array_equal(one.params["wte"], other.params["wte"])


# ---- optimizer and schedule -----------------------------------------------------------------------------------------


def test_only_matrices_decay():
    mask = decay_mask(jax.eval_shape(lambda: gpt2.init_params(TINY.model, jax.random.key(0))))
    decayed = {jax.tree_util.keystr(p, simple=True, separator="/") for p, m in jax.tree.leaves_with_path(mask) if m}
    assert decayed == {
        "wte", "wpe", "h/attn/c_attn/kernel", "h/attn/c_proj/kernel", "h/mlp/c_fc/kernel", "h/mlp/c_proj/kernel",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_decay_shrinks_matrices_and_leaves_norms(name):
    cfg = OptimConfig(name=name, weight_decay=0.5, warmup_steps=0, schedule="constant", learning_rate=0.1)
    params = jax.jit(lambda: gpt2.init_params(TINY.model, jax.random.key(0)))()
    tx = make_optimizer(cfg, 10)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), jax.jit(tx.init)(params), params)
    after = optax.apply_updates(params, updates)
    kernel = params["h"]["mlp"]["c_fc"]["kernel"]
    np.testing.assert_allclose(after["h"]["mlp"]["c_fc"]["kernel"], kernel * (1 - 0.1 * 0.5), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(after["ln_f"]["scale"], params["ln_f"]["scale"])


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1, 0.1), ("constant", 1, 1)]
)
def test_schedules(schedule, middle, last):
    rate = make_schedule(OptimConfig(learning_rate=2.0, min_learning_rate=0.1, warmup_steps=10, schedule=schedule), 110)
    np.testing.assert_allclose([float(rate(s)) for s in (0, 4, 9)], [0.2, 1.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose([float(rate(60)), float(rate(110))], [2 * middle, 2 * last], rtol=1e-6)


@pytest.mark.parametrize("size", [0.0, 0.01, 100.0, math.nan])
def test_gradients_are_clipped_by_their_global_norm(size):
    params = {"a": jnp.zeros(3), "kernel": jnp.zeros(4)}
    grads = jax.tree.map(lambda x: jnp.full_like(x, size), params)
    cfg = OptimConfig(name="sgd", beta1=0.0, weight_decay=0.0, warmup_steps=0, learning_rate=1.0, grad_clip=0.5)
    updates, _ = make_optimizer(cfg, 10).update(grads, make_optimizer(cfg, 10).init(params), params)
    np.testing.assert_allclose(float(optax.tree.norm(updates)), min(size * math.sqrt(7), 0.5), rtol=1e-5)
    theirs = optax.clip_by_global_norm(0.5)
    jax.tree.map(
        np.testing.assert_allclose, updates, theirs.update(jax.tree.map(jnp.negative, grads), theirs.init(params))[0]
    )


# ---- mesh and sharding ----------------------------------------------------------------------------------------------


def test_mesh_sizes():
    assert dict(make_mesh(config.MeshConfig(data=-1, tensor=2)).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    with pytest.raises(UserError, match=r"mesh data=2 fsdp=4 tensor=2 needs 16 devices, but only 8 are visible"):
        make_mesh(config.MeshConfig(2, 4, 2))


def test_unknown_parameters_and_odd_dimensions_are_refused():
    mesh = make_mesh(config.MeshConfig(2, 2, 2))
    with pytest.raises(UserError, match="no sharding rule matches parameter h/extra/kernel"):
        spec_for("h/extra/kernel", (2, 3), mesh)
    with pytest.raises(
        UserError, match=r"mesh.fsdp=2 does not divide a dimension of 33 of wpe \(16, 33\)\n +nearest: 1 or 3$"
    ):
        spec_for("wpe", (16, 33), mesh)


# ---- the loop -------------------------------------------------------------------------------------------------------


@given(
    start=st.integers(0, 50), steps=st.integers(0, 60), most=st.integers(1, 9),
    every=st.lists(st.integers(0, 13), max_size=3),
)  # fmt: skip
def test_dispatches_cover_every_step_once_and_stop_where_something_happens(start, steps, most, every):
    plan = list(loop.calls(start, steps, most, tuple(every)))
    assert [s for first, n in plan for s in range(first, first + n)] == list(range(start, steps))
    assert all(1 <= n <= most for _, n in plan)
    inside = {s for first, n in plan for s in range(first + 1, first + n)}
    assert not any(s % e == 0 for s in inside for e in every if e)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(*flags) runs train.py's main in an empty directory on a small text and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanogpt_jax.inference.sampler.opening_and_continuation", lambda *_, **__: "")  # not asked for
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    base = (
        "--data.source text.txt --model.block-size 16 --model.n-layer 1 --model.n-head 2 --model.n-embd 16 "
        "--model.dropout 0.1 --optim.warmup-steps 2 --train.batch-size 4 --train.eval-every 10 --train.save-every 4 "
        "--train.log-every 1 --optim.learning-rate 1e-2 --optim.min-learning-rate 0.1"
    ).split()

    def main(*flags: str) -> int:
        return door("train").main(with_flags(base, flags))

    return main


def rows(run: str) -> list[dict]:
    return metrics.read_metrics(Path(run) / "metrics.jsonl")


def final_params(run: str):
    return load(run, "latest")


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(train, monkeypatch, capsys):
    assert train("--train.steps", "20", "--run-dir", "whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, batches, 3)
        assert train("--train.steps", "20", "--run-dir", "cut") == 130
    assert "SIGINT: saved step" in capsys.readouterr().out
    assert checkpoint_steps(Path("cut"))[-1] < 20
    # a line after the checkpoint, as a crash leaves it, and one that it cut short
    with open("cut/metrics.jsonl", "a") as file:
        file.write('{"step": 19, "train/loss": 9.0}\n{"step": 2')
    assert train("--train.steps", "20", "--run-dir", "cut", "--resume", "must") == 0
    assert numbers("cut") == numbers("whole")
    assert [row["step"] for row in rows("whole") if "train/loss" in row] == list(range(1, 21))
    assert_trees_equal(final_params("cut"), final_params("whole"))


@pytest.mark.long
def test_resume_on_another_mesh_is_the_same_to_rounding(train):
    assert train("--train.steps", "8", "--run-dir", "two", "--optim.schedule", "constant") == 0
    assert train("--train.steps", "12", "--run-dir", "a", "--optim.schedule", "constant") == 0
    more = ("--train.steps", "12", "--optim.schedule", "constant", "--mesh.data", "2", "--mesh.fsdp", "2")
    assert train(*more, "--run-dir", "two") == 0
    assert_trees_close(final_params("two")[0], final_params("a")[0], 2e-5)
    assert [r["step"] for r in rows("two") if "train/loss" in r] == list(range(1, 13))


@pytest.mark.long
def test_a_save_is_a_copy_of_its_moment(train):
    """The state is donated to the next step while orbax still writes: the checkpoint must not see that step."""
    params = {}
    for steps in (4, 8):
        run = f"only{steps}"
        flags = ("--optim.schedule", "constant", "--train.keep", "9", "--run-dir")
        assert train("--train.steps", str(steps), *flags, run) == 0
        params[steps] = final_params(run)[0]
    assert train("--train.steps", "12", "--optim.schedule", "constant", "--train.keep", "9", "--run-dir", "long") == 0
    for steps, expected in params.items():
        assert_trees_equal(load("long", str(steps))[0], expected)


def test_newest_and_best_checkpoints_are_kept(train):
    # a rate that grows this high makes the loss go up again, so that the best is not among the newest
    flags = "--train.steps 60 --train.keep 2 --optim.learning-rate 4 --optim.warmup-steps 64".split()
    flags += "--optim.schedule constant".split()
    assert train(*flags, "--run-dir", "r") == 0
    losses = {row["step"]: row["val/loss"] for row in rows("r") if "val/loss" in row}
    assert list(losses) == [10, 20, 30, 40, 50, 60]
    best = min(losses, key=lambda s: losses[s])
    assert checkpoint_steps(Path("r")) == sorted({best, 56, 60})
    assert load("r")[1] == best
    # a resumed run knows the best from before
    assert train(*flags, "--train.steps", "64", "--run-dir", "r") == 0
    assert checkpoint_steps(Path("r")) == sorted({best, 60, 64})


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(train):
    flags = "--train.steps 60 --optim.learning-rate 1e30 --optim.schedule constant --optim.grad-clip 0".split()
    with pytest.raises(UserError, match=r"step \d+: the gradient norm is nan; the run stops"):
        train(*flags, "--run-dir", "r")
    assert all(math.isfinite(row.get("train/loss", 0)) for row in rows("r"))
    for step in checkpoint_steps(Path("r")):
        params, _ = load("r", str(step))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("start", "saved", "words"),
    [
        (0, [], "nothing was saved before\n       try a lower optim.learning_rate than 0.02, or more optim.warmup"),
        (
            0,
            [2, 4],
            "kept in a b/checkpoints from before: 2 and 4\n       try a lower optim.learning_rate than 0.02, or",
        ),
        (4, [2, 4], "the first step after checkpoint 4: if that is damaged, delete its folder a b/checkpoints/4"),
    ],
)
def test_a_run_that_diverges_names_the_checkpoints_that_there_are(start, saved, words):
    saved = [Path("a b/checkpoints") / str(step) for step in saved]
    error = loop.not_finite(Config(), start, 5, saved, "the loss is nan")
    assert str(error).startswith("step 5: the loss is nan; the run stops here")
    assert words in str(error)


SPOILT = {  # at which update, what -> how the run ends and which checkpoints there are
    "the last update": (12, "updates", 12, "the validation loss is nan", [4, 8]),
    "the optimizer's state alone": (4, "state", 12, "there are nan or inf in the optimizer's state", []),
    "the last update, which nobody measures": (12, "updates", 12, "there are nan or inf in the parameters", [4, 8]),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_state_that_is_not_finite_is_never_saved(case, train, monkeypatch, capsys):
    at, what, steps, words, saved = SPOILT[case]
    if "nobody" in case:
        monkeypatch.setattr(language_model, "evaluate", lambda *_, **__: {"loss": 1.0, "bits_per_byte": 1.0})

    def spoilt(*args):
        tx = make_optimizer(*args)

        def update(updates, state, params=None):
            updates, inner = tx.update(updates, state["inner"], params)
            bad = jnp.where(state["count"] == at - 1, jnp.inf, 0.0)
            if what == "updates":
                updates = jax.tree.map(lambda x: x + bad, updates)
            bad = bad if what == "state" else jnp.zeros(())
            return updates, {"inner": inner, "count": state["count"] + 1, "sum": state["sum"] + bad}

        return optax.GradientTransformation(
            lambda params: {"inner": tx.init(params), "count": jnp.int32(0), "sum": jnp.zeros(())}, update
        )

    monkeypatch.setattr("nanogpt_jax.training.optim.make_optimizer", spoilt)
    with pytest.raises(UserError, match=f"step {at}: {words}"):
        train("--train.steps", str(steps), "--run-dir", "r", "--train.eval-every", "0")
    assert checkpoint_steps(Path("r")) == saved
    assert "done" not in capsys.readouterr().out
    for line in Path("r/metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)


def test_a_stopped_run_whose_state_is_not_finite_is_not_saved(train, monkeypatch):
    interrupt_at(monkeypatch, batches, 3)
    monkeypatch.setattr(loop, "are_finite", lambda _: False)
    with pytest.raises(UserError, match=r"step \d+: there are nan or inf in the parameters"):
        train("--train.steps", "20", "--run-dir", "r")
    assert checkpoint_steps(Path("r")) == []


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_number_among_many_is_found(bad):
    tree = {"a": jnp.ones((3, 50)), "b": [jnp.ones(7, jnp.bfloat16)], "steps": jnp.int32(2**31 - 1)}
    assert loop.are_finite(tree)
    assert loop.are_finite({})
    assert not loop.are_finite({**tree, "a": tree["a"].at[2, 49].set(bad)})
    assert not loop.are_finite({**tree, "b": [tree["b"][0].at[0].set(bad)]})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved() makes a separate run with checkpoints 10 and 20, and returns its settings."""
    original = tmp_path_factory.mktemp("saved") / "run"
    cfg = replace(TINY, model=replace(TINY.model, n_layer=1, n_embd=8))
    cfg = replace(cfg, train=replace(cfg.train, steps=20))
    with Checkpointer(original, keep=2) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, trees(make_state(cfg)), {"best_val_loss": None}, 1 / step)
            checkpoints.wait()
    (original / "config.json").write_text(config.to_json(cfg))

    def copy():
        return Path(shutil.copytree(original, tmp_path_factory.mktemp("run") / "run")), cfg

    return copy


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_is_found_wherever_it_is(saved, monkeypatch):
    run, cfg = saved()
    assert checksums.damage(run / "checkpoints/20") == ""
    parts = sorted(p for p in (run / "checkpoints/20").rglob("*") if p.is_file() and p.stat().st_size)
    chance = random.Random(0)
    for path in parts:
        bit = chance.randrange(8 * path.stat().st_size)
        flip(path, bit)
        assert str(path) in checksums.damage(run / "checkpoints/20")
        flip(path, bit)
    assert len(parts) > 20
    bad = run / "checkpoints/20/opt_state/_METADATA"
    flip(bad, 5)
    load(run)  # which needs none of it
    shapes = trees(make_step(cfg).state)
    delete = re.escape(f"rm -r {run / 'checkpoints/20'}")
    with Checkpointer(run, 2) as checkpoints, pytest.raises(UserError, match=f"{bad} has .*checksum(.|\n)*{delete}\n"):
        checkpoints.restore(shapes)
    bad = max((run / "checkpoints/20/params").rglob("*"), key=lambda p: p.stat().st_size)
    flip(bad, 5)
    monkeypatch.setattr(sys, "argv", ["sample.py", "a run"])
    with pytest.raises(UserError, match=rf"{bad} has .*\n.*: python sample.py 'a run' --checkpoint=10$"):
        load(run)
    with pytest.raises(UserError, match=rf"{bad} has .*\n.*take checkpoint 10: eval --checkpoint=10$"):
        load(run, command="eval")
    with pytest.raises(UserError, match=rf"{bad} has .*\n.*rm -r {run}/checkpoints/20\n"):
        load_first_params(run, gpt2.param_shapes(cfg.model))
    shutil.rmtree(run / "checkpoints/10")
    with pytest.raises(UserError, match=rf"{bad} has .*\n.*no other"):
        load(run)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "checksums.json").unlink(), "checksums.json is missing"),
        (lambda folder: (folder / "checksums.json").write_text("[" * 100_000), "checksums.json holds no checksums"),
        (lambda folder: (folder / "params/_METADATA").unlink(), "params/_METADATA is missing"),
        (lambda folder: os.truncate(folder / "params/_METADATA", 9), "params/_METADATA has 9 bytes instead of"),
        (lambda folder: (folder / "params/link").symlink_to("/dev/zero"), "params/link is a link"),
        (lambda folder: os.mkfifo(folder / "params/pipe"), "params/pipe is a pipe"),
        (lambda folder: (folder / "metrics/metrics").write_text("{}"), "metrics/metrics has 2 bytes"),
    ],
)
def test_other_damage_is_found_too(saved, spoil, words):
    run, _ = saved()
    spoil(run / "checkpoints/20")
    with pytest.raises(UserError, match=rf"checkpoints/20 is damaged\n.*checkpoints/20/{words}"):
        load(run)


def test_every_file_that_is_read_is_verified_once(saved, monkeypatch):
    run, cfg = saved()
    verified, checksum = [], checksums._checksum

    def count(folder: Path, name: str, start: int) -> int:
        verified.append(str(Path(folder.name, name)))
        return checksum(folder, name, start)

    def files_of(*parts: str) -> list[str]:
        folder = run / "checkpoints"
        found = (path for part in parts for path in [folder / part, *(folder / part).rglob("*")] if path.is_file())
        return sorted(str(path.relative_to(folder)) for path in found if path.stat().st_size)

    monkeypatch.setattr(checksums, "_checksum", count)
    load(run)
    read = files_of("10/metrics", "20/metrics", "20/params", "20/meta", "20/_CHECKPOINT_METADATA")
    assert sorted(verified) == read
    verified.clear()
    with Checkpointer(run, 2) as checkpoints:
        checkpoints.restore(trees(make_step(cfg).state))
    assert sorted(verified) == sorted([*read, *files_of("20/opt_state")])


def test_a_folder_that_cannot_be_listed_is_told_by_its_name(train, monkeypatch):
    assert train("--train.steps", "4", "--run-dir", "r") == 0
    list_, closed = os.listdir, Path("r/checkpoints/4/params")

    def listdir(path="."):  # as for a user who may not
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return list_(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(UserError, match=f"cannot read {closed}: Permission denied"):
        train("--train.steps", "8", "--run-dir", "r")
    with pytest.raises(UserError, match=rf"checkpoints/4 cannot be read\n +{closed} cannot be read: Permission denied"):
        load("r")


def test_another_text_is_told_as_such_although_it_has_other_characters(train):
    assert train("--train.steps", "4", "--run-dir", "r") == 0
    Path("text.txt").write_text(TEXT + "¿Qué?", encoding="utf-8")
    with pytest.raises(UserError, match="the data of r has changed"):
        train("--train.steps", "8", "--run-dir", "r")


def test_a_disk_that_cannot_be_read_is_told_with_the_file(saved, monkeypatch):
    run, _ = saved()

    def fail(data: bytes, *start: int) -> int:
        if start:  # a file's block, and not the list of checksums
            raise OSError(5, "Input/output error")
        return zlib.crc32(data)

    monkeypatch.setattr(checksums, "zlib", SimpleNamespace(crc32=fail))
    wrong = checksums.damage(run / "checkpoints/20", only="metrics")
    assert re.fullmatch(rf"{run}/checkpoints/20/metrics/\S+ cannot be read: Input/output error", wrong)


def test_a_checkpoint_of_an_earlier_version_is_read_and_one_note_says_what_that_means(saved, capsys):
    run, _ = saved()
    (run / "checkpoints/20/checksums.json").unlink()
    meta = run / "checkpoints/20/meta/metadata"
    meta.write_text(json.dumps({"best_val_loss": 0.5}))
    assert load(run)[1] == 20
    assert capsys.readouterr().err.count("note: an earlier version saved") == 1
    flip(run / "checkpoints/20/params/manifest.ocdbt", 5)
    with pytest.raises(UserError, match=r"checkpoints/20 is damaged or of another model\n.*\n.*take checkpoint 10"):
        load(run)


@pytest.mark.parametrize("old", [False, True])
def test_a_good_checkpoint_that_does_not_fit_the_settings_is_not_called_damaged(saved, old):
    run, cfg = saved()
    if old:
        (run / "checkpoints/20/checksums.json").unlink()
        (run / "checkpoints/20/meta/metadata").write_text("{}")
    other = replace(cfg, model=replace(cfg.model, block_size=99))
    shapes = make_step(other).state
    words = r"config.json\n +wpe.* is \(16, 8\) in the checkpoint, and \(99, 8\) by"
    with Checkpointer(run, 2) as resume:
        for read in (
            lambda: load_params(run, gpt2.param_shapes(other.model)),
            lambda: resume.restore({"params": shapes.params, "opt_state": shapes.opt_state}),
        ):
            with pytest.raises(UserError, match=words) as e:
                read()
            assert "rm -r" not in str(e.value)
            assert "checkpoint 10" not in str(e.value)


def test_weights_that_are_not_finite_are_refused_by_name(saved):
    run, _ = saved()
    params, _ = load(run)
    params["ln_f"]["scale"] = params["ln_f"]["scale"].at[3].set(math.nan)
    with Checkpointer(run, keep=3) as checkpoints:
        checkpoints.save(30, {"params": params, "opt_state": {"x": jnp.ones(1)}}, {}, None)
    with pytest.raises(UserError, match=r"checkpoints/30 is not finite: there is nan or inf in ln_f.scale"):
        load(run, "latest")


def test_a_save_that_fails_leaves_no_folder_and_keeps_the_words_of_the_system(saved, monkeypatch):
    run, cfg = saved()
    state = trees(make_state(cfg))

    def full(folder: Path) -> None:
        raise ValueError(f"RESOURCE_EXHAUSTED: Error writing {'x' * 300} [OS error 28: no space left on device]")

    monkeypatch.setattr(checksums, "write", full)
    with Checkpointer(run, 2) as checkpoints:
        checkpoints.save(30, state, {}, None)
        with pytest.raises(
            UserError, match=r"could not save step 30(.|\n)*is step 20\n +No space left on device: RESOU"
        ):
            checkpoints.wait()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10", "20"]


def test_a_run_moves_and_samples_without_its_data(train, tmp_path, capsys):
    def sample_of(run: str) -> str:
        capsys.readouterr()
        assert door("sample").main([run, "--prompt", "El gato", "--max-new-tokens", "40"]) == 0
        return capsys.readouterr().out

    assert train("--train.steps", "4", "--run-dir", "here/run") == 0
    before = sample_of("here/run")
    (tmp_path / "elsewhere").mkdir()
    Path("here/run").rename("elsewhere/moved")
    for gone in ("text.txt", "data"):
        Path(gone).rename(tmp_path / f"hidden-{gone}")
    assert sample_of("elsewhere/moved") == before


def test_metrics_hold_every_promised_key(train):
    assert train("--train.steps", "10", "--run-dir", "r") == 0
    trained, validated = rows("r")[0], rows("r")[-1]
    assert set(trained) == {"step", "train/loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert set(validated) == {"step", "val/loss", "val/perplexity", "val/bits_per_byte"}
    assert math.isclose(validated["val/perplexity"], math.exp(validated["val/loss"]))


def test_tensorboard_files(train):
    assert train("--train.steps", "4", "--run-dir", "r", "--train.tensorboard", "true") == 0
    assert list(Path("r/tensorboard").glob("events.*"))


def test_a_run_of_an_earlier_version_is_sampled_evaluated_and_resumed(tmp_path, monkeypatch, capsys):
    """fixtures/run.tar.gz was written by ad289bd, before `run/` and the seams of a step; so were these figures."""
    with tarfile.open(GOLDEN.with_name("run.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    assert door("sample").main(["run", "--prompt", "El gato", "--max-new-tokens", "20"]) == 0
    assert len(capsys.readouterr().out) == len("El gato") + 20 + 1
    assert cli.command("eval")(["run", "--json", "figures.json"]) == 0
    measured = json.loads(Path("figures.json").read_text())["runs"][0]["loss"]["nats_per_token"]["value"]
    assert math.isclose(measured, 2.6913244627747943, rel_tol=2e-5)
    flags = "--model.n-layer 1 --model.n-head 2 --model.n-embd 16 --model.block-size 16 --train.batch-size 4".split()
    flags += "--data.source text.txt --train.steps 14 --train.eval-every 5 --run-dir run --resume must".split()
    assert door("train").main(flags) == 0
    assert "going on in run from step 10" in capsys.readouterr().out
    assert math.isclose(rows("run")[-1]["val/loss"], 2.4914390480952706, rel_tol=2e-4)
