"""Is a run normal? The band, whose it is, and what is said."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpt2_numpy
import jax
import numpy as np
import pytest
from helpers import refused
from test_architecture import ROOT

from nanogpt_jax import cli, config
from nanogpt_jax.commands import normal
from nanogpt_jax.config import Config
from nanogpt_jax.model import gpt2
from nanogpt_jax.normal import judge, make, reference, verdict
from nanogpt_jax.normal.reference import Reference
from nanogpt_jax.run import opened

REFERENCES = sorted(reference.FOLDER.glob("*.json"))
RECIPES = ["default", "frases", "nanogpt_cpu", "shakespeare_char", "shakespeare_quick"]


@pytest.fixture
def frases() -> Reference:
    return reference.from_json((reference.FOLDER / "frases.json").read_bytes())


def settings_of(one: Reference) -> Config:
    return config.load([] if one.name == "default" else [one.name]).cfg


def rows_of(one: Reference, every: int = 10, until: int = 1200, **change: Any) -> list[dict[str, Any]]:
    """metrics.jsonl of a run that is as the mean of the reference; `change`: a number of it -> what becomes of it."""
    rows = []
    for step in range(1, until + 1):
        if step % every == 0:
            norm = math.exp(judge.curve(one, one.norm, np.array([step]))[0])
            row = {"train/loss": float(judge.curve(one, one.loss, np.array([step]))[0]), "grad_norm": norm}
            rows.append({"step": step, **row, "learning_rate": float(np.interp(step, *one.rates.T))})
        if step in one.evaluated:
            rows.append({"step": step, "val/loss": float(one.validation.mean(0)[list(one.evaluated).index(step)])})
    for key, altered in change.items():
        for row in rows:
            if (name := {"loss": "train/loss", "val": "val/loss"}.get(key, key)) in row:
                row[name] = altered(row["step"], row[name])
    return rows


@pytest.fixture
def run(tmp_path, frases):
    """Writes a run directory of the recipe frases -> its settings and its path."""

    def write(rows: list[dict[str, Any]], fingerprint: str = frases.data["fingerprint"], **flags: Any):
        command = config.load(["frases", *(f"--{key.replace('__', '.')}={value}" for key, value in flags.items())])
        cfg = config.with_vocabulary(command.cfg, frases.data["vocabulary"], None, command.origin)
        manifest = {"fingerprint": fingerprint, "n_vocab": frases.data["vocabulary"]}
        manifest |= {split: {"tokens": frases.data[split]} for split in ("train", "val")}
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/config.json").write_text(config.to_json(cfg))
        (tmp_path / "run/data.json").write_text(json.dumps(manifest))
        (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return cfg, tmp_path / "run"

    return write


# ---- the references --------------------------------------------------------------------------------------------------


def test_every_recipe_that_is_trained_here_has_a_reference():
    assert [path.stem for path in REFERENCES] == RECIPES
    assert max(path.stat().st_size for path in REFERENCES) <= 20_000


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_a_reference_is_of_its_config_as_it_is_today(path):
    one = reference.from_json(path.read_bytes())
    mine = dict(config.settings.items(settings_of(one)))
    assert {key: mine[key] for key in reference.LEARNT} == one.settings
    assert one.n == len(set(one.seeds)) >= reference.LEAST


def test_a_setting_that_is_newer_than_a_reference_has_its_default(frases):
    told = json.loads(reference.to_json(frases))
    del told["settings"]["optim.skip_spikes"]
    assert reference.from_json(json.dumps(told)).settings == frases.settings
    told["settings"]["optim.no_more"] = 1
    with pytest.raises(ValueError, match="not those of this version"):
        reference.from_json(json.dumps(told))


def test_leaving_one_run_out_gives_false_alarms_in_at_most_5_of_100():
    every = [reference.from_json(path.read_bytes()) for path in REFERENCES]
    alarms = sum(len(verdict.false_alarms(one)) for one in every)
    assert alarms <= 0.05 * sum(one.n for one in every)


def test_a_run_that_is_unlike_the_others_would_be_an_alarm(frases):
    series = dataclasses.replace(frases.loss, runs=frases.loss.runs + 0.3 * (np.arange(frases.n) == 2)[:, None])
    assert verdict.false_alarms(dataclasses.replace(frases, loss=series)) == [frases.seeds[2]]


@pytest.mark.parametrize("change", ["", "[]", "NaN", '{"format": 1}', "cut", "seed", "mean"])
def test_a_damaged_reference_is_none(change, tmp_path, frases):
    told = json.loads(reference.to_json(frases))
    if change == "seed":
        told["seeds"].pop()
    if change == "mean":
        told["loss"]["mean"][3] = math.nan
    text = {"cut": reference.to_json(frases)[:500]}.get(change, change)
    (tmp_path / "frases.json").write_text(json.dumps(told) if change in ("seed", "mean") else text)
    assert reference.known(tmp_path) == []
    (tmp_path / "frases.json").write_text(reference.to_json(frases))
    assert len(reference.known(tmp_path)) == 1


def test_a_reference_is_made_of_runs_and_finds_their_curves(tmp_path, frases):
    rng, runs = np.random.default_rng(0), []
    for seed in range(5):
        rows = rows_of(
            frases, every=1, loss=lambda _, x: x + 0.01 * rng.normal(), val=lambda _, x: x + 0.01 * rng.normal()
        )
        cfg = dataclasses.replace(settings_of(frases), train=dataclasses.replace(settings_of(frases).train, seed=seed))
        runs.append(make.Logged(tmp_path, cfg, rows, frases.data, False))
    made = make.make("frases", runs)
    assert np.abs(made.loss.mean - frases.loss.mean)[20:].max() < 0.02  # of the others a knot has few steps
    assert made.loss.noise[10:] == pytest.approx(0.01, rel=0.5)
    assert np.interp(np.arange(1, 1201), *made.rates.T) == pytest.approx(
        np.interp(np.arange(1, 1201), *frases.rates.T), abs=2e-5
    )
    for broken in (
        runs[:4],
        [*runs[:4], runs[0]],
        [*runs[:4], dataclasses.replace(runs[4], extended=True)],
        [*runs[:4], dataclasses.replace(runs[4], rows=runs[4].rows[::2])],
        [*runs[:4], dataclasses.replace(runs[4], cfg=Config())],
    ):
        with pytest.raises(config.UserError):
            make.make("frases", broken)


# ---- whose it is -----------------------------------------------------------------------------------------------------


def test_a_reference_is_found_by_settings_and_tokens_wherever_they_lie(run, frases):
    def of(**flags: Any) -> reference.Match | None:
        fingerprint = flags.pop("fingerprint", frases.data["fingerprint"])
        return verdict.find(*run([], fingerprint, **flags))[0]

    same = [of(), of(train__seed=5), of(data__source="mine.txt"), of(train__micro_batch=8, train__eval_every=7)]
    assert [match.same_data for match in same if match] == [True] * 4
    other = of(fingerprint="0")
    assert other
    assert not other.same_data
    for flags in ({"train__steps": 1300}, {"optim__learning_rate": 0.02}, {"model__n_layer": 3}):
        assert of(**flags) is None
    assert of(fingerprint="0", data__source="mine.txt") is None  # a text of one's own: silence
    cfg, path = run([])
    (path / "origin.json").write_text('{"extended": [{"at_step": 5, "from_steps": 10}]}')
    assert verdict.find(cfg, path)[0] is None
    (path / "origin.json").unlink()
    (path / "data.json").write_text("[")
    assert verdict.find(cfg, path)[0] is None


# ---- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize("until", [75, 600, 1200])
def test_a_normal_run_says_so_in_the_line_of_its_evaluation(run, frases, every, until):
    said = verdict.beside(*run(rows_of(frases, every, until)), until)
    expected = frases.validation.mean(0)[list(frases.evaluated).index(until)]
    low, high = map(float, re.fullmatch(r"; normal: (\d\.\d+) to (\d\.\d+) in 8 runs of frases", said).groups())
    assert low + high == pytest.approx(2 * expected, abs=2e-3)


def test_before_the_first_evaluation_of_the_reference_training_alone_is_compared(run, frases):
    rows = [*rows_of(frases, 10, 40), {"step": 40, "val/loss": 9.0}]
    assert verdict.beside(*run(rows), 40) == "; normal so far, as in 8 runs of frases"


def test_between_evaluations_of_the_reference_its_validation_loss_is_known(frases):
    """Of every other evaluation, from those beside it."""
    half = dataclasses.replace(frases, evaluated=frases.evaluated[::2], validation=frases.validation[:, ::2])
    for i in range(1, len(frases.evaluated) - 1, 2):
        band = judge.validation_band(half, int(frases.evaluated[i]))
        assert band
        assert abs(frases.validation[:, i] - band[0]).max() < band[1]


@pytest.mark.parametrize(
    ("change", "seen", "cause"),
    [
        ({"learning_rate": lambda _, x: 4 * x}, "learning rate 0.02, but 0.005", "is 4 times what it was"),
        ({"learning_rate": lambda step, x: 0.01 if step < 20 else x}, "learning rate 0.01, but", "warm-up missing"),
        ({"learning_rate": lambda step, x: 0.01 if step > 20 else x}, "learning rate 0.01, but", "another schedule"),
        ({"loss": lambda step, x: x - step / 300}, "training loss", "predicts too well"),
        ({"loss": lambda step, x: x + step / 300}, "training loss", "learns far less than it should"),
        ({"loss": lambda _, x: x + 0.12, "val": lambda _, x: x + 0.12}, "validation loss", "is the batch smaller"),
        ({"val": lambda _, x: x + 0.5}, "validation loss", "dropout left on in evaluation"),
        ({"val": lambda _, x: x - 0.5}, "validation loss", "part of the training text"),
        ({"grad_norm": lambda _, x: 1.5 * x}, "gradient norm", "1.5 times as large: a smaller batch"),
        ({"grad_norm": lambda _, x: x / 1.5}, "gradient norm", "a larger batch"),
    ],
)
def test_what_is_outside_is_said_with_a_suspicion_in_one_line(run, frases, change, seen, cause):
    said = verdict.beside(*run(rows_of(frases, until=300, **change)), 300)
    assert said.startswith("\nnot normal since step ")
    assert said.count("\n") == 1
    assert f": {seen}" in said
    assert cause in said


def test_a_resumed_run_knows_its_earlier_steps_and_one_that_went_back_knows_no_later_ones(run, frases):
    cfg, path = run(rows_of(frases, until=300, loss=lambda step, x: x + (step < 100)))
    assert "not normal since step" in verdict.beside(cfg, path, 300)
    cfg, path = run(rows_of(frases, until=300, loss=lambda step, x: x + (step > 150)))
    rows = json.loads(f"[{','.join((path / 'metrics.jsonl').read_text().splitlines())}]")
    match, facts = verdict.find(cfg, path)
    assert match
    assert verdict.judged(match, facts, rows, 150).findings == []
    assert verdict.judged(match, facts, rows).findings[0].step > 150


def test_other_data_by_the_same_name_are_told_once_and_not_compared(run, frases):
    cfg, path = run(rows_of(frases, until=300, loss=lambda _, x: x + 9), "0")
    facts = json.loads((path / "data.json").read_text())
    facts["train"]["tokens"] *= 2
    (path / "data.json").write_text(json.dumps(facts))
    said = verdict.beside(cfg, path, 75)
    assert said.startswith("\nnot compared with the 8 runs of frases: data.source=frases gave them other data")
    assert "Is the text there 2 times?" in said
    assert verdict.beside(cfg, path, 150) == ""
    facts["n_vocab"] = 90
    (path / "data.json").write_text(json.dumps(facts))
    assert "Is it another tokenizer?" in verdict.beside(cfg, path, 75)


def test_python_of_another_version_is_no_fault(frases):
    one = dataclasses.replace(frases, settings={**frases.settings, "data.source": "python-docs"})
    assert verdict.other_data(one, {**one.data, "train": 5}).endswith("Each version of Python brings another text.")


@pytest.mark.parametrize("damage", ["", "[1]\n{", '{"step": 10, "train/loss": "x", "grad_norm": null}', None])
def test_metrics_that_are_damaged_or_gone_say_nothing_wrong(run, damage):
    cfg, path = run([])
    if damage is None:
        (path / "metrics.jsonl").unlink()
        (path / "metrics.jsonl").mkdir()
    else:
        (path / "metrics.jsonl").write_text(damage)
    assert "not normal" not in verdict.beside(cfg, path, 10)


# ---- the first loss --------------------------------------------------------------------------------------------------


def test_the_first_loss_is_the_references_or_about_ln_V(run, frases, tmp_path):
    cfg, path = run([])
    first = float((frases.loss.mean[0] + frases.loss.runs[:, 0]).mean())
    assert verdict.start(cfg, path, first) == ""
    assert "are the initial weights too large?" in verdict.start(cfg, path, first + 0.2)
    assert "does the model see" in verdict.start(cfg, path, first - 0.2)
    cfg, path = run([], model__n_layer=3)
    assert verdict.start(cfg, path, math.log(427) + 0.1) == ""
    assert verdict.start(cfg, path, math.log(427) + 1).startswith("the first loss is 7.057, and a model that knows")
    begun = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, init_from="runs/x"))
    assert verdict.start(begun, path, 1.0) == ""


@pytest.mark.parametrize(("V", "C", "L"), [(2, 8, 1), (65, 64, 4), (65, 384, 1), (2000, 128, 2)])
def test_no_size_of_model_is_nagged_about_its_first_loss(V, C, L):
    rng, cfg = np.random.default_rng(0), config.ModelConfig(block_size=16, vocab_size=V, n_layer=L, n_head=2, n_embd=C)
    texts = (rng.integers(0, V, (2, 9)), np.minimum(rng.zipf(1.3, (2, 9)) - 1, V - 1), np.ones((2, 9), int))

    def first_loss(tokens: np.ndarray, times: float) -> float:
        logits = gpt2_numpy.forward(new_weights(cfg, times), tokens[:, :-1], V)
        chosen = np.take_along_axis(gpt2_numpy.softmax(logits), tokens[:, 1:, None], -1)
        return float(-np.log(chosen).mean())

    assert [said for text in texts if (said := verdict.unusual_start(cfg, first_loss(text, 1)))] == []
    if C >= 64:
        assert "initial weights too large?" in verdict.unusual_start(cfg, first_loss(texts[0], 25))


def new_weights(cfg: config.ModelConfig, times: float) -> Any:
    """As `gpt2.init_params` draws them, from numpy's generator; all but the norms multiplied by `times`."""
    rng, residual = np.random.default_rng(1), 1 / math.sqrt(2 * cfg.n_layer)

    def draw(path: Any, shape: Any) -> np.ndarray:
        names = [key.key for key in path]
        if names[-1] == "scale":
            return np.ones(shape.shape)
        return 0.02 * times * rng.normal(size=shape.shape) * (residual if "c_proj" in names else 1)

    return jax.tree_util.tree_map_with_path(draw, gpt2.param_shapes(cfg))


# ---- the command and the loop ----------------------------------------------------------------------------------------


def test_the_command_says_it_of_a_run_and_names_what_is_outside(run, frases, capsys, monkeypatch):
    _, path = run(rows_of(frases))
    assert normal.main([str(path)]) == 0
    assert capsys.readouterr().out.startswith(
        "normal until step 1200 of 1200, as 8 runs of frases: validation loss 1.5"
    )
    run(rows_of(frases, loss=lambda step, x: x + (step > 600), val=lambda step, x: x + (step > 700)))
    assert normal.main([str(path)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("not normal since step ")
    assert [line.split(": ")[1].split(" ")[0] for line in rest] == ["training", "validation"]
    run([], train__steps=7)
    assert normal.main([str(path)]) == 0
    assert (
        "no reference has its settings and its text. The nearest, frases, differs in train.steps=7 (1200)"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a b", "one run at a time, but got a, b"),
        ("none", "no run none"),
        ("--make frases", "needs the name of a config, and the runs"),
        ("--make ../frases run", "--make=../frases needs the name of a config"),
        ("--make nothing run", "nothing"),
        ("--make frases run", "a reference needs at least 5 runs, each of another seed, but got 1"),
        ("--make shakespeare_quick run run run run run", "a reference needs at least 5 runs"),
        ("--mak frases", "did you mean --make?"),
    ],
)
def test_wrong_input(line, words, run, capsys, monkeypatch):
    _, path = run([])
    monkeypatch.chdir(path.parent)
    refused(normal.main, line, capsys, words)


def test_asking_imports_no_jax():
    code = "import sys, nanogpt_jax.commands.normal; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_compare_shades_where_our_own_runs_lie(run, frases, tmp_path, capsys):
    compare = pytest.importorskip("nanogpt_jax.commands.compare")
    pytest.importorskip("nanogpt_jax.pages")
    _, path = run(rows_of(frases))
    shutil.copytree(path, tmp_path / "other")
    assert compare.main([str(path), str(tmp_path / "other")]) == 0
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert page.count('<polygon class="band"') == 4  # two losses, against steps and tokens
    assert "where our own runs lie: 8 of frases" in page
    (path / "data.json").unlink()
    (tmp_path / "other/data.json").unlink()
    assert compare.main([str(path), str(tmp_path / "other")]) == 0
    assert "our own runs" not in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_report_shades_it_too(run, frases):
    report = pytest.importorskip("nanogpt_jax.commands.report")
    rows = rows_of(frases, loss=lambda step, x: x + (step > 600))
    cfg, path = run(rows)
    parts = "".join(report._curves(rows, *report._normal(opened.Run(path, cfg, None), rows)))
    assert parts.count('<polygon class="band"') == 2
    assert "<p>Not normal since step " in parts
    assert "Gradient norm, unclipped; shaded: our own runs" in parts
    assert "shaded" not in "".join(report._curves(rows, "", {}))


@pytest.mark.long
def test_a_run_of_a_recipe_says_that_it_is_normal_at_each_evaluation(tmp_path, monkeypatch, capsys):
    """For 30 of its 1,200 steps; then it is resumed, and a fault is made."""
    from faults import EVALUATIONS, train_a_quarter

    del EVALUATIONS
    monkeypatch.chdir(tmp_path)
    train_a_quarter(["frases", "--train.eval-every=10", "--train.save-every=0", "--train.recompile=off"])
    out = capsys.readouterr()
    assert out.out.count("; normal so far, as in 8 runs of frases") == 4
    assert "step 1: " not in out.err
    rows = (tmp_path / "runs/frases/metrics.jsonl").read_text().splitlines()
    rows[0] = json.dumps({**json.loads(rows[0]), "train/loss": 3.0})
    (tmp_path / "runs/frases/metrics.jsonl").write_text("\n".join(rows) + "\n")
    train_a_quarter(["frases", "--train.eval-every=10", "--train.save-every=0", "--train.recompile=off"])
    assert "not normal since step 10: training loss 3.000" in capsys.readouterr().out


@pytest.mark.slow
def test_of_ten_faults_at_least_eight_are_seen_before_a_quarter_of_the_run_is_over(tmp_path):
    from faults import FAULTS, seen

    found = {fault: seen(fault, "frases", tmp_path, [])[0] for fault in FAULTS}
    assert found.pop("no fault") is None
    assert sum(step is not None for step in found.values()) >= 8, found


def test_the_core_does_without_the_room(tmp_path, monkeypatch):
    """The loop, as it is if nanogpt_jax/normal was removed."""
    from nanogpt_jax.training import loop

    monkeypatch.setitem(sys.modules, "nanogpt_jax.normal.verdict", None)
    nobody: Any = dataclasses.make_dataclass("Run", ["directory"])(Path(tmp_path))
    assert loop._beside(Config(), nobody, 1) == ""
    assert loop._start(Config(), nobody, 99.0) == ""


def test_the_command_is_offered():
    assert "normal" in cli.offered()
