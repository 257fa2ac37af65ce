"""`optim.skip_spikes`: a step far from those before it changes nothing, and nothing else changes."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import false_skips
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import load, make_state, make_step, numbers, refused, with_flags

from nanogpt_jax import config
from nanogpt_jax.cli import door
from nanogpt_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from nanogpt_jax.data import batches
from nanogpt_jax.host.progress import Progress
from nanogpt_jax.run.metrics import DIVERGED, SKIPPED, read_metrics
from nanogpt_jax.run.recording import Recording
from nanogpt_jax.training import language_model, loop
from nanogpt_jax.training.dials import make_dials, numbers_of, program_of
from nanogpt_jax.training.optim import make_optimizer
from nanogpt_jax.training.spikes import HISTORY, Skipping, counts, skipping
from nanogpt_jax.training.step import TrainStep, update

TINY = Config(
    model=ModelConfig(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_embd=16),
    optim=OptimConfig(name="adamw", learning_rate=1e-2, warmup_steps=3, skip_spikes=8.0),
    train=TrainConfig(steps=300, batch_size=8),
)
LATE, K = 250, 32  # a step by which the loss falls no longer fast; steps in a call


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- the rule -------------------------------------------------------------------------------------------------------


def kept_by(series: np.ndarray, z: float) -> tuple[list[bool], Skipping]:
    """Which of the steps with these [losses, gradient norms] are kept, and the state after the last."""
    tx = skipping(optax.with_extra_args_support(optax.identity()), z)

    def step(state: Skipping, its: jax.Array) -> tuple[Skipping, jax.Array]:
        _, state = tx.update({"x": its[1:]}, state, value=its[0])  # pyright: ignore[reportAssignmentType]
        return state, state.in_a_row == 0

    state, kept = jax.lax.scan(step, tx.init({"x": jnp.zeros(1)}), jnp.asarray(series, jnp.float32))  # pyright: ignore
    return kept.tolist(), state


def test_what_is_skipped_is_what_the_rule_says():
    """The rule once more, in numpy: 600 steps with spikes, falls and what is no number among them."""
    chance = np.random.default_rng(0)
    series = np.exp(chance.normal([1.0, -1.0], [0.05, 0.3], (600, 2)))
    for at in range(140, 600, 20):
        series[at, at // 20 % 2] *= chance.choice([1.3, 3, 10, 1e-3])
    for at, bad in ((3, np.nan), (200, np.nan), (201, np.inf), (202, -np.inf), (203, np.nan), (597, np.nan)):
        series[at, at % 2] = bad
    expected, logs = [], []
    for its in series.astype(np.float32):
        keep = bool(np.isfinite(its).all())
        if keep and len(logs) >= HISTORY:
            last = np.array(logs[-HISTORY:])
            keep = bool((np.log(its) <= last.mean(0) + 4 * last.std(0)).all())
        logs += [np.log(its)] if keep else []
        expected.append(keep)
    kept, state = kept_by(series, 4)
    assert kept == expected
    assert 10 < expected.count(False) < 30
    assert (int(state.kept), int(state.skipped), int(state.in_a_row)) == (len(logs), expected.count(False), 0)
    np.testing.assert_allclose(np.sort(state.seen), np.sort(np.array(logs[-HISTORY:]).T), rtol=1e-5, atol=1e-6)
    # nothing that was skipped is in what the next are compared with: without it, all else is as it was
    assert_equal(kept_by(series[expected], 4)[1].seen, state.seen)
    assert all(kept_by(series[expected], 4)[0])


@pytest.mark.parametrize("constant", [0.0, 1e-8, 3.25])
def test_rounding_is_no_spike(constant):
    series = np.full((HISTORY + 40, 2), constant)
    series[-20:] *= 1 + 1e-4
    assert all(kept_by(series, 3)[0])
    series[-1] += 0.1
    assert kept_by(series, 3)[0].count(False) == 1


@pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(name, marks=pytest.mark.long) for name in ("muon", "lion", "sgd"))]
)
def test_a_skipped_step_changes_no_bit(name):
    """Neither weights nor the optimizer's state, whatever the gradients hold; and only the step's number goes on."""
    cfg = replace(TINY.optim, name=name, freeze_layers=1)
    state, tx = make_state(replace(TINY, optim=cfg)), make_optimizer(cfg, 10)
    state = replace(state, params=jax.tree.map(lambda x: x.at[..., 0].set(-0.0), state.params))

    def step(state, loss, scale):
        grads = lambda params, *_: (loss, jax.tree.map(lambda x: x * scale + scale, params))  # noqa: E731
        return update(tx, grads, state, None, None)  # pyright: ignore[reportArgumentType]

    step = jax.jit(step)
    before, metrics = step(state, 1.0, 0.1)
    assert (metrics["skipped"], metrics["in_a_row"]) == (0, 0)
    assert not np.array_equal(before.params["wte"], state.params["wte"])
    for loss, scale in ((np.nan, 0.1), (np.inf, 0.1), (1.0, np.nan), (1.0, -np.inf), (1.0, 1e38)):
        after, metrics = step(before, loss, scale)
        bits = lambda tree: jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)  # noqa: E731
        assert bits(after.params) == bits(before.params)
        assert bits(after.opt_state.inner) == bits(before.opt_state.inner)
        assert bits(after.opt_state.seen) == bits(before.opt_state.seen)
        assert (metrics["skipped"], metrics["in_a_row"]) == (1, 1)
        assert int(after.step) == 2


# ---- the step -------------------------------------------------------------------------------------------------------


def rows_of(n: int, spoilt: tuple[int, ...] = ()) -> np.ndarray:
    """[n, B, T+1]: rows that mostly count up, and random ones in the spoilt steps (0 is the first)."""
    chance = np.random.default_rng(0)
    B, W, V = TINY.train.batch_size, TINY.model.block_size + 1, TINY.model.vocab_size
    rows = (chance.integers(0, V, (n, B, 1)) + np.arange(W) + 5 * (chance.random((n, B, W)) < 0.2)) % V
    for at in spoilt:
        rows[at] = chance.integers(0, V, (B, W))
    return rows.astype(np.int32)


def take(cfg: Config, rows: np.ndarray, step: TrainStep | None = None) -> tuple[Any, dict[str, np.ndarray]]:
    """The state and the metrics [n] after steps with these rows."""
    step, state, found = step or make_step(cfg, K), make_state(cfg), []
    for first in range(0, len(rows), K):
        n = min(K, len(rows) - first)
        state, metrics = step.jitted(state, whole(rows[first : first + n]), np.int32(n), step.dials(first))
        found.append(jax.tree.map(lambda x, n=n: np.asarray(x)[:n], metrics))
    return state, {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def whole(rows: np.ndarray) -> np.ndarray:
    """The rows of a call, filled up to K steps."""
    return np.concatenate([rows, np.zeros((K - len(rows), *rows.shape[1:]), np.int32)])


def test_off_is_the_program_and_the_state_that_it_was():
    off = replace(TINY, optim=replace(TINY.optim, skip_spikes=0.0))
    step, tx = make_step(off), make_optimizer(off.optim, 300)
    assert type(step.state.opt_state) is tuple
    assert "skip_spikes" not in numbers_of(off.optim)
    assert counts(step.state.opt_state) == {}
    grads = lambda params, *_: (params["wte"].sum(), params)  # noqa: E731
    state, loss = step.state, jax.ShapeDtypeStruct((), np.float32)
    told = jax.make_jaxpr(lambda state, loss: tx.update(state.params, state.opt_state, state.params, value=loss))
    silent = jax.make_jaxpr(lambda state, loss: tx.update(state.params, state.opt_state, state.params))
    assert str(told(state, loss)) == str(silent(state, loss))
    assert set(jax.eval_shape(lambda state: update(tx, grads, state, None, None), state)[1]) == {"loss", "grad_norm"}  # pyright: ignore


def test_an_injected_bad_batch_is_caught_and_with_a_limit_far_away_it_is_not():
    rows, step = rows_of(LATE + 4, spoilt=(LATE, LATE + 1)), make_step(TINY, K)
    _, metrics = take(TINY, rows, step)
    assert np.flatnonzero(np.diff(metrics["skipped"], prepend=0)).tolist() == [LATE, LATE + 1]
    assert metrics["in_a_row"][LATE - 1 :].tolist() == [0, 1, 2, 0, 0]
    before, _ = take(TINY, rows[:LATE], step)
    after, _ = take(TINY, rows[: LATE + 2], step)
    assert_equal(after.params, before.params)
    assert_equal(after.opt_state.inner, before.opt_state.inner)
    assert int(after.step) == LATE + 2
    far = replace(TINY, optim=replace(TINY.optim, skip_spikes=1000.0))
    free, without = take(far, rows[: LATE + 2], replace(step, dials=make_dials(far, K)))
    np.testing.assert_array_equal(without["loss"][: LATE + 1], metrics["loss"][: LATE + 1])
    assert not np.array_equal(free.params["wte"], before.params["wte"])
    assert without["skipped"].max() == 0


@pytest.mark.long
def test_the_same_steps_are_skipped_on_one_two_and_eight_devices():
    rows = rows_of(LATE + 10, spoilt=(LATE, LATE + 3))
    one, expected = take(TINY, rows)
    for data, fsdp, tensor in ((2, 1, 1), (2, 2, 2)):
        mesh = config.MeshConfig(data, fsdp, tensor)
        state, metrics = take(replace(TINY, mesh=mesh), rows)
        np.testing.assert_array_equal(metrics["skipped"], expected["skipped"])
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-3)
        np.testing.assert_allclose(state.opt_state.seen, one.opt_state.seen, atol=2e-2)
        assert state.opt_state.seen.sharding.is_fully_replicated
        moment, kernel = (tree["h"]["mlp"]["c_fc"]["kernel"] for tree in (state.opt_state.inner[1][0].mu, state.params))
        assert moment.sharding == kernel.sharding
    assert expected["skipped"][-1] == 2


@pytest.mark.long
def test_members_with_other_limits_share_a_program():
    """Under vmap, too: z is a number that the step takes."""
    never = replace(TINY, optim=replace(TINY.optim, skip_spikes=1000.0))
    off = replace(TINY, optim=replace(TINY.optim, skip_spikes=0.0))
    assert program_of(TINY) == program_of(never) != program_of(off)
    rows, step = rows_of(K * (LATE // K + 1), spoilt=(LATE,)), make_step(TINY, K)
    both = jax.tree.map(lambda *x: jnp.stack(x), make_state(TINY), make_state(never))
    dials = [make_dials(cfg, K) for cfg in (TINY, never)]
    together = jax.jit(jax.vmap(step.jitted, in_axes=(0, None, None, 0)))
    for first in range(0, len(rows), K):
        own = jax.tree.map(lambda *x: np.stack(x), *(of(first) for of in dials))
        both, metrics = together(both, rows[first : first + K], np.int32(K), own)
    assert metrics["skipped"][:, -1].tolist() == [1, 0]  # pyright: ignore[reportPossiblyUnboundVariable]
    alone, its = take(TINY, rows)
    np.testing.assert_allclose(metrics["loss"][0], its["loss"][-K:], rtol=1e-3)  # pyright: ignore
    np.testing.assert_allclose(both.params["wte"][0], alone.params["wte"], atol=1e-3)


# ---- the loop -------------------------------------------------------------------------------------------------------

FLAGS = (
    "--data.source text.txt --model.block-size 8 --model.n-layer 1 --model.n-head 2 --model.n-embd 16 "
    "--train.batch-size 4 --train.eval-every 0 --train.save-every 251 --train.log-every 4 --train.steps 268 "
    "--optim.name adamw --optim.learning-rate 1e-2 --optim.skip-spikes 8"
).split()
RANDOM, NAN = (249, 250, 251), 257  # steps, the first is 0, whose batch is random, and whose loss is nan


def sentences() -> str:
    chance = np.random.default_rng(0)
    return " ".join(chance.choice("gato perro casa luna mira come huye".split(), 3000).tolist())


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(*flags) runs train.py's main on a small text, with spoilt batches -> its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanogpt_jax.inference.sampler.opening_and_continuation", lambda *_, **__: "")
    Path("text.txt").write_text(sentences(), encoding="utf-8")
    make, mean = batches.batch, language_model.mean_loss

    def batch(stream: Any, *, step: np.ndarray, **settings: Any) -> np.ndarray:
        rows = np.array(make(stream, step=step, **settings))
        for i, at in enumerate(np.atleast_1d(step)):
            if at in RANDOM:
                rows[i] = np.random.default_rng(at).permutation(rows[i].ravel()).reshape(rows[i].shape)
            if at == NAN:
                rows[i] = 0
        return rows

    def mean_loss(cfg: Any, params: Any, tokens: jax.Array, *key: Any, **keys: Any) -> jax.Array:
        return mean(cfg, params, tokens, *key, **keys) * jnp.where((tokens == 0).all(), jnp.nan, 1.0)

    monkeypatch.setattr(batches, "batch", batch)
    monkeypatch.setattr(language_model, "mean_loss", mean_loss)
    return lambda *flags: door("train").main(with_flags(FLAGS, flags))


@pytest.mark.long
def test_a_run_through_spikes_and_nan_resumes_bit_for_bit_and_counts_them(train, capsys):
    assert train("--run-dir", "run") == 0
    told = capsys.readouterr().err
    assert told.count("skipped by optim.skip_spikes=8") == 1
    assert "step 250: skipped" in told
    assert "4 skipped" in told
    logged = [row for row in read_metrics(Path("run/metrics.jsonl")) if "skipped" in row]
    assert [row["skipped"] for row in logged if row["step"] in (248, 252, 256, 260, 268)] == [0, 3, 3, 4, 4]
    assert all(row["train/loss"] is not None for row in logged if row["step"] != NAN + 1)
    shutil.copytree("run", "cut")
    shutil.rmtree("cut/checkpoints/268")  # what is left was saved between two skipped steps
    assert train("--run-dir", "cut") == 0
    assert "going on in cut from step 251" in capsys.readouterr().out
    assert numbers("cut") == numbers("run")
    assert_equal(load("cut", "latest"), load("run", "latest"))
    words = ["optim.skip_spikes: 8.0 in the run, 6.0 now"]
    refused(door("train").main, [*with_flags(FLAGS, ["--optim.skip-spikes", "6"]), "--run-dir", "cut"], capsys, *words)
    off = [*with_flags(FLAGS, ["--optim.skip-spikes", "0"]), "--run-dir", "off"]
    refused_by = "step 258: the loss is nan; the run stops here"
    with pytest.raises(loop.Diverged, match=refused_by):
        door("train").main(off)


@pytest.mark.parametrize(
    ("loss", "in_a_row", "words"),
    [
        (9.5, loop.MOST_SKIPPED - 1, ""),
        (9.5, loop.MOST_SKIPPED, "try a larger optim.skip_spikes than 8, or 0"),
        (np.nan, loop.MOST_SKIPPED, "try a lower optim.learning_rate than 0.01"),
    ],
)
def test_many_skipped_in_a_row_end_the_run(tmp_path, loss, in_a_row, words, capsys):
    values = {"loss": loss, "grad_norm": 2.5, "learning_rate": 0.1, "skipped": 40, "in_a_row": in_a_row}
    cfg = replace(TINY, train=replace(TINY.train, log_every=1))
    with Recording(tmp_path, cfg.train) as run:
        reader = loop._Reader(cfg, SimpleNamespace(tokens_per_step=64), run, Progress("step", 10))  # pyright: ignore
        one = {name: jnp.full(1, value, jnp.float32).block_until_ready() for name, value in values.items()}
        if words:
            what = f"step 1: skipped, and so were the 31 steps before it .loss {loss:.4g}, gradient norm 2.5.; the run"
            with pytest.raises(loop.Diverged, match=f"(?s){what}.*{words}"):
                reader.add(0, 1, one)
        else:
            reader.add(0, 1, one)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row.get(DIVERGED), row.get(SKIPPED)) == ((1.0, in_a_row) if words else (None, None))
    assert row.get("skipped") == (None if words else 40)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, "no run run"),
        ("", "run is no run, or has logged fewer than two steps"),
        ('{"step": 10, "train/loss": 3.0, "grad_norm": 1.0}\n' * 2, "run has not logged every step"),
        (
            "".join(f'{{"step": {i}, "train/loss": 3.0, "grad_norm": 1.0}}\n' for i in (1, 2)),
            "no run has more than 128",
        ),
    ],
)
def test_runs_that_say_nothing_of_false_skips_are_refused(tmp_path, monkeypatch, rows, words, capsys):
    monkeypatch.chdir(tmp_path)
    if rows is not None:
        Path("run").mkdir()
        Path("run/metrics.jsonl").write_text(rows)
    refused(false_skips.main, "run", capsys, words)
