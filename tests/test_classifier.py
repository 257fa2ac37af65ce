"""Classifiers: the head, the loss, the data, the scores, and the command from labelled texts to labels."""

import csv
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpt2_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import interrupt_at, load, make_state, numbers, refusal, refused, trees, with_flags
from hypothesis import assume, given
from hypothesis import strategies as st

from nanogpt_jax import config
from nanogpt_jax.classify import data as labelled
from nanogpt_jax.classify import head, scores, task
from nanogpt_jax.classify import rows as labelled_rows
from nanogpt_jax.classify.rows import Example
from nanogpt_jax.classify.settings import ClassifierConfig, LabelledConfig, with_labels
from nanogpt_jax.cli import door
from nanogpt_jax.commands import classify
from nanogpt_jax.config import ModelConfig, UserError
from nanogpt_jax.config.settings import types_of
from nanogpt_jax.data import tokenizer
from nanogpt_jax.distributed.mesh import make_mesh
from nanogpt_jax.model import execution
from nanogpt_jax.run.checkpoint import Checkpointer, load_params
from nanogpt_jax.run.metrics import read_metrics
from nanogpt_jax.run.run_dir import checkpoint_steps
from nanogpt_jax.training.optim import make_optimizer
from nanogpt_jax.training.state import init_state, state_shapes
from nanogpt_jax.training.step import make_train_step

ROOT = Path(__file__).parent.parent
TINY = execution.resolve(ModelConfig(block_size=12, vocab_size=50, n_layer=2, n_head=2, n_embd=16, bias=True), "cpu")
Y = 3
PARAMS = jax.tree.map(  # biases and scales of their own, so that a forgotten one shows
    lambda x: x + 0.1 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
    head.init_params(TINY, Y, jax.random.key(0)),
)


def some_rows(n: int, width: int, seed: int = 0) -> np.ndarray:
    chance = np.random.default_rng(seed)
    rows = chance.integers(0, 50, (n, width + 2))
    rows[:, -2], rows[:, -1] = chance.integers(1, width + 1, n), chance.integers(0, Y, n)
    return rows.astype(np.int32)


# ---- the model ------------------------------------------------------------------------------------------------------


def numpy_logits(params, tokens: np.ndarray) -> np.ndarray:
    """One text, without padding [T] -> [Y]: the reference's blocks, then the last vector times the head."""
    whole = jax.tree.map(np.asarray, {**params, "wte": np.eye(50, 16)})  # logits over this "vocabulary" are the vector
    whole["wte"] = np.asarray(params["wte"])
    x = np.asarray(params["wte"], np.float64)[tokens] + np.asarray(params["wpe"], np.float64)[: len(tokens)]
    x = x[None]
    for layer in range(TINY.n_layer):
        block = gpt2_numpy.pick(params["h"], layer)
        x = x + gpt2_numpy.attention(block["attn"], gpt2_numpy.layer_norm(block["ln_1"], x))
        x = x + gpt2_numpy.mlp(block["mlp"], gpt2_numpy.layer_norm(block["ln_2"], x))
    last = gpt2_numpy.layer_norm(jax.tree.map(np.asarray, params["ln_f"]), x[0, -1])
    return last @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])


def test_the_head_reads_the_last_real_token_and_equals_numpy():
    tokens, lengths, _ = head.unpack(some_rows(5, 12))
    logits = head.logits(TINY, PARAMS, jnp.asarray(tokens), jnp.asarray(lengths))
    assert logits.shape == (5, Y)
    assert logits.dtype == jnp.float32
    expected = [numpy_logits(PARAMS, row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    np.testing.assert_allclose(logits, expected, atol=2e-5)


loss_and_gradients = jax.jit(jax.value_and_grad(functools.partial(head.mean_loss, TINY, weights=np.ones(Y))))


@given(st.integers(0, 1000))
def test_padding_changes_nothing(seed):
    """Neither what stands behind a text nor how wide the rows are, in the loss and in the gradients."""
    rows = some_rows(4, 8, seed)
    other = np.zeros((4, 12 + 2), np.int32)
    other[:, :8], other[:, -2:] = rows[:, :8], rows[:, -2:]
    behind = np.arange(12) >= rows[:, -2:-1]
    other[:, :-2][behind] = np.random.default_rng(seed).integers(0, 50, behind.sum())
    for a, b in zip(*(jax.tree.leaves(loss_and_gradients(PARAMS, r)) for r in (rows, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_weights_of_an_imbalance_multiply_the_loss_of_each_text():
    rows = some_rows(6, 12)
    weights = task.class_weights(np.array([0, 0, 0, 0, 0, 0, 1, 1, 2]), Y, "balanced")
    np.testing.assert_allclose(weights, [9 / (3 * 6), 9 / (3 * 2), 9 / 3])  # scikit-learn's "balanced"
    logits = np.array([numpy_logits(PARAMS, row[: row[-2]]) for row in rows])
    nats = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), rows[:, -1]]
    for w in (weights, task.class_weights(np.array([0, 1, 1, 2]), Y, "none")):
        loss = head.mean_loss(TINY, PARAMS, jnp.asarray(rows), weights=w)
        np.testing.assert_allclose(loss, sum(w[k] * x for k, x in zip(rows[:, -1], nats, strict=True)) / 6, rtol=1e-5)
    assert len(set(rows[:, -1])) == Y


def take_steps(n: int, freeze: bool = False, **changed):
    """The state and the losses after n steps on random rows."""
    values = {"model.dropout": 0.1, "classify.n_labels": Y, "train.steps": 20, **changed}
    model = replace(TINY, n_layer=1, scan_unroll=1)
    cfg = config.merge(ClassifierConfig(model=model), values, "test")
    mesh, tx = make_mesh(cfg.mesh), make_optimizer(cfg.optim, cfg.train.steps)
    tx = task.head_alone(tx) if freeze else tx
    cfg = replace(cfg, classify=replace(cfg.classify, freeze=freeze))
    objective = task.objective(cfg, 12, np.array([0.5, 1, 2], np.float32))
    cfg, how = execution.choose(cfg, "cpu", mesh.size)
    step, losses = make_train_step(cfg, tx, mesh, objective, replace(how, steps_per_dispatch=1)), []
    state = init_state(step.born, cfg.train.seed)
    before = jax.tree.map(np.asarray, state.params)
    for i in range(n):
        state, metrics = step.jitted(state, some_rows(cfg.train.batch_size, 12, i)[None], np.int32(1), step.dials(i))
        losses.append(float(metrics["loss"][0]))
    return before, state, losses


def test_a_mesh_changes_nothing():
    sizes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "classify.n_labels": Y}
    cfg = config.merge(ClassifierConfig(model=TINY), sizes, "test")
    mesh, tx = make_mesh(cfg.mesh), make_optimizer(cfg.optim, 9)
    shapes = state_shapes(tx, task.objective(cfg, 12, np.ones(Y, np.float32)), mesh)
    params = jax.device_put(PARAMS, jax.tree.map(lambda x: x.sharding, shapes.params))
    assert params["head"]["kernel"].addressable_shards[0].data.shape == (8, Y)
    rows = some_rows(8, 12)
    found = task.predict_step(cfg.model, mesh)(params, rows)
    tokens, lengths, _ = head.unpack(rows)
    expected = jax.nn.log_softmax(np.array([numpy_logits(PARAMS, t[:n]) for t, n in zip(tokens, lengths, strict=True)]))
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_body_stays_bit_for_bit_and_has_no_moments(optimizer):
    before, state, losses = take_steps(6, freeze=True, **{"optim.name": optimizer, "optim.learning_rate": 0.1})
    for name, x in before.items():
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (x, state.params[name])), strict=True)]
        assert not any(same) if name == "head" else all(same), name
    sizes = [x.size for x in jax.tree.leaves(state.opt_state)]
    assert max(sizes) == 16 * Y
    assert len(set(losses)) == 6


# ---- the scores -----------------------------------------------------------------------------------------------------


def test_confusion_matrix_and_macro_f1_are_scikit_learns():
    """The values in scikit-learn's documentation of confusion_matrix, f1_score and precision_recall_fscore_support."""
    confusion = scores.confusion_matrix(np.array([2, 0, 2, 2, 0, 1]), np.array([0, 0, 2, 2, 0, 2]), 3)
    np.testing.assert_array_equal(confusion, [[2, 0, 0], [0, 0, 1], [1, 0, 2]])
    assert abs(scores.macro_f1(confusion) - (0.8 + 0 + 2 / 3) / 3) < 1e-12
    confusion = scores.confusion_matrix(np.array([0, 1, 2, 0, 1, 2]), np.array([0, 2, 1, 0, 0, 1]), 3)
    assert round(scores.macro_f1(confusion), 2) == 0.27
    np.testing.assert_allclose(scores.precision_recall_f1(confusion)[0], [2 / 3, 1, 0.8])
    # a label that neither occurs nor is predicted has no say
    assert scores.macro_f1(np.array([[3, 0], [0, 0]])) == 1
    p = np.log([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]])
    found = scores.scores(p, np.array([0, 1, 1]))
    assert abs(found["loss"] + np.log(0.7 * 0.6 * 0.1) / 3) < 1e-12
    assert abs(found["accuracy"] - 2 / 3) < 1e-12
    assert abs(found["macro_f1"] - (0.8 * 0 + 2 * 1 / 3 + 2 * 1 / 3) / 2) < 1e-12


# ---- the data -------------------------------------------------------------------------------------------------------

SPANISH = ["el gato persigue al ratón", "el ratón huye del gato", "¿dónde está el perro?", "la casa es roja"]
ENGLISH = ["the cat chases the mouse", "the mouse runs, away", 'he said "hello"', "the house\nis red"]
EXAMPLES = [(text, label) for label, texts in (("es", SPANISH), ("en", ENGLISH)) for text in texts]


def write(path: str, examples, columns=("text", "label")) -> str:
    """Labelled texts as .jsonl, .csv, .tsv or .parquet."""
    records = [dict(zip(columns, e, strict=True)) for e in examples]
    if path.endswith(".parquet"):
        import datasets

        datasets.Dataset.from_list(records).to_parquet(path)
    elif path.endswith(".jsonl"):
        Path(path).write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    else:
        page = io.StringIO(newline="")
        rows = csv.writer(page, delimiter="\t" if path.endswith(".tsv") else ",")
        rows.writerows([columns, *examples])
        Path(path).write_text(page.getvalue(), encoding="utf-8-sig", newline="")
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("source", ["a.jsonl", "a.csv", "a.tsv", "a.parquet", "hf:folder"])
def test_every_format_gives_the_same_texts_and_labels(here, source):
    if source == "hf:folder":
        Path("folder").mkdir()
        write("folder/train.parquet", EXAMPLES, ("review", "stars"))
    else:
        write(source, EXAMPLES, ("review", "stars"))
    found = labelled.read(LabelledConfig(source=source, text_column="review", label_column="stars"))
    assert [(e.text, e.label) for e in found] == EXAMPLES


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.JSONL", '\ufeff{"text": "a \\"b\\"", "label": "x"}\n\ufeff{"text": "c", "label": "y"}\n'),
        ("a.json", '[{"text": "a \\"b\\"", "label": "x"}, {"text": "c", "label": "y"}]'),
        ("escaped.csv", 'text,label\n"a \\"b\\"",x\nc,y\n'),
        ("raw.tsv", 'label\ttext\nx\ta "b"\ny\tc\n'),
    ],
)
def test_files_as_people_have_them(here, name, content):
    Path(name).write_text(content, encoding="utf-8")
    assert [(e.text, e.label) for e in labelled.read(LabelledConfig(source=name))] == [('a "b"', "x"), ("c", "y")]
    assert [text for _, text in labelled.read_texts(Path(name), "text")] == ['a "b"', "c"]
    assert labelled.lines_of("\ufeffuno\r\n\ufeffdos".encode(), "standard input") == [(1, "uno"), (2, "dos")]


def test_whole_numbers_and_class_labels_are_labels_too(here):
    import datasets

    write("a.jsonl", [("uno", 1), ("diez", 10), ("dos", 2)])
    found = labelled.read(LabelledConfig(source="a.jsonl"))
    assert labelled_rows.labels_of(found, "") == [1, 2, 10]
    write("a.jsonl", [("uno", True), ("diez", False)])
    assert labelled_rows.labels_of(labelled.read(LabelledConfig(source="a.jsonl")), "") == ["false", "true"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "sí"])})
    data = datasets.Dataset.from_dict({"text": ["a b", "c d"], "label": [1, 0]}, features=features)
    data.to_parquet("named.parquet")
    assert [e.label for e in labelled.read(LabelledConfig(source="named.parquet"))] == ["sí", "no"]


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from("ab")), min_size=60, max_size=200))
def test_the_split_keeps_the_shares_of_labels_and_copies_together(pairs):
    texts = {(label, n) for n, label in pairs}
    cfg = LabelledConfig(val_fraction=0.2, test_fraction=0.1)
    if any(sum(label == x for label, _ in texts) < 6 for x in "ab"):
        return
    examples = [Example(f"{label} {n}", label, i) for i, (n, label) in enumerate(pairs)]
    parts = labelled.split(examples, cfg)
    assert sorted(e.line for p in parts.values() for e in p) == list(range(len(pairs)))
    for label in "ab":
        own = {name: {e.text for e in p if e.label == label} for name, p in parts.items()}
        n = sum(map(len, own.values()))
        assert len(set.union(*own.values())) == n  # no text on two sides
        assert len(own["val"]) == max(1, round(n * 0.2))
        assert len(own["test"]) == max(1, round(n * 0.1))
    again = labelled.split(examples[::-1], cfg)  # the order of the source does not matter
    assert {name: {e.text for e in p} for name, p in again.items()} == {
        n: {e.text for e in p} for n, p in parts.items()
    }


def split_of_before(examples, cfg):
    """The split of versions that knew nothing of texts with several labels: existing runs have it."""
    parts = {"test": [], "val": [], "train": []}
    for label in {e.label for e in examples}:
        key = functools.cache(lambda text: hashlib.sha256(text.encode()).hexdigest())
        texts = sorted({e.text for e in examples if e.label == label}, key=key)
        test, val = (max(1, round(len(texts) * f)) if f else 0 for f in (cfg.test_fraction, cfg.val_fraction))
        for name, some in (("test", texts[:test]), ("val", texts[test : test + val]), ("train", texts[test + val :])):
            parts[name] += [e for e in examples if e.label == label and e.text in some]
    return {name: sorted(part, key=lambda e: e.line) for name, part in parts.items()}


LABELLED = st.lists(st.tuples(st.integers(0, 60), st.sampled_from("abc")), min_size=90, max_size=250)


@given(LABELLED, st.sampled_from([0.0, 0.1, 0.25]))
def test_the_split_of_existing_runs_stays(pairs, test_fraction):
    """Of texts with one label each in any way, of others in the runs that began with it."""
    cfg = LabelledConfig(val_fraction=0.2, test_fraction=test_fraction)
    one = [Example(f"{label} {n}", label, i) for i, (n, label) in enumerate(pairs)]
    assume(all(len({e.text for e in one if e.label == label}) > 5 for label in "abc"))
    assert labelled.split(one, cfg) == labelled.split(one, cfg, by_text=False) == split_of_before(one, cfg)
    several = [Example(str(n), label, i) for i, (n, label) in enumerate(pairs)]
    assert labelled.split(several, cfg, by_text=False) == split_of_before(several, cfg)


@given(LABELLED)
def test_copies_of_a_text_stay_together_whatever_their_labels(pairs):
    cfg = LabelledConfig(val_fraction=0.2, test_fraction=0.1)
    examples = [Example(str(n), label, i) for i, (n, label) in enumerate(pairs)]
    texts = {label: {e.text for e in examples if e.label == label} for label in "abc"}
    assume(all(len(own) > 5 for own in texts.values()))
    parts = labelled.split(examples, cfg)
    assert sorted(e.line for p in parts.values() for e in p) == list(range(len(pairs)))
    own = {name: {e.text for e in p} for name, p in parts.items()}
    assert sum(map(len, own.values())) == len(set.union(*own.values()))
    rarest = min("abc", key=lambda label: (len(texts[label]), label))
    assert len(own["val"] & texts[rarest]) == max(1, round(len(texts[rarest]) * 0.2))  # exact: it decides first
    for label in "abc":
        assert all(own[name] & texts[label] for name in own)


def test_texts_with_several_labels_are_said_and_old_runs_keep_their_split(here):
    """As in a report: 40 of 80 texts labelled a stand again as b, among 90 that are b alone."""
    numbers = [(i, "a") for i in range(80)] + [(i, "b") for i in (*range(40), *range(200, 290))]
    write("two.csv", [(f"letter {i}", label) for i, label in numbers])
    cfg = ClassifierConfig(data=LabelledConfig(source="two.csv"))
    data = labelled.open_data(cfg)
    assert data.notes == [
        "40 texts stand with several labels, of which one can be right at most: 'letter 0' is a in line 2 and "
        "b in line 82"
    ]
    assert sum(len(set(texts.texts)) for texts in data.splits.values()) == 170
    assert data.manifest["splits"]["val"]["a"] == 8
    old = {k: v for k, v in data.manifest.items() if k != "split_by"}
    again = labelled.open_data(cfg, run=old)
    assert sum(len(set(texts.texts)) for texts in again.splits.values()) == 178
    before = split_of_before(labelled.read(cfg.data), cfg.data)
    assert {name: texts.texts for name, texts in again.splits.items()} == {
        name: [e.text for e in part] for name, part in before.items()
    }
    assert "in this run, which an earlier version began, they may stand in several splits" in again.notes[0]
    assert "split_by" not in again.manifest
    assert labelled.open_data(cfg, run=data.manifest).fingerprint == data.fingerprint != again.fingerprint


ORDERS = [
    ([str(i) for i in (10, 2, 0, 11, 1, 3)], ["0", "1", "2", "3", "10", "11"]),
    ([10, 9, -1], [-1, 9, 10]),
    (["10", "9", "-1"], ["-1", "9", "10"]),
    (["10.5", "9.0", "1e3"], ["9.0", "10.5", "1e3"]),
    (["b", "10", "a", "9"], ["9", "10", "a", "b"]),
    (["1", "01", "2"], ["01", "1", "2"]),
    ([1, "1", "b"], ["1", "b"]),
    (["9" * 5000, "8" * 5000], ["8" * 5000, "9" * 5000]),
]


@pytest.mark.parametrize(("given", "ordered"), ORDERS)
def test_the_order_of_labels(given, ordered):
    assert labelled_rows.labels_of([Example("text", label, 1) for label in given], "") == ordered


def test_the_order_of_labels_of_an_existing_run_stays(at, capsys):
    """Earlier versions ordered numbers as text: a run goes on, and is measured, with the labels that it has."""
    shutil.copytree("runs/c", "runs/reversed")
    about, cfg = (json.loads(Path(f"runs/reversed/{name}.json").read_text()) for name in ("data", "config"))
    about |= {"labels": ["es", "en"]}
    about |= {"fingerprint": labelled.open_data(data_config("runs/c"), run=about).fingerprint}
    Path("runs/reversed/data.json").write_text(json.dumps(about))
    assert json.loads(answers(capsys, "eval", "runs/reversed", "--json"))["labels"] == ["es", "en"]
    assert (
        train("--run-dir", "runs/reversed", "--train.steps", str(cfg["train"]["steps"]), "--classify.epochs", "8") == 0
    )
    assert "runs/reversed is finished" in capsys.readouterr().out
    assert json.loads(Path("runs/reversed/data.json").read_text())["labels"] == ["es", "en"]
    assert labelled.open_data(data_config("runs/c"), run={**about, "labels": ["es", "fr"]}).labels == [
        "en",
        "es",
    ]
    Path("runs/reversed/data.json").write_text(json.dumps({**about, "labels": [["es"], "en"]}))
    with pytest.raises(UserError, match=r"data\.json is damaged: its labels are"):
        classify.main(["eval", "runs/reversed"])


def data_config(run: str) -> ClassifierConfig:
    return config.read_json(Path(run) / "config.json", ClassifierConfig)


NEAR_LABELS = [
    (["spam", "spam ", "ham"], "the labels spam (3) and 'spam ' (3) differ only in spaces, case or what cannot be seen, and are 2 labels; if they are one, write them alike in the source"),
    (["spam", "spam\xa0"], "spam (3) and 'spam\\xa0' (3)"),
    (["spam", "sp\u200bam", "Spam", "SPAM"], "SPAM (3), Spam (3), spam (3) and 'sp\\u200bam' (3)"),
    (["sí", "si\u0301"], "'si\\u0301' (3) and 's\\xed' (3)"),
    (["1", "01", "1.0"], "the labels 01 (3), 1 (3) and 1.0 (3) are the same number, and are 3 labels"),
    (["NA", "x"], "NA (3) counts as a label; if that means that there is none, remove the rows"),
    ([True, "true", False], "some labels are text and some true or false: all are taken as text; one label is made of both for true"),
    ([1, "1", 2], "some labels are numbers and some text: all are taken as text; one label is made of both for 1"),
    (["spam", "sparm", "ham", "1", "11", "not spam", "none"], None),
    ([1, 2.0, 3], None),
    ([True, False], None),
]  # fmt: skip


@pytest.mark.parametrize(("labels", "note"), NEAR_LABELS)
def test_labels_that_a_person_takes_for_one_are_said_and_stay_apart(here, labels, note):
    write("a.jsonl", [(f"text {i} {label}", label) for label in labels for i in range(3)])
    data = labelled.open_data(ClassifierConfig(data=LabelledConfig(source="a.jsonl")))
    assert len(data.labels) == len({str(label).lower() if label is True else str(label) for label in labels})
    assert note in " ".join(data.notes) if note else not [n for n in data.notes if "label" in n]


def test_rows_without_text_are_skipped_and_said(here):
    """As in a report: a row in ten holds blanks for a text. `datasets` reads NA and null as no text at all."""
    write("a.csv", [("  " if i % 10 == 0 else f"text {i}", "xy"[i % 2]) for i in range(60)])
    found = labelled.read(LabelledConfig(source="a.csv"), notes := [])
    assert len(found) == 54
    assert [e.line for e in found[:10]] == [3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert notes == ["6 rows are skipped, as the text is blank: lines 2, 12, 22, 32, 42 and 52"]
    write("a.csv", [("NA", "x"), ("null", "None")])  # this reader leaves words alone
    assert [(e.text, e.label) for e in labelled.read(LabelledConfig(source="a.csv"))] == [("NA", "x"), ("null", "None")]
    Path("a.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": null, "label": "b"}\n{"label": "b"}\n')
    assert len(labelled.read(LabelledConfig(source="a.jsonl"), notes := [])) == 1
    assert notes == ["2 rows are skipped, as the text is missing (null, NA): lines 2 and 3"]
    write("a.parquet", [("a", 1.0), (None, None), ("b", 2.0), ("", 1.0)])
    found = labelled.read(LabelledConfig(source="a.parquet"), notes := [])
    assert [(e.text, e.label) for e in found] == [("a", 1), ("b", 2)]
    assert notes == ["2 rows are skipped, as the text is blank or missing (null, NA): lines 2 and 4"]


def test_batches_are_rows_in_an_order_of_each_epoch(here):
    write("a.jsonl", [(text * (i % 3 + 1), label) for i, (text, label) in enumerate(EXAMPLES * 4)])
    cfg = ClassifierConfig(
        model=ModelConfig(block_size=40), data=LabelledConfig(source="a.jsonl", val_fraction=0.3, test_fraction=0.0)
    )
    data = labelled.open_data(cfg)
    train, n = data.splits["train"], len(data.splits["train"])
    assert len(data.splits["test"]) == 0
    steps = train.batch(np.arange(3 * n), seed=1, batch_size=2, width=40)
    assert steps.shape == (3 * n, 2, 42)
    epochs = [[tuple(row) for row in epoch] for epoch in steps.reshape(-1, 42)[: 3 * n].reshape(3, n, 42)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(tuple, train.rows(np.arange(n), 40)))
    assert epochs[0] != epochs[1]
    np.testing.assert_array_equal(train.batch(np.array([5]), seed=1, batch_size=2, width=40)[0], steps[5])
    for i, row in enumerate(train.rows(np.arange(n), 40)):
        length = row[-2]
        assert data.tokenizer.decode(row[:length]) == train.texts[i][:40]  # the first block_size tokens
        assert not row[length:-2].any()
    assert any("longer than model.block_size=40" in note for note in data.notes)
    last = labelled.open_data(replace(cfg, data=replace(cfg.data, keep="last"))).splits["train"]
    longest = np.argmax([len(text) for text in last.texts])
    assert data.tokenizer.decode(last.rows(longest[None], 40)[0, :40]) == last.texts[longest][-40:]


def test_characters_that_the_tokenizer_lacks_are_left_out_and_counted(here):
    write("a.jsonl", EXAMPLES * 2)
    cfg = ClassifierConfig(data=LabelledConfig(source="a.jsonl", val_fraction=0.3))
    data = labelled.open_data(cfg)
    encoder = labelled.Encoder(data.tokenizer, 40, "first")
    tokens, _ = encoder.tokens(["el €gato€"], str)
    assert data.tokenizer.decode(tokens) == "el gato"
    assert encoder.notes() == ["characters that the tokenizer does not know are left out, 2: '€'"]
    with pytest.raises(UserError, match="text 7 has no character that the run's tokenizer knows"):
        encoder.tokens(["€€"], lambda i: f"text {i + 7}")


def test_words_that_the_tokenizer_lacks_are_left_out_and_counted():
    encoder = labelled.Encoder(tokenizer.make("word", "el gato negro"), 40, "first")
    tokens, starts = encoder.tokens(["gato-negro, el gatto negro"], str)
    assert starts.tolist() == [0, 2]
    assert tokens.tolist() == tokenizer.make("word", "el gato negro").encode("gato negro").tolist()
    assert encoder.notes()[0].startswith("words that the tokenizer does not know are left out, 5: ")
    with pytest.raises(UserError, match="text 7 has no word that the run's tokenizer knows"):
        encoder.tokens(["€€"], lambda i: f"text {i + 7}")


# ---- the command ----------------------------------------------------------------------------------------------------

SMALL = (
    "--data.source a.jsonl --data.val-fraction 0.3 --data.test-fraction 0.2 --model.block-size 32 --model.n-layer 1 "
    "--model.n-head 2 --model.n-embd 16 --train.batch-size 4 --train.log-every 1 --train.save-every 50 "
    "--optim.warmup-steps 2 --optim.learning-rate 1e-2"
).split()


def lines(n: int = 40) -> list[tuple[str, str]]:
    """Short texts whose language a small model learns in a few steps."""
    words = {"es": "el gato persigue al ratón y huye".split(), "en": "the cat chases a mouse that runs".split()}
    chance = np.random.default_rng(0)
    return [(" ".join(chance.choice(words[k], 5)), k) for _ in range(n) for k in words]


def train(*flags: str) -> int:
    return classify.main(["train", *with_flags(SMALL, flags)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with labelled texts, a trained classifier in runs/c and a language model in runs/lm."""
    folder = tmp_path_factory.mktemp("classify")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write("a.jsonl", lines())
        assert train("--run-dir", "runs/c", "--classify.epochs", "8") == 0
        make_language_model(Path("runs/lm"))
    return folder


def make_language_model(run: Path) -> None:
    """A run as train.py leaves it, of a model that nobody has trained."""
    tok = labelled.tokenizer.make("char", "\n".join(text for text, _ in lines()))
    model = ModelConfig(block_size=48, vocab_size=tok.n_vocab, n_layer=1, n_head=2, n_embd=16)
    cfg = config.Config(model=execution.resolve(model, "cpu"), train=config.TrainConfig(steps=1))
    run.mkdir()
    tok.save(run / "tokenizer")
    (run / "config.json").write_text(config.to_json(cfg))
    with Checkpointer(run, 1) as checkpoints:
        checkpoints.save(1, trees(make_state(cfg)), {"best_val_loss": None}, None)


@pytest.fixture
def at(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def answers(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert classify.main(list(argv)) == 0
    return capsys.readouterr().out


def test_it_learns_and_says_so(at, capsys):
    result = json.loads(answers(capsys, "eval", "runs/c", "--json"))
    assert result["source"] == "the test split of a.jsonl"
    assert result["labels"] == ["en", "es"]
    (only,) = result["results"]
    assert only["accuracy"] > 0.9
    assert np.sum(only["confusion"]) == result["texts"] > 10
    shown = answers(capsys, "eval", "runs/c")
    assert f"accuracy {only['accuracy']:.4f}, macro-F1 {only['macro_f1']:.4f}" in shown
    assert "the commonest label alone would be right in 0.5000" in shown
    rows = read_metrics(Path("runs/c/metrics.jsonl"))
    assert {"step", "val/loss", "val/accuracy", "val/macro_f1"} == set(rows[-1])


def test_predict_from_arguments_a_file_and_standard_input_agree(at, capsys, monkeypatch):
    texts = ["el gato huye", "the cat runs", "- the mouse"]
    out = answers(capsys, "predict", "runs/c", "--", *texts)
    assert [line.split("\t")[0] for line in out.splitlines()] == ["es", "en", "en"]
    assert all(0.5 < float(line.split("\t")[1]) <= 1 for line in out.splitlines())
    Path("lines.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    assert answers(capsys, "predict", "runs/c", "--file", "lines.txt") == out
    write("p.jsonl", [(text, "") for text in texts], ("review", "label"))
    assert answers(capsys, "predict", "runs/c", "--file", "p.jsonl", "--text-column", "review") == out
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(texts).encode())))
        assert answers(capsys, "predict", "runs/c") == out
    rows = [json.loads(line) for line in answers(capsys, "predict", "runs/c", "--json", "--", *texts).splitlines()]
    assert [row["label"] for row in rows] == ["es", "en", "en"]
    for row in rows:
        assert abs(sum(row["probabilities"].values()) - 1) < 1e-5
        assert row["probability"] == max(row["probabilities"].values()) == row["probabilities"][row["label"]]
    assert "line" not in rows[0]
    # what stands beside a text in its batch changes nothing
    alone = json.loads(answers(capsys, "predict", "runs/c", "--json", texts[0]))
    assert abs(alone["probability"] - rows[0]["probability"]) < 1e-5


@pytest.mark.parametrize("name", ["blank.txt", "blank.jsonl", "blank.csv", "standard input"])
def test_a_blank_line_is_skipped_and_its_place_kept(at, capsys, monkeypatch, name):
    texts = ["the cat runs", " ", "el gato huye"]
    content = "\n".join(texts) + "\n"
    if name != "standard input":
        write(name, [(text, "") for text in texts])
    if name == "blank.txt":
        Path(name).write_text(content)

    def ask(*flags: str) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        capsys.readouterr()
        assert (
            classify.main(["predict", "runs/c", *flags, *([] if name == "standard input" else ["--file", name])]) == 0
        )
        out, err = capsys.readouterr()
        return out.splitlines(), err

    rows, said = ask()
    assert [row.split("\t")[0] for row in rows] == ["en", "", "es"]
    first = 2 if name == "blank.csv" else 1  # the header is line 1
    assert f"note: a row is skipped, as the text is blank: line {first + 1}" in said
    rows = [json.loads(row) for row in ask("--json")[0]]
    assert [(row["line"], row["label"]) for row in rows] == [(first, "en"), (first + 2, "es")]


def test_a_blank_text_among_the_arguments_is_refused(at):
    with pytest.raises(UserError, match="one of the texts is empty"):
        classify.main(["predict", "runs/c", "el gato", "\u00a0"])


def test_probabilities_that_are_not_finite_are_refused(at, monkeypatch):
    monkeypatch.setattr(task, "log_probabilities", lambda *_, **__: np.full((1, 2), np.nan))
    for command in (["predict", "runs/c", "el gato", "--json"], ["eval", "runs/c", "--json"]):
        with pytest.raises(UserError, match=r"runs/c at step \d+ gives probabilities that are not finite"):
            classify.main(command)


def test_a_picture_goes_where_it_was_asked_for(at, capsys):
    Path("there.svg").write_text("old")
    Path("link.SVG").symlink_to("there.svg")
    answers(capsys, "eval", "runs/c", "--picture", "link.SVG")
    assert Path("link.SVG").is_symlink()
    assert Path("there.svg").read_text().startswith("<?xml")


def test_a_picture_that_cannot_be_is_refused_before_the_work(at, monkeypatch):
    monkeypatch.setattr(classify, "Classifier", None)
    with pytest.raises(UserError, match=r"^--picture=/proc/x\.svg"):  # not even root can write there
        classify.main(["eval", "runs/c", "--picture", "/proc/x.svg"])


def final(run: str, which: str = "latest"):
    cfg = config.read_json(Path(run) / "config.json", ClassifierConfig)
    return load_params(Path(run), task.param_shapes(cfg), which)


@pytest.mark.long
def test_a_stopped_run_goes_on_bit_for_bit_and_ends_early_as_the_whole_one(at, monkeypatch, capsys):
    """A learning rate that ruins the model: the best checkpoint comes early, and the run ends two evaluations later."""
    flags = "--optim.learning-rate 30 --optim.schedule constant --classify.epochs 9 --classify.patience 2".split()
    flags += "--classify.monitor macro-f1 --train.eval-every 5 --train.save-every 3".split()
    flags += "--model.dropout 0.1 --classify.class-weights balanced".split()
    assert train(*flags, "--run-dir", "whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, labelled.Texts, 4)
        assert train(*flags, "--run-dir", "cut") == 130
    out = capsys.readouterr().out
    assert "SIGINT: saved step" in out
    assert "go on with the same command: nanogpt-jax classify train --data.source a.jsonl" in out
    assert checkpoint_steps(Path("cut"))[-1] < checkpoint_steps(Path("whole"))[-1]
    assert train(*flags, "--run-dir", "cut", "--resume", "must") == 0
    assert "early (classify.patience=2); the best checkpoint is step" in capsys.readouterr().out
    assert numbers("cut") == numbers("whole")
    jax.tree.map(np.testing.assert_array_equal, final("cut"), final("whole"))
    evaluated = {row["step"]: row["val/macro_f1"] for row in numbers("whole") if "val/macro_f1" in row}
    best = max(evaluated, key=lambda s: evaluated[s])
    assert list(evaluated) == list(range(5, best + 11, 5))
    assert final("whole", "best")[1] == best
    before = numbers("whole")
    assert train(*flags, "--run-dir", "whole") == 0  # it stays ended
    assert "early (classify.patience=2)" in capsys.readouterr().out
    assert numbers("whole") == before


def test_a_finished_run_is_left_alone_and_another_one_is_refused(at, capsys):
    assert train("--run-dir", "runs/c", "--classify.epochs", "8") == 0
    assert "runs/c is finished: step 80 of 80" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"model.dropout: 0.1 in the run, 0.2 now"):
        train("--run-dir", "runs/c", "--classify.epochs", "8", "--model.dropout", "0.2")


def test_it_starts_from_a_language_model(at, capsys):
    flags = "--data.source a.jsonl --train.init-from runs/lm --train.batch-size 4 --train.steps 3".split()
    body, _ = load("runs/lm")
    frozen = ("--model.block-size", "40", "--classify.freeze", "true")
    assert classify.main(["train", *flags, *frozen, "--run-dir", "frozen"]) == 0
    assert "parameters from runs/lm, a head of 34, the 34 of the head trained" in capsys.readouterr().out
    params, _ = final("frozen")
    assert params.keys() == {*body, "head"}
    body["wpe"] = body["wpe"][:40]
    for name, x in body.items():
        jax.tree.map(np.testing.assert_array_equal, x, params[name])
    cfg = config.read_json(Path("frozen/config.json"), ClassifierConfig)
    assert (cfg.model.block_size, cfg.model.n_embd, cfg.data.tokenizer) == (40, 16, "runs/lm")
    mine, theirs = (Path(run, "tokenizer", "characters.txt").read_bytes() for run in ("frozen", "runs/lm"))
    assert mine == theirs
    command = config.load(["--train.init-from", "runs/lm"], ClassifierConfig)
    assert command.cfg.model.block_size == 48
    assert command.origin["model.n_layer"] == "runs/lm"


def test_the_picture_escapes_what_labels_hold(at, capsys):
    odd = {"es": "$\\frac$ \x1b[31m\n", "en": "ingl€s"}
    write("odd.jsonl", [(text, odd[label]) for text, label in lines()])
    shutil.copytree("runs/c", "odd")
    about = json.loads(Path("odd/data.json").read_text())
    Path("odd/data.json").write_text(json.dumps({**about, "labels": [odd["en"], odd["es"]]}))
    out = answers(capsys, "eval", "odd", "--source", "odd.jsonl", "--picture", "confusion.svg")
    out += answers(capsys, "predict", "odd", "el gato")
    assert "\x1b" not in out
    assert "\\x1b[31m\\n'\t" in out
    assert Path("confusion.svg").read_text().startswith("<?xml")


def test_other_texts_are_measured_by_the_labels_of_the_run(at, capsys):
    write("other.csv", [("el gato", "es"), ("the cat", "en"), ("the mouse", "en")], ("line", "language"))
    other = "--source other.csv --text-column line --label-column language --json".split()
    result = json.loads(answers(capsys, "eval", "runs/c", *other))
    assert result["texts"] == 3
    assert result["results"][0]["confusion"][0][1] + result["results"][0]["confusion"][0][0] == 2


def test_beside_tf_idf_and_logistic_regression(at, capsys):
    result = json.loads(answers(capsys, "eval", "runs/c", "--baseline", "--json"))
    ours, theirs = result["results"]
    assert theirs["name"] == "TF-IDF + logistic regression"
    assert theirs["accuracy"] > 0.9
    assert np.sum(theirs["confusion"], 1).tolist() == np.sum(ours["confusion"], 1).tolist()  # the same texts


# ---- what is wrong with it ------------------------------------------------------------------------------------------

WRONG_FILES = [
    ("missing column", "x.csv", "text,kind\nhola,es\n", "x.csv, line 2: there is no column data.label_column=label; there are text, kind\n       the first line names the columns"),
    ("semicolons", "x.csv", "text;label\nhola;es\n", "there are text;label\n       cells are separated by commas"),
    ("missing key", "x.jsonl", '{"text": "a", "label": "b"}\n{"text": "c"}\n', "x.jsonl, line 2: the label is missing (null, NA)"),
    ("a missing key at the start", "x.jsonl", '{"text": "c"}\n{"text": "a", "label": "b"}\n', "x.jsonl, line 1: there is no column data.label_column=label"),
    ("one label", "x.csv", "text,label\nhola,es\nadiós,es\n", "has the one label es; a classifier needs two or more"),
    ("few of a label", "x.csv", "text,label\nhola,es\nbye,en\nhi,en\nyes,en\nno,en\n", "has too few different texts with the label es, 1,"),
    ("empty file", "x.csv", "", "x.csv is empty"),
    ("a header alone", "x.csv", "text,label\n", "x.csv holds no texts"),
    ("broken csv", "x.csv", 'text,label\n"hola"x,es\n', "x.csv, line 2: its quotes do not match"),
    ("open quote", "x.csv", 'text,label\n"hola,es\n', "x.csv, line 2: a quote opens in this row and never closes"),
    ("a comma too many", "x.csv", "text,label\nhola,es\nhola, mundo,es\n", "x.csv, line 3: 3 cells, but the header has 2"),
    ("broken jsonl", "x.jsonl", '{"text": "a", "label": "b"}\n{"text": \n', "x.jsonl, line 2 is not JSON"),
    ("no object", "x.jsonl", '["a", "b"]\n', "x.jsonl, line 1 is not a JSON object"),
    ("a column twice", "x.csv", "text,label,text\na,b,c\n", "x.csv, line 1: 2 columns are called 'text'"),
    ("UTF-16", "x.csv", "text,label\na,b\n".encode("utf-16-le"), "x.csv is UTF-16LE, not UTF-8 text\n       convert it: iconv -f UTF-16LE -t UTF-8 x.csv > x-utf8.csv"),
    ("not UTF-8", "x.csv", b"text,label\nrat\xf3n,es\n", "x.csv, line 2 is not UTF-8 text: byte 0xf3 at offset 14"),
    ("a number for a text", "x.jsonl", '{"text": 3, "label": "b"}\n', "line 1: the text is 3, not text"),
    ("empty texts alone", "x.csv", "text,label\n,es\n   ,\n", "x.csv holds no texts: each of the 2 is blank"),
    ("texts of null alone", "x.jsonl", '{"text": null, "label": "b"}\n{"text": NaN, "label": "b"}\n{"text": "", "label": "b"}\n', "x.jsonl holds no texts: each of the 3 is blank or missing (null, NA)"),
    ("empty labels", "x.csv", "text,label\n" + "hola,\nbye,en\n, \n" * 12, "x.csv, line 2: the label is empty\n       in all 12 rows: lines 2, 5, 8, 11, 14, 17, 20, 23, 26, 29 and 2 more\n       give each text a label"),
    ("an unseen label", "x.csv", "text,label\nhola,\u200b\n", "x.csv, line 2: the label is empty"),
    ("all that is wrong", "x.jsonl", '{"text": "a", "label": NaN}\n{"text": 3, "label": "b"}\n{"text": "a", "label": ""}\n{"text": "b", "label": null}\n', "x.jsonl, line 1: the label is missing (null, NA)\n       in all 2 rows: lines 1 and 4\n       data.source=x.jsonl, line 2: the text is 3, not text\n       data.source=x.jsonl, line 3: the label is empty"),
    ("ids for labels", "x.csv", "text,label\n" + "".join(f"text {i},id{i}\n" for i in range(99)), "has too few different texts with 99 of 99 labels, id0 (1), id1 (1),"),
    ("ids for labels: what to do", "x.csv", "text,label\n" + "".join(f"text {i},{i}\n" for i in range(99)), "data.label_column=label looks like an id, a text or a measured number"),
    ("measurements for labels", "x.jsonl", '{"text": "a", "label": 1.0}\n{"text": "b", "label": 2.5}\n{"text": "c", "label": 3.25}\n', "line 2: the label 2.5 must be text or a whole number\n       in all 2 rows: lines 2 and 3"),
    ("few because of a space", "x.csv", "text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(20)) + "u,a \n", "with the label 'a ', 1, to keep data.val_fraction=0.3 and data.test_fraction=0.2 of them\n       give more of them, leave the label out, or check that data.label_column is the label\n       the labels a (10) and 'a ' (1) differ only in spaces"),
    ("half a character", "x.jsonl", '{"text": "a\\ud800", "label": "b"}\n', "line 1: the text holds half a character"),
    ("no label", "x.jsonl", '{"text": "a", "label": null}\n', "line 1: the label is missing (null, NA)"),
    ("half a label", "x.jsonl", '{"text": "a", "label": 0.5}\n', "line 1: the label 0.5 must be text or a whole number"),
    ("unknown format", "x.xls", "text,label\n", "data.source=x.xls is none of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, hf:NAME, python"),
    ("not parquet", "x.parquet", "text", "data.source=x.parquet cannot be read as Parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), [w[1:] for w in WRONG_FILES], ids=[w[0] for w in WRONG_FILES])
def test_wrong_files(here, name, content, message):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as e:
        train("--data.source", name)
    assert message in str(e.value)
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


WRONG_COMMANDS = [
    ("misspelt", "trian", "classify trian is none of train, eval, predict\n       did you mean train?"),
    ("no such source", "train --data.source gone.csv", "cannot read data.source=gone.csv: No such file"),
    ("no such data set", "train --data.source hf:nobody/nothing", "data.source=hf:nobody/nothing (data.split=train) cannot be opened"),
    ("unknown setting", "train --clasify.freeze true", "unknown setting clasify.freeze (command line)\n       did you mean classify.freeze?"),
    ("a setting of train.py", "train --data.dir x", "unknown setting data.dir (command line)"),
    ("not a choice", "train --classify.class-weights balance", "not one of none, balanced"),
    ("nothing to train on", "train --data.test-fraction 0.9", "data.test_fraction=0.9 and data.val_fraction=0.1 leave no training texts"),
    ("frozen noise", "train --classify.freeze true", "classify.freeze=True would train a head on untrained weights"),
    ("another number of labels", "train --data.source a.jsonl --classify.n-labels 5 --run-dir new", "classify.n_labels=5 (command line), but the data has 2 labels"),
    ("another size than its beginning", "train --train.init-from runs/lm --model.n-embd 64", "model.n_embd=64 (command line), but train.init_from=runs/lm (command line) has model.n_embd=16"),
    ("another tokenizer than its beginning", "train --train.init-from runs/lm --data.tokenizer gpt2", "data.tokenizer=gpt2 (command line) is another tokenizer than that of train.init_from=runs/lm"),
    ("a longer context than its beginning", "train --train.init-from runs/lm --model.block-size 64", "model.block_size=64 (command line), but train.init_from=runs/lm (command line) has model.block_size=48"),
    ("a beginning without weights", "train --train.init-from runs/none", "train.init_from=runs/none has no checkpoint yet"),
    ("a classifier as a beginning", "train --train.init-from runs/c", "runs/c is a classifier, not a language model"),
    ("nowhere to begin", "train --train.init-from gone", "train.init_from=gone is not a run directory"),
    ("a language model's directory", "train --data.source a.jsonl --run-dir runs/lm", "runs/lm is a language model, not a classifier"),
    ("eval of nothing", "eval", "classify eval needs the directory of a run"),
    ("eval of a language model", "eval runs/lm", "runs/lm is a language model, not a classifier"),
    ("predict with a language model", "predict runs/lm hola", "train one from it: nanogpt-jax classify train --train.init-from runs/lm"),
    ("no such run", "predict runs/d hola", "no run runs/d"),
    ("without a checkpoint", "predict runs/new hola", "runs/new has no checkpoint yet"),
    ("no such checkpoint", "predict runs/c hola --checkpoint 99999", "runs/c has no checkpoint 99999; it has"),
    ("without labels", "predict runs/nolabels hola", "data.json is missing or damaged"),
    ("another run's tokenizer", "predict runs/foreign hola", "runs/foreign is damaged: its tokenizer has"),
    ("unknown label", "eval runs/c --source french.csv", "--source=french.csv, line 3: the run has no label fr (2) and 'es ' (1; is it es?); it has en and es\n       give them labels of the run, or remove the rows: 3 of 4"),
    ("no label in eval", "eval runs/c --source nolabel.csv", "--source=nolabel.csv, line 2: the label is empty"),
    ("no such column in eval", "eval runs/c --source french.csv --label-column kind", "--source=french.csv, line 2: there is no column --label-column=kind"),
    ("split of what", "eval runs/c --split test", "--split says how to read --source, which is not given"),
    ("unknown flag", "eval runs/c --pictures x.png", "unknown flag --pictures\n       did you mean --picture?"),
    ("no such picture", "eval runs/c --picture x.docx", "--picture=x.docx must end in one of"),
    ("no such folder", "eval runs/c --picture gone/x.png", "--picture=gone/x.png: there is no directory"),
    ("two runs", "eval runs/c runs/d", "one run at a time"),
    ("text and file", "predict runs/c hola --file a.jsonl", "texts and --file=a.jsonl exclude each other"),
    ("no such file", "predict runs/c --file gone.txt", "cannot read gone.txt: No such file"),
    ("no such column", "predict runs/c --file a.jsonl --text-column review", "a.jsonl, line 1: there is no column --text-column=review; there are text, label"),
    ("empty lines alone", "predict runs/c --file empty.txt", "empty.txt holds no texts: each of the 2 is blank"),
    ("unknown characters alone", "predict runs/c €€€", "text 1 ('€€€') has no character that the run's tokenizer knows"),
    ("unknown characters in lines", "predict runs/c --file unknown.txt", "unknown.txt, line 3 ('€') has no character that the run's tokenizer knows; leave it out\n       in all 2 texts: line 3 ('€') and line 4 ('¢')"),
    ("a number for a text", "predict runs/c --file number.jsonl", "number.jsonl, line 1: the text is 3, not text"),
    ("not UTF-8", "predict runs/c a\udce9", "the text 'a\\udce9' is not UTF-8"),
    ("a picture in place of a folder", "eval runs/c --picture runs.svg", "--picture=runs.svg is a directory"),
]  # fmt: skip


@pytest.fixture(scope="module")
def spoilt(place):
    """`place` with what the wrong commands need."""
    (place / "french.csv").write_text("text,label\nel gato,es\nle chat,fr\nle chien,fr\nel gato,es \n")
    (place / "nolabel.csv").write_text("text,label\nel gato,\n")
    (place / "empty.txt").write_text("\u00a0\n\n")
    (place / "unknown.txt").write_text("el gato\n\n€\n¢\n")
    (place / "number.jsonl").write_text('{"text": 3}\n')
    (place / "runs.svg").mkdir()
    (place / "runs/none").mkdir()
    shutil.copy(place / "runs/lm/config.json", place / "runs/none/config.json")
    for name in ("new", "nolabels", "foreign"):
        shutil.copytree(place / "runs/c", place / "runs" / name)
    shutil.rmtree(place / "runs/new/checkpoints")
    (place / "runs/nolabels/data.json").write_text("{}")
    shutil.rmtree(place / "runs/foreign/tokenizer")
    labelled.tokenizer.make("char", "".join(map(chr, range(32, 1000)))).save(place / "runs/foreign/tokenizer")
    return place


@pytest.mark.parametrize(("command", "message"), [w[1:] for w in WRONG_COMMANDS], ids=[w[0] for w in WRONG_COMMANDS])
def test_wrong_commands(spoilt, here, monkeypatch, capsys, command, message):
    monkeypatch.chdir(spoilt)
    refused(classify.main, command, capsys, message)


def test_changed_texts_are_refused(at):
    shutil.copytree("runs/c", "mine")
    cfg = Path("mine/config.json")
    cfg.write_text(cfg.read_text().replace("a.jsonl", "mine.jsonl"))
    write("mine.jsonl", lines()[:-2])
    with pytest.raises(UserError, match="the data of mine has changed"):
        train("--data.source", "mine.jsonl", "--run-dir", "mine", "--classify.epochs", "8")
    with pytest.raises(UserError, match=r"the data of mine has changed: mine\.jsonl gives other texts now"):
        classify.main(["eval", "mine"])


def test_a_classifier_is_no_language_model(at, capsys, clean_env):
    """sample.py and train.py say what a classifier's directory is; without an argument, sample.py passes it by."""
    with pytest.raises(
        UserError, match="runs/c is a classifier, not a language model\n       ask it: nanogpt-jax classify"
    ):
        door("sample").main(["runs/c"])
    with pytest.raises(UserError, match="runs/c is a classifier"):
        door("train").main(["--data.source", "a.jsonl", "--run-dir", "runs/c", "--overwrite"])
    os.utime("runs/c/checkpoints", (2**31, 2**31))
    assert door("sample").main(["--prompt", "el", "--max-new-tokens", "1"]) == 0
    command = [sys.executable, "-m", "nanogpt_jax", "classify", "predict", "runs/lm", "hola"]
    result = subprocess.run(command, cwd=at, env={**clean_env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    refusal(result.returncode, result.stdout, result.stderr, "error: runs/lm is a language model")


@pytest.mark.long
def test_prose_and_code_are_told_apart():
    """Real text that every machine has: a small model learns in seconds to separate Python from prose about it."""
    cfg = config.merge(
        ClassifierConfig(),
        {
            "model.block_size": 64,
            "model.n_layer": 1,
            "model.n_head": 2,
            "model.n_embd": 32,
            "optim.learning_rate": 1e-2,
        },
        "test",
    )
    data = labelled.open_data(cfg)
    assert data.labels == ["code", "prose"]
    cfg = with_labels(config.with_vocabulary(cfg, data.tokenizer.n_vocab, None, {}), 2, 1600, {})
    cfg, how = execution.choose(replace(cfg, train=replace(cfg.train, steps=144)), "cpu")
    mesh, tx = make_mesh(cfg.mesh), make_optimizer(cfg.optim, 144)
    objective, how = task.objective(cfg, 64, np.ones(2, np.float32)), replace(how, steps_per_dispatch=8)
    step = make_train_step(cfg, tx, mesh, objective, how)
    state = init_state(step.born, cfg.train.seed)
    for first in range(0, 144, 8):
        rows = data.splits["train"].batch(np.arange(first, first + 8), seed=0, batch_size=16, width=64)
        state, _ = step.jitted(state, rows, np.int32(8), step.dials(first))
    test = data.splits["test"]
    tokens, lengths, labels = head.unpack(jnp.asarray(test.rows(np.arange(len(test)), 64)))
    predicted = head.logits(cfg.model, state.params, tokens, lengths).argmax(1)
    assert (predicted == labels).mean() > 0.8


def test_help_names_every_setting(capsys):
    for words in (["--help"], ["eval", "--help"], ["predict", "--help"]):
        assert classify.main(words) == 0
    assert "--picture FILE" in capsys.readouterr().out
    assert classify.main(["train", "--help"]) == 0
    page = capsys.readouterr().out
    assert not re.search(r"(INT|FLOAT|TEXT|\})\s+\(default", page), "a setting without a comment"
    told = " ".join(page.split())
    assert "the column with the label: a string or a whole number (default: label)" in told  # its own
    assert "evaluations on the validation texts; 0: once an epoch (default: 0)" in told  # not a language model's
    assert "the dropout (default: 1337)" in told  # the same
    page = page.replace("-", "_")
    assert all(key in page for key in types_of(ClassifierConfig))
    assert not any(key.startswith("classify") for key in types_of())
