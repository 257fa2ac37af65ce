"""A step of a run once more: the same bits before it, and the operation that broke it by name."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refused

from nanogpt_jax import cli, config
from nanogpt_jax.commands import replay, report
from nanogpt_jax.config import UserError
from nanogpt_jax.data import batches, tokenizer
from nanogpt_jax.inference import sampler
from nanogpt_jax.replaying import findings, operations, past, rebuilt, shown
from nanogpt_jax.replaying.operations import Evaluation
from nanogpt_jax.run.checkpoint import load_trees
from nanogpt_jax.run.metrics import read_metrics
from nanogpt_jax.training import language_model
from nanogpt_jax.training.state import TrainState

TEXT = "El gato negro persigue al ratón gris;\nel ratón huye del gato. \x1b[31m" * 60
FLAGS = (
    "--data.source text.txt --model.n-layer 2 --model.n-head 2 --model.n-embd 16 --model.block-size 16 "
    "--train.batch-size 4 --train.eval-every 0 --train.save-every 4 --train.keep 9 --train.log-every 3 "
    "--optim.name adamw"
).split()


def train(run: str, *more: str) -> int:
    return cli.guarded(cli.door("train").main, [*FLAGS, "--run-dir", run, *more])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a run, `good`, which computes its gradients by halves."""
    folder = tmp_path_factory.mktemp("replay")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sampler, "opening_and_continuation", lambda *_, **__: "")  # compiling that takes seconds
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        assert train("good", "--train.steps", "12") == 0
    return folder


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def again(run: str, step: int) -> rebuilt.Rebuilt:
    known = past.read(Path(run))
    return rebuilt.rebuild(known, past.data_of(known), step)


# ---- the state and the batch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gone", "start"), [((8,), 4), ((4, 8), 0)])
def test_the_state_is_rebuilt_bit_for_bit_from_an_earlier_checkpoint_or_from_the_seed(gone, start):
    its = again("good", 9)
    assert (its.start, its.compared.steps, its.compared.equal) == (8, 1, 1)
    for step in gone:
        shutil.rmtree(f"good/checkpoints/{step}")
    other = again("good", 9)
    assert other.start == start
    jax.tree.map(np.testing.assert_array_equal, other.before, its.before)
    assert other.metrics == its.metrics
    np.testing.assert_array_equal(other.rows, its.rows)
    assert other.compared.steps == other.compared.equal == len([step for step in (3, 6, 9) if step > start])


def test_other_numbers_than_the_run_logged_are_said(capsys):
    rows = read_metrics(Path("good/metrics.jsonl"))
    rows[1]["train/loss"] += 1e-3
    Path("good/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    its = again("good", 7)
    assert (its.compared.steps, its.compared.equal) == (1, 0)
    assert its.compared.worst == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.slow
def test_micro_batches_dropout_and_bfloat16_are_those_of_the_run():
    flags = "--train.steps 4 --model.dropout 0.5 --model.dtype bfloat16 --train.micro-batch 2 --model.remat block"
    assert train("odd", *flags.split()) == 0
    its = again("odd", 3)
    found = findings.find(its)
    assert its.compared.steps == its.compared.equal == 1
    # other masks, or another order of the rows, would change it by 0.1
    assert found.loss == pytest.approx(its.metrics["loss"], abs=2e-3)
    assert float(found.nats.mean()) == pytest.approx(its.metrics["loss"], abs=2e-3)
    norm = np.sqrt(sum(value**2 for value in found.gradients.values()))
    assert norm == pytest.approx(its.metrics["grad_norm"], rel=1e-2)
    assert found.origin is None


def test_a_run_that_was_extended_had_another_schedule_before():
    run = past.read(Path("good"))
    run = replace(run, extended=[{"at_step": 4, "from_steps": 4}, {"at_step": 8, "from_steps": 10}])
    assert past.schedules(run, 2, 11) == [(2, 4, 4), (4, 8, 10), (8, 11, 12)]
    assert past.schedules(run, 8, 9) == [(8, 9, 12)]
    assert past.schedules(run, 5, 5) == []


# ---- what broke -----------------------------------------------------------------------------------------------------


def with_state(its: rebuilt.Rebuilt, **parts) -> rebuilt.Rebuilt:
    """The step, with other values before it. The compiled program would have said that they are not finite."""
    before = its.before
    state = TrainState(before.step, parts.get("params", before.params), parts.get("opt_state", before.opt_state))  # pyright: ignore
    return replace(its, before=state, wrong_after=("parameters",))


def spoilt(its: rebuilt.Rebuilt, name: str, layer: int | None, change) -> str:
    """What is said of the step if a parameter had other values before it."""

    def spoil(path, x):
        x = np.array(x)
        if operations.path_name(path) == name:
            target = x if layer is None else x[layer]
            target[...] = change(target)
        return x

    params = jax.tree_util.tree_map_with_path(spoil, its.before.params)
    its = with_state(its, params=params)
    return shown.page(past.read(Path("good")), its, findings.find(its), None)


def test_the_layer_and_the_operation_that_broke_are_named():
    its = again("good", 9)
    said = spoilt(its, "h/attn/c_attn/kernel", 1, lambda x: x * 1e25)
    assert (
        "the first result that is not finite: layer 2 of 2, attention, scores QKᵀ/√d\n  operation dot_general" in said
    )
    assert "nanogpt_jax/model/attention.py:" in said
    assert "scaled_scores" in said

    assert "the 3 of 4 rows of the batch with the largest loss" in said

    def poison(x):
        x[0, 3] = np.inf
        return x

    said = spoilt(its, "h/mlp/c_proj/kernel", 0, poison)
    assert "not finite before the step: h/mlp/c_proj/kernel, of its 2,048 numbers 1 are inf" in said
    assert "the first result that is not finite: layer 1 of 2, MLP, out of the hidden units" in said
    assert "nanogpt-jax replay good --step 8" in said


@pytest.mark.slow
def test_a_gradient_or_an_update_that_is_not_finite_is_found_though_the_loss_is():
    its = again("good", 9)
    said = spoilt(its, "h/mlp/c_fc/kernel", 1, lambda x: x * 1e37)
    assert "the first result that is not finite: gradient of layer 2 of 2, MLP, GELU" in said

    big = jax.tree.map(lambda x: np.full_like(x, 3e38) if x.ndim > 1 else x, its.before.opt_state)
    found = findings.find(with_state(its, opt_state=big))
    assert found.phase == "update"
    assert found.origin is not None
    assert "the first result that is not finite: the optimizer" in shown.page(past.read(Path("good")), its, found, None)


def test_a_poisoned_token_is_found_with_its_text():
    its = again("good", 9)
    token = [int(its.rows[2, 3])]

    def poison(x):
        x[token[0]] = np.nan
        return x

    params = {**its.before.params, "wte": poison(np.array(its.before.params["wte"]))}
    found = findings.find(with_state(its, params=params))
    assert found.origin is not None
    assert found.origin.name == "wte"
    assert found.shown is not None
    assert found.shown[0].function == "embed"


@pytest.mark.long
def test_a_diverged_run_says_what_to_type_and_that_names_the_operation(capsys):
    wild = "--train.steps 20 --optim.learning-rate 1e30 --optim.schedule constant --optim.grad-clip 0".split()
    assert train("wild", *wild) == 2
    said = capsys.readouterr().err
    assert "to see which operation broke, and on which text: nanogpt-jax replay wild" in said
    step = past.read(Path("wild")).broke
    assert step is not None
    assert f"error: step {step}: " in said
    assert replay.main(["wild"]) == 0
    page = capsys.readouterr().out
    assert f"wild, step {step} of 20: rebuilt from its seed" in page
    assert "the first result that is not finite: " in page
    assert "nanogpt_jax/" in page
    assert "a lower optim.learning_rate than 1e+30" in page
    refused(replay.main, f"wild --step {step + 1}", capsys, f"wild broke at step {step}, and took no later one")


@pytest.mark.long
def test_a_skipped_step_is_shown_as_such_and_the_way_leads_through_it(monkeypatch, capsys):
    """Step 6 of 8 has a loss that is nan, and optim.skip_spikes goes on as if it had not been."""
    make, mean = batches.batch, language_model.mean_loss

    def batch(stream, *, step, **settings):
        rows = np.array(make(stream, step=step, **settings))
        rows[np.atleast_1d(step) == 5] = 0
        return rows

    def mean_loss(cfg, params, tokens, *key, **keys):
        return mean(cfg, params, tokens, *key, **keys) * jnp.where((tokens == 0).all(), jnp.nan, 1.0)

    monkeypatch.setattr(batches, "batch", batch)
    monkeypatch.setattr(language_model, "mean_loss", mean_loss)
    flags = "--train.steps 8 --optim.skip-spikes 8"
    assert train("wary", *flags.split()) == 0
    rows = {row["step"]: row for row in read_metrics(Path("wary/metrics.jsonl")) if "skipped" in row}
    assert (rows[6]["train/loss"], rows[6]["grad_norm"]) == (None, None)
    assert [row["skipped"] for row in rows.values()] == [0, 1, 1]
    its = again("wary", 8)
    assert (its.start, its.compared.steps, its.compared.equal) == (4, 2, 2)  # steps 6, with null for nan, and 8
    assert (int(its.before.opt_state.kept), int(its.before.opt_state.skipped)) == (6, 1)  # pyright: ignore
    jax.tree.map(np.testing.assert_array_equal, again("wary", 7).before.params, again("wary", 6).before.params)
    capsys.readouterr()
    assert replay.main(["wary", "--step", "6"]) == 0
    page = capsys.readouterr().out
    assert "optim.skip_spikes=8 skipped this step: it has changed nothing" in page
    assert "the first result that is not finite: " in page
    assert replay.main(["wary", "--step", "7"]) == 0
    assert "all is finite" in capsys.readouterr().out


def test_a_logged_null_is_a_number_that_is_not_finite():
    rows = [
        {"step": 2, "train/loss": 1.5, "grad_norm": None},
        {"step": 3, "train/loss": None, "grad_norm": None},
        {"step": 4, "train/loss": 1.5},
        {"step": 5, "val/loss": 1.5},
    ]
    Path("good/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = past.read(Path("good"))
    assert set(run.recorded) == {2, 3, 4}

    def compared(step: int, loss: float, grad_norm: float) -> tuple[int, int, float]:
        found = rebuilt._compare(run, {step: {"loss": loss, "grad_norm": grad_norm}})
        return found.steps, found.equal, found.worst

    assert compared(2, 1.5, np.nan) == compared(3, np.inf, np.nan) == compared(4, 1.5, 2.0) == (1, 1, 0.0)
    assert compared(2, 1.5, 2.0) == (1, 0, 0.0)
    assert compared(2, 1.25, np.nan) == (1, 0, 0.25)
    assert compared(3, 1.5, np.nan) == (1, 0, np.inf)
    assert compared(5, 1.5, 2.0) == (0, 0, 0.0)


@pytest.mark.parametrize(("in_a_row", "chosen"), [(3, 8), (None, 10), (True, 10), ("3", 10), (11, 10)])
def test_of_skipped_steps_that_ended_a_run_the_first_is_taken(in_a_row, chosen):
    with Path("good/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "diverged": 1.0, "skipped_in_a_row": in_a_row}) + "\n")
    run = past.read(Path("good"))
    assert (past.choose(run, None), past.choose(run, 9)) == (chosen, 9)


@pytest.mark.long
def test_a_run_that_skipped_its_last_steps_is_replayed_from_the_first_of_them(capsys):
    wild = "--train.steps 60 --optim.learning-rate 1e30 --optim.schedule constant --optim.skip-spikes 8".split()
    assert train("wild", *wild) == 2
    run = past.read(Path("wild"))
    assert run.broke is not None
    first = run.broke - 31
    capsys.readouterr()
    assert replay.main(["wild"]) == 0
    page = capsys.readouterr().out
    assert f"wild, step {first} of 60" in page
    assert "it is number 1 of the 32 skipped in a row that ended the run" in page
    assert replay.main(["wild", "--step", str(run.broke - 1)]) == 0
    page = capsys.readouterr().out
    assert "it is number 31 of the 32 skipped in a row" in page
    assert "loss and gradient norm of 1 logged step are equal, to the last bit" in page
    assert f"replay wild --step {first - 1}\n" in page


def test_a_finite_step_shows_the_same_table_and_its_text_escaped(capsys):
    assert replay.main(["good", "--rows", "4"]) == 0
    page = capsys.readouterr().out
    assert "good, step 12 of 12: rebuilt from checkpoint 8, 3 steps taken again\n" in page
    assert "loss and gradient norm of 2 logged steps are equal, to the last bit\n" in page
    assert "all is finite: the loss, each gradient, and the weights after the step" in page
    for name in ("embeddings", "positions", "layer 1", "layer 2", "last norm", "logits"):
        (line,) = [line for line in page.splitlines() if line.startswith(f"{name}  ")]
        assert len(line.split()) >= 2, line
    assert page.count("nats a token; most") == 4
    assert "\x1b" not in page
    assert shown.visible("gato \x1b[31m\n\t\\") == r"gato \x1b[31m\n\t\\"


# ---- which operation ------------------------------------------------------------------------------------------------


def origin_of(function, *args) -> operations.Mark:
    return operations.first(Evaluation(function, args).origins)


def test_an_infinity_that_vanishes_or_is_meant_is_no_fault():
    x = jnp.array([-200.0, 1.0])
    assert origin_of(lambda x: x / (1 + jnp.exp(-x)), x) is None
    assert origin_of(lambda x: jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf)), x) is None
    made = origin_of(lambda x: jnp.where(x > 0, x, -jnp.inf) - jnp.where(x > 0, x, -jnp.inf), x)  # -inf - -inf
    assert made is not None
    assert made.primitive == "sub"


def test_reported_is_the_earliest_operation_to_which_the_result_goes_back():
    def function(x):
        lost = 1 / jnp.exp(10 * x)  # infinite on the way, and finite in the end
        return jnp.log(x - 100) + lost

    found = origin_of(function, jnp.array([99.0, 101.0]))
    assert found is not None
    assert (found.primitive, found.result.nan) == ("log", 1)


def test_a_loop_is_opened_if_something_in_it_breaks():
    def function(x):
        return jax.lax.map(lambda row: jnp.log(row * 2).sum(), x)

    found = origin_of(function, jnp.array([[1.0, 2.0], [-1.0, 2.0]]))
    assert found is not None
    assert found.primitive == "log"
    assert origin_of(function, jnp.array([[1.0, 2.0], [1.0, 2.0]])) is None


def test_operation_by_operation_gives_what_the_function_gives():
    def function(x, n):
        y = jax.lax.fori_loop(0, n, lambda i, y: y * 1.5 + i, x)
        return {"y": jax.lax.cond(n > 2, lambda y: y + 1, lambda y: y - 1, y), "z": jax.lax.scan(jax.checkpoint(lambda c, a: (c + a, c * a)), 0.0, x)}  # fmt: skip # noqa: E501

    args = jnp.arange(4.0), jnp.int32(3)
    jax.tree.map(np.testing.assert_array_equal, Evaluation(function, args).outputs, function(*args))


# ---- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nowhere", "no run nowhere"),
        ("good new", "one run at a time, but got good, new"),
        ("good --step 0", "--step=0 must be at least 1"),
        ("good --step 13", "--step=13 is beyond the end of good, which has 12 steps"),
        ("good --step x", "--step=x must be a whole number"),
        ("good --stepp 3", "did you mean --step?"),
        ("good --rows 0", "--rows=0 must be at least 1"),
        ("text.txt", "text.txt is a file; a run is a directory"),
        ("", "no run with a checkpoint in runs/"),
    ],
)
def test_wrong_input(line, words, capsys):
    refused(replay.main, line, capsys, words)


def test_runs_that_cannot_be_replayed(capsys):
    settings = json.loads(Path("good/config.json").read_text())
    for name in ("imported", "labels", "new", "tuned"):
        shutil.copytree("good", name)
    Path("imported/import.json").write_text("{}")
    refused(replay.main, "imported", capsys, "imported holds an imported model: it took no steps here")
    Path("labels/config.json").write_text(json.dumps({**settings, "classify": {}}))
    refused(replay.main, "labels", capsys, "labels is a classifier, not a language model")
    shutil.rmtree("new/checkpoints")
    Path("new/metrics.jsonl").unlink()
    refused(replay.main, "new", capsys, "new has taken no step yet")
    refused(replay.main, "new --step 7", capsys, "--step=7: new has got to step 0, and took no later one")
    settings["train"]["init_from"] = "good"
    Path("tuned/config.json").write_text(json.dumps(settings))
    refused(replay.main, "tuned --step 3", capsys, "tuned has no usable checkpoint before step 3", "init_from=good",
            "the first step that can be replayed is 5")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: os.remove("good/data.json"), "good does not say what it was trained on: data.json is missing"),
        (lambda: Path("good/data.json").write_text("{"), "good/data.json is damaged"),
        (lambda: (shutil.rmtree("data"), os.remove("text.txt")), "the data of good is unavailable"),
        (lambda: Path("text.txt").write_text(TEXT + "z", encoding="utf-8"), "the data of good has changed"),
    ],
)
def test_data_that_is_gone_or_another_is_refused(change, words, capsys):
    change()
    refused(replay.main, "good --step 3", capsys, words, "no batch of the run can be made again")


def test_a_run_that_diverged_before_its_first_checkpoint_says_so(capsys):
    shutil.rmtree("good/checkpoints")
    refused(report.main, "good", capsys, "good has no checkpoint yet")
    with Path("good/metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "diverged": 1.0}\n')
    words = ["it diverged at step 10, before the first was saved", "on which text: nanogpt-jax replay good"]
    refused(report.main, "good", capsys, *words)


def test_a_tokenizer_of_another_run_is_refused(capsys):
    shutil.rmtree("good/tokenizer")
    tokenizer.make("word", TEXT).save(Path("good/tokenizer"))
    refused(replay.main, "good --step 3", capsys, "good/tokenizer is not the tokenizer by which the run's text became",
            "bring the old one back: text.txt with data.tokenizer=char")  # fmt: skip


@pytest.mark.parametrize("step", ["true", "-3", "13", "1e3", f"1{'0' * 30}"])
def test_damaged_lines_of_metrics_name_no_step(step):
    with Path("good/metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {step}, "diverged": 1.0}}\n')
    run = past.read(Path("good"))
    assert (run.broke, run.reached, past.choose(run, None)) == (None, 12, 12)


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(capsys):
    (weights,) = sorted(Path("good/checkpoints/8/params").rglob("d/*"))[:1]
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    its = again("good", 9)
    assert its.start == 4
    assert "note: checkpoint good/checkpoints/8 is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="is damaged"):
        load_trees(Path("good"), {"params": its.before.params, "opt_state": its.before.opt_state}, 8)


@pytest.mark.long
def test_a_run_on_two_devices_is_rebuilt_bit_for_bit_and_its_findings_are_those_of_one():
    assert train("two", "--train.steps", "6", "--mesh.data", "2") == 0
    its = again("two", 6)
    assert its.is_own_mesh
    assert (its.start, its.compared.steps, its.compared.equal) == (4, 1, 1)
    found = findings.find(its)
    assert found.origin is None
    assert found.loss == pytest.approx(its.metrics["loss"], rel=1e-5)


def test_a_run_on_more_devices_than_there_are_is_said(monkeypatch):
    settings = config.read_json(Path("good/config.json"))
    settings = replace(settings, mesh=replace(settings.mesh, data=2))
    Path("good/config.json").write_text(config.to_json(settings))
    make_mesh = rebuilt.make_mesh

    def too_few(mesh):
        if mesh.data > 1:
            raise UserError("needs 2 devices")
        return make_mesh(mesh)

    monkeypatch.setattr(rebuilt, "make_mesh", too_few)
    its = again("good", 9)
    assert not its.is_own_mesh
    assert its.compared.worst < 1e-5
