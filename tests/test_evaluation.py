"""Evaluation: the loss to the last digit, honest errors, items by lm-eval's rules, two runs compared, wrong inputs."""

import base64
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import load, make_state, refused, trees
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_jax import api, config
from nanogpt_jax.cli import door
from nanogpt_jax.commands import evaluate
from nanogpt_jax.config import MeshConfig, UserError
from nanogpt_jax.data import batches, tokenizer
from nanogpt_jax.data.dataset import open_data
from nanogpt_jax.distributed.mesh import make_mesh
from nanogpt_jax.distributed.sharding import shard
from nanogpt_jax.evaluation import compare, figures, likelihood, loss, multiple_choice, statistics, texts
from nanogpt_jax.model import gpt2
from nanogpt_jax.run import run_dir
from nanogpt_jax.run.checkpoint import Checkpointer, save_params
from nanogpt_jax.run.metrics import read_metrics
from nanogpt_jax.run.opened import open_run

WORDS = "El gato negro persigue al ratón gris y el ratón huye del gato hasta la casa vieja del río".split()
T = 16
FLAGS = (
    f"--data.source text.txt --model.block-size {T} --model.n-layer 1 --model.n-head 2 --model.n-embd 32 "
    "--optim.name adamw --optim.learning-rate 1e-2 --optim.warmup-steps 2 --train.batch-size 8 --train.eval-every 0 "
    "--train.save-every 0"
).split()


def prose(n: int, seed: int) -> str:
    chance = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in chance.integers(0, len(WORDS), n)) + "."


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with runs/a, runs/b (another seed), runs/pairs (GPT-2's tokens), items in files, and wrong things."""
    folder = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("nanogpt_jax.inference.sampler.opening_and_continuation", lambda *_, **__: "")  # not asked for
        Path("text.txt").write_text(prose(1200, 0), encoding="utf-8")
        patch.setattr(tokenizer.GPT2Tokenizer, "make", classmethod(lambda cls, *_: cls(small_ranks())))
        steps = ["--train.steps", "40", "--run-dir"]
        assert door("train").main([*FLAGS, *steps, "runs/a"]) == 0
        untrained([*FLAGS, *steps, "runs/b"])
        untrained([*FLAGS, *steps, "runs/pairs", "--data.tokenizer", "gpt2"])
        write_items(folder)
        yield folder


def small_ranks() -> bytes:
    """A vocabulary of bytes and pairs: tokens of several bytes, and characters of several tokens."""
    tokens = [bytes([b]) for b in range(256)] + [b" g", b" ga", b"at", b"to", b" e", b" el", b"El", "ó".encode()]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def untrained(flags: list[str]) -> None:
    """A run with its initial weights."""
    command = config.load(flags)
    with run_dir.claim(command) as path:
        data = open_data(command.cfg.data)
        cfg = config.with_vocabulary(command.cfg, data.tokenizer.n_vocab, None, command.origin)
        run_dir.prepare(path, command, cfg, data)
        with Checkpointer(path, keep=1) as checkpoints:
            checkpoints.save(1, trees(make_state(cfg)), {"best_val_loss": None}, None)


def write_items(folder: Path) -> None:
    """True continuations of held-out text beside those of other places, in the published forms."""
    words, chance = prose(700, 1).split(" "), np.random.default_rng(2)
    choices, last = [], []
    for i in range(0, 600, 15):
        endings = [" ".join(words[k : k + 2]) for k in (i + 7, *chance.integers(0, 600, 3).tolist())]
        gold = int(chance.integers(4))
        endings[0], endings[gold] = endings[gold], endings[0]
        choices.append({"ctx": " ".join(words[i : i + 7]), "endings": endings, "label": str(gold)})
        last.append({"text": " ".join(words[i : i + 9])})
    for name, rows in {"choices": choices, "last": last}.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def model(place) -> likelihood.Model:
    """runs/a on all 8 devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return api.for_scoring(open_run(Path("runs/a")))[0]


def run(*words: str) -> dict:
    """What `eval` writes as JSON."""
    assert evaluate.main([*words, "--json", "out.json"]) == 0
    return json.loads(Path("out.json").read_text(encoding="utf-8"))


def alone(model: likelihood.Model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """-log p of each token after the first, and the likeliest tokens, one sequence by itself: [n-1] each."""
    n, padded = len(ids) - 1, np.zeros((1, T), np.int32)
    padded[0, :n] = ids[:-1]
    log_p = np.asarray(jax.nn.log_softmax(jitted_forward(model.cfg, model.params, padded)[0]))[:n]
    return -log_p[np.arange(n), ids[1:]], log_p.argmax(-1)


jitted_forward = jax.jit(gpt2.forward, static_argnums=0)  # causal: what is padded behind changes nothing


# ---- the loss -------------------------------------------------------------------------------------------------------


@given(st.integers(2, 90), st.integers(1, 12), st.integers(1, 12), st.integers(1, 7))
def test_windows_predict_every_token_once_from_enough_context(length, block, stride, batch_size):
    stride = min(stride, block)
    tokens, predicted, n = np.arange(1000, 1000 + length), [], 0
    for window, weights in batches.validation(tokens, block_size=block, batch_size=batch_size, stride=stride):
        n += int((weights.sum(1) > 0).sum())
        for row, counted in zip(window, weights > 0, strict=True):
            for j in np.flatnonzero(counted):
                assert row[j + 1] == row[j] + 1
                assert j + 1 >= min(row[j + 1] - 1000, block - stride + 1)  # tokens that it was predicted from
                predicted.append(int(row[j + 1]))
    assert predicted == tokens[1:].tolist()
    assert n == batches.n_validation(tokens, block, stride)


@pytest.mark.parametrize("stride", [0, 5])
def test_the_loss_is_the_same_to_the_last_bit_for_any_batch_size_and_number_of_devices(model, stride):
    n = 7000 if stride == 0 else 3000
    tokens = np.random.default_rng(0).integers(0, model.cfg.vocab_size, n)
    found = {}
    for devices, batch_size in [(1, 0), (1, 7), (1, 300), (2, 200), (8, 0)]:
        mesh = make_mesh(MeshConfig(data=devices))
        params = jax.device_put(model.params, shard(mesh))
        score = loss.make_score(model.cfg, mesh)
        kind = {"block_size": T, "stride": stride, "batch_size": batch_size}
        found[devices, batch_size] = loss.token_nats(score, params, tokens, mesh, **kind)
    assert all(np.array_equal(nats, found[1, 0]) for nats in found.values())
    # and they are right: each token from the window that it belongs to, computed alone
    for at in (1, T, T + 1, T + 3, 2000, n - 1):
        step, first = stride or T, 0
        while at > first + T:
            first += step
        window = tokens[first : first + T + 1].tolist()
        np.testing.assert_allclose(found[1, 0][at - 1], alone(model, window)[0][at - first - 1], rtol=2e-5)


def test_it_says_what_training_said_and_prints_the_same_on_one_device_as_on_eight(here, clean_env, capsys):
    found = run("runs/a")["runs"][0]["loss"]
    trained = read_metrics(Path("runs/a/metrics.jsonl"))[-1]
    for ours, theirs in {
        "nats_per_token": "loss",
        "perplexity": "perplexity",
        "bits_per_byte": "bits_per_byte",
    }.items():
        assert found[ours]["value"] == trained[f"val/{theirs}"]
        assert found[ours]["error"] > 0
    shown = capsys.readouterr().out
    assert f"{found['nats_per_token']['value']:.6f} ± {found['nats_per_token']['error']:.6f} nats a token" in shown
    command = [sys.executable, "-m", "nanogpt_jax", "eval", "runs/a", "--json", "one.json", "--batch-size", "3"]
    done = subprocess.run(command, cwd=here, env=clean_env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, shown), done.stderr
    assert Path("one.json").read_text() == Path("out.json").read_text()


def test_a_huge_perplexity_is_printed_with_few_digits(capsys):
    for value in (12.3456, 427.132849, 9999.123, 1.0142e304):
        evaluate._row("perplexity", statistics.Estimate(value, value / 50), 4)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows] == ["12.3456", "427.133", "9999.12", "1.0142e+304"]
    assert [row[3] for row in rows] == ["0.2469", "8.54266", "199.982", "2.0284e+302"]


def test_a_stride_gives_more_context_and_other_data_is_read_with_the_runs_tokenizer(here):
    whole = run("runs/a")["runs"][0]["loss"]
    closer = run("runs/a", "--stride", "4")["runs"][0]["loss"]
    assert closer["tokens"] == whole["tokens"]
    assert closer["nats_per_token"]["value"] != whole["nats_per_token"]["value"]
    Path("other.txt").write_text(prose(300, 5), encoding="utf-8")
    other = run("runs/a", "--data", "other.txt")["runs"][0]["loss"]
    assert other["bytes"] == len(prose(300, 5).encode())
    assert other["tokens"] == len(prose(300, 5)) - 1
    train = run("runs/a", "--split", "train")["runs"][0]["loss"]
    assert train["tokens"] > 8 * whole["tokens"]


def test_given_rows_are_read_as_training_reads_them(here):
    """Rows without text are no documents, so no end-of-text is counted for them."""
    rows = ["El gato", "", None, "el ratón", "   ", ""]
    Path("gaps.jsonl").write_text("".join("\ufeff" + json.dumps({"text": t}) + "\n" for t in rows), encoding="utf-8")
    pairs = open_run(Path("runs/pairs"))
    read = texts.given("gaps.jsonl", texts.read("gaps.jsonl", "text"), pairs.tokenizer, pairs.path)
    end = pairs.tokenizer.end_of_text
    expected = [[*pairs.tokenizer.encode(text).tolist(), end] for text in rows if text]
    assert read.tokens.tolist() == [token for tokens in expected for token in tokens]
    assert read.n_bytes == sum(len(text.encode()) for text in rows if text)


# ---- errors and differences -----------------------------------------------------------------------------------------


def test_a_mean_and_a_ratio_have_the_errors_of_the_textbook():
    values = [1.0, 2.0, 4.0, 9.0]
    found = statistics.mean(values)
    assert found.value == 4.0
    assert math.isclose(found.error, np.std(values, ddof=1) / 2)
    alike = statistics.ratio(np.array(values) * 10, np.full(4, 10))
    assert math.isclose(alike.value, 4.0)
    assert math.isclose(alike.error, found.error)
    assert statistics.mean([3.0]) == statistics.Estimate(3.0, None)


def test_the_error_of_a_loss_is_as_large_as_the_loss_really_varies():
    """Texts with easy and hard passages of 200 tokens: what is said of one text, and how 300 texts differ."""
    chance = np.random.default_rng(0)
    losses, said, of_windows = [], [], []
    for _ in range(300):
        nats = np.repeat(chance.normal(2, 1, 100), 200) + chance.normal(0, 1, 20_000)
        found = {}
        for block in (16, 625):
            starts = np.arange(0, 20_000, 16) if block == 16 else statistics.stretches(20_000, 16)
            counts = np.diff(np.append(starts, 20_000))
            found[block] = statistics.ratio(np.add.reduceat(nats, starts), counts)
        losses.append(found[625].value)
        said.append(found[625].error)
        of_windows.append(found[16].error)
    assert np.mean(said) == pytest.approx(np.std(losses), rel=0.2)
    assert np.mean(of_windows) < 0.5 * np.std(losses)  # what windows of 16 tokens would have said
    assert len(statistics.stretches(20_000, 16)) <= statistics.MOST


def test_two_runs_on_the_same_text_and_items(here, capsys):
    found = run("runs/b", "runs/a", "--split", "val", "--choices", "choices.jsonl", "--last-word", "last.jsonl")
    b, a = (r["loss"]["nats_per_token"] for r in found["runs"])
    by_name = {d["what"]: d for d in found["differences"]}
    nats = by_name["nats a token"]
    assert nats["difference"]["value"] == pytest.approx(a["value"] - b["value"], abs=1e-12)
    assert nats["better"] == "runs/a"
    shown = capsys.readouterr().out
    assert f"runs/a is better than runs/b by {abs(nats['difference']['value']):.4f} ±" in shown
    acc = [r["choices"]["acc"]["value"] for r in found["runs"]]
    assert by_name["acc in multiple choice"]["difference"]["value"] == pytest.approx(acc[1] - acc[0])
    assert by_name["nats a last word"]["better"] == "runs/a"
    same = run("runs/a", "runs/a")["differences"]
    assert same[0]["difference"] == {"value": 0.0, "error": 0.0}
    assert same[0]["better"] is None
    assert "no difference: 0 ± 0.0000 nats a token" in same[0]["words"]


def test_a_difference_is_paired(here):
    """Two models that find the same passages hard: each loss is unsure, their difference is not."""
    chance = np.random.default_rng(0)
    hard = np.repeat(chance.normal(2, 1, 100), 100)
    a, b = ({"nats": hard + chance.normal(shift, 0.1, 10_000)} for shift in (0.0, -0.01))
    text = texts.Text("text", np.zeros(10_001, np.int32), 10_001, open_run(Path("runs/a")).tokenizer)
    (found,) = compare.differences(compare.Side("runs/a", T, text, a), compare.Side("other", T, text, b))
    assert found["difference"].value == pytest.approx((b["nats"] - a["nats"]).mean())
    assert found["difference"].error == pytest.approx(0.1 * 2**0.5 / 100, rel=0.3)
    assert figures.of_text(a["nats"], text, T, 0)["nats_per_token"].error > 0.08
    assert found["better"] == "other"
    assert found["words"].startswith("other is better than runs/a by 0.0")


def test_runs_with_other_tokens_are_compared_by_the_byte(here):
    found = run("runs/a", "runs/pairs")
    bits = [r["loss"]["bits_per_byte"]["value"] for r in found["runs"]]
    (difference,) = found["differences"]
    assert difference["what"] == "bits a byte"
    # the two leave out the first token each, and are compared behind the longer one
    assert difference["difference"]["value"] == pytest.approx(bits[1] - bits[0], rel=0.02)


def test_stretches_of_two_tokenizers_hold_the_same_bytes(here):
    text = prose(400, 3) + " ñandú 漢字 😀 fin"
    tokenizers = [tokenizer.make("char", text), open_run(Path("runs/pairs")).tokenizer]
    read = [texts.Text("text", each.encode(text), len(text.encode()), each) for each in tokenizers]
    # each token costs as many nats as it has bytes: then both must find the bytes of every stretch
    nats = [
        np.array([len(each.tokenizer.decode_bytes([token])) for token in each.tokens[1:].tolist()], float)
        for each in read
    ]
    sums, counts = compare.by_bytes(read, nats, [T, T])
    assert sums[0].tolist() == sums[1].tolist() == counts.tolist()
    assert counts.sum() == len(text.encode()) - len(tokenizers[1].decode_bytes([read[1].tokens[0]]))
    assert len(counts) > 10


# ---- items with an answer -------------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_each_item_alone(model):
    """Of many lengths, padded and in another order; a context that is too long keeps its end."""
    texts = [(prose(1 + n % 9, n), " " + prose(1 + n % 3, n + 50)[:14]) for n in range(30)]
    pairs = [likelihood.encode_pair(model, *text, "here") for text in texts]
    assert max(len(a) + len(b) for a, b in pairs) > T + 1 > min(len(a) + len(b) for a, b in pairs)
    for (context, rest), found in zip(pairs, likelihood.log_likelihoods(model, pairs), strict=True):
        ids = (context + rest)[-(T + 1) :]
        nats, likeliest = alone(model, ids)
        np.testing.assert_allclose(found.nats, -nats[-len(rest) :].sum(), rtol=1e-5)
        assert found.greedy == (likeliest[-len(rest) :].tolist() == rest)


def test_the_seam_of_context_and_continuation_follows_lm_eval(model, here):
    def decoded(model, *pair):
        return [model.tokenizer.decode(part) for part in likelihood.encode_pair(model, *pair, "here")]

    assert decoded(model, "El gato ", "negro") == ["El gato", " negro"]  # the space belongs to what follows
    assert decoded(model, "", "El") == [model.tokenizer.decode([0]), "El"]  # no newline in this vocabulary
    pairs = api.for_scoring(open_run(Path("runs/pairs")))[0]
    assert decoded(pairs, "", " gato") == ["<|endoftext|>", " gato"]


def test_choices_and_last_words_are_counted_by_the_rules(model, monkeypatch):
    answers = {" bueno": -3.0, " bu": -2.0, " no": -2.5, "ñ": -1.0}

    def told(model, pairs, track):
        texts = [model.tokenizer.decode(rest) for _, rest in pairs]
        return [likelihood.Likelihood(answers[t], t == " no") for t in texts]

    monkeypatch.setattr(multiple_choice, "log_likelihoods", told)
    monkeypatch.setattr(
        multiple_choice, "encode_pair", lambda model, context, rest, where: ([0], model.tokenizer.encode(rest).tolist())
    )
    here = replace(model, tokenizer=tokenizer.make("char", " buenoñ"))
    found = multiple_choice.score_choices(
        here, [multiple_choice.Choice("", "", ("bueno", "bu"), 0), multiple_choice.Choice("", "", ("bu", "no"), 0)]
    )
    assert found["acc"].tolist() == [0, 1]  # -3 against -2, -2 against -2.5
    assert found["acc_norm"].tolist() == [1, 1]  # -3/5 against -2/2, and lengths are alike
    found = multiple_choice.score_last_words(
        here, [multiple_choice.LastWord("", "", " no"), multiple_choice.LastWord("", "", " bu")]
    )
    assert found["acc"].tolist() == [1, 0]
    assert found["nats"].tolist() == [2.5, 2.0]


def test_forms_of_items(here):
    rows = [
        {"ctx": "El gato", "endings": ["a", "b"], "label": "1"},
        {"query": "El gato", "choices": ["a", "b", "c"], "gold": 2},
        {
            "activity_label": "Cats", "ctx_a": "A cat [title] sits.", "ctx_b": "it", "ctx": "A cat sits. it",
            "endings": ["runs [step] off.", "is  blue."], "label": 0,
        },
    ]  # fmt: skip
    Path("forms.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second, third = multiple_choice.read_choices("forms.jsonl")
    assert (first.context, first.endings, first.gold) == ("El gato", ("a", "b"), 1)
    assert (second.endings, second.gold, second.where) == (("a", "b", "c"), 2, "forms.jsonl, line 3")
    assert (third.context, third.endings) == ("Cats: A cat.  sits. It".replace("  ", " "), ("runs off.", "is blue."))
    Path("hub").mkdir()
    Path("hub/test.jsonl").write_text(json.dumps({"text": "El gato negro"}), encoding="utf-8")
    (word,) = multiple_choice.read_last_words("hf:hub")
    assert (word.context, word.word, word.where) == ("El gato", " negro", "hf:hub (test), row 1")


# ---- lm-eval --------------------------------------------------------------------------------------------------------

TASKS = {
    "own_choices": """
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_words": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "own_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "own_writing": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: " "
generation_kwargs: {until: ["a"], max_gen_toks: 7}
metric_list: [{metric: exact_match}]
""",
}


def task_file(name: str, kind: str, data: str | Path) -> str:
    files = f"dataset_kwargs: {{data_files: {{test: '{data}'}}}}"
    return f"task: {name}\ndataset_path: json\n{files}\ntest_split: test\n{TASKS[kind]}"


def test_lm_eval_says_the_same_to_every_digit(here, capsys):
    Path("tasks").mkdir()
    for name in TASKS:
        file = here / ("choices.jsonl" if name == "own_choices" else "last.jsonl")
        Path(f"tasks/{name}.yaml").write_text(task_file(name, name, file), encoding="utf-8")
    ours = run("runs/a", "--choices", "choices.jsonl", "--last-word", "last.jsonl")["runs"][0]
    shown = capsys.readouterr().out
    theirs = run("runs/a", "--lm-eval", ",".join(TASKS), "--include-path", "tasks")["runs"][0]["lm_eval"]
    again = capsys.readouterr().out
    for name in ("acc", "acc_norm"):
        assert theirs["own_choices"][f"{name},none"] == ours["choices"][name]["value"]
        assert theirs["own_choices"][f"{name}_stderr,none"] == pytest.approx(ours["choices"][name]["error"], rel=1e-12)
    assert theirs["own_words"]["acc,none"] == ours["last_word"]["acc"]["value"]
    assert theirs["own_words"]["perplexity,none"] == pytest.approx(ours["last_word"]["perplexity"]["value"], rel=1e-12)
    lines = [line for line in again.splitlines() if line.lstrip().startswith("acc")]
    assert len(lines) == 3
    assert all(line in shown for line in lines)  # the very same characters
    assert theirs["own_rolling"]["bits_per_byte,none"] > 0
    assert theirs["own_writing"]["exact_match,none"] == 0


def test_the_adapter_rolls_and_writes(model):
    from lm_eval.api.instance import Instance

    from nanogpt_jax.evaluation.lm_eval_adapter import RunLM

    def requests(kind, *arguments):
        return [
            Instance(request_type=kind, doc={}, arguments=a, idx=0, metadata=("own", i, 1))
            for i, a in enumerate(arguments)
        ]

    lm, text = RunLM(model), prose(9, 4)
    ids = model.tokenizer.encode(text).tolist()
    first, *_ = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text[:9],), (text,), ("",)))
    np.testing.assert_allclose(first, -alone(model, [0, *ids[:9]])[0].sum(), rtol=1e-5)
    long = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text[: 2 * T + 4],)))[0]
    parts = alone(model, [0, *ids[:T]])[0].sum() + alone(model, ids[T - 1 : 2 * T])[0].sum()
    parts += alone(model, ids[T + 3 : 2 * T + 4])[0][-4:].sum()
    np.testing.assert_allclose(long, -parts, rtol=1e-5)
    written = lm.generate_until(
        requests("generate_until", ("El gato", {"until": [" "], "max_gen_toks": 5}), ("El", {"max_gen_toks": 3}))
    )
    assert " " not in written[0]
    assert len(written[1]) == 3
    assert written[1] == model.tokenizer.decode(greedy(model, model.tokenizer.encode("El").tolist(), 3))
    with pytest.raises(UserError, match="task own, document 0: generation_kwargs has num_beams"):
        lm.generate_until(requests("generate_until", ("El", {"num_beams": 4})))
    with pytest.raises(UserError, match=r"task own, document 0: character '\?'"):
        lm.loglikelihood(requests("loglikelihood", ("El gato", " ?")))


def greedy(model: likelihood.Model, ids: list[int], n: int) -> list[int]:
    for _ in range(n):
        ids = [*ids, int(alone(model, [*ids, 0])[1][-1])]
    return ids[-n:]


# ---- wrong inputs ---------------------------------------------------------------------------------------------------

GOOD = '{"ctx": "El", "endings": ["gato", "río"], "label": 0}\n'
WRONG_ITEMS = [
    ("not JSON", "choices", GOOD + '{"ctx": "El",\n', ["bad.jsonl, line 2 is not JSON"]),
    ("no object", "choices", "[1, 2]\n", ["bad.jsonl, line 1 is not a JSON object, but [1, 2]"]),
    ("not UTF-8", "choices", GOOD.encode("latin-1"), ["bad.jsonl, line 1 is not UTF-8 text"]),
    ("no items", "choices", "\n\n", ["bad.jsonl holds no items"]),
    ("no label", "choices", '{"ctx": "El", "endings": ["a", "b"]}', ["line 1 has no label; it has ctx, endings"]),
    ("label outside", "choices", GOOD.replace("0", "2"), ["label=2 must lie in 0 to 1"]),
    ("hidden label", "choices", GOOD.replace("0", '""'), ["label='' must be a whole number"]),
    ("one ending", "choices", '{"ctx": "El", "endings": ["a"], "label": 0}', ["endings must be a list of two or more texts"]),
    ("endings are no texts", "choices", '{"ctx": "El", "endings": [1, 2], "label": 0}', ["endings must be a list of two or more"]),
    ("context is no text", "choices", '{"ctx": 3, "endings": ["a", "b"], "label": 0}', ["ctx must be text, but is 3"]),
    ("all empty", "choices", '{"ctx": "", "endings": ["", ""], "label": 0}', ["line 1: endings holds an empty text"]),
    ("long ending", "choices", GOOD.replace("gato", "gato negro gris vieja"), ["bad.jsonl, line 1: 22 tokens to predict do not fit into the model's context of 16"]),
    ("unknown character", "choices", GOOD.replace("gato", "?"), ["bad.jsonl, line 1: character '?'", "not among the"]),
    ("no text", "last-word", '{"txt": "El gato"}', ["line 1 has no text; it has txt"]),
    ("one word", "last-word", '{"text": "gato"}', ["line 1: text must end in a space and a word, but is 'gato'"]),
    ("ends in a space", "last-word", '{"text": "El gato "}', ["text must end in a space and a word"]),
    ("text is no text", "last-word", '{"text": null}', ["text must be text, but is None"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "content", "words"), [w[1:] for w in WRONG_ITEMS], ids=[w[0] for w in WRONG_ITEMS])
def test_wrong_items(here, kind, content, words, capsys):
    Path("bad.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(evaluate.main, f"runs/a --{kind} bad.jsonl", capsys, *words)


WRONG_COMMANDS = [
    ("no run", "runs/c", ["no run runs/c"]),
    ("misspelt run", "runs/pair", ["no run runs/pair", "did you mean runs/pairs?"]),
    ("a file", "text.txt", ["text.txt is a file; a run is a directory"]),
    ("no run directory", "data", ["data is not a run directory: it has no config.json"]),
    ("no checkpoint", "young", ["young has no checkpoint yet"]),
    ("no such checkpoint", "runs/a --checkpoint 7", ["runs/a has no checkpoint 7; it has 40, best and latest"]),
    ("three runs", "runs/a runs/a runs/a", ["one run, or two to compare"]),
    ("unknown flag", "runs/a --strides 3", ["unknown flag --strides", "did you mean --stride?"]),
    ("no value", "runs/a --data", ["--data needs a value"]),
    ("empty value", "runs/a --data=", ["--data is empty"]),
    ("unknown split", "runs/a --split test", ["--split=test is not one of val, train"]),
    ("split of given data", "runs/a --split val --data text.txt", ["leave one out"]),
    ("stride 0", "runs/a --stride 0", ["--stride=0 must be a whole number, at least 1"]),
    ("stride too long", "runs/a --stride 17", ["--stride=17 exceeds block_size=16 of runs/a"]),
    ("stride of items", "runs/a --stride 4 --choices choices.jsonl", ["--stride and --batch-size are about the loss"]),
    ("no batch", "runs/a --batch-size many", ["--batch-size=many must be a whole number"]),
    ("no text", "runs/a --data gone.txt", ["--data=gone.txt"]),
    ("empty text", "runs/a --data empty.txt", ["--data=empty.txt is empty"]),
    ("not UTF-8", "runs/a --data latin1.txt", ["latin1.txt is not UTF-8 text"]),
    ("one token", "runs/a --data one.txt", ["--data=one.txt has 1 tokens; at least 2 are needed"]),
    ("unknown characters", "runs/a --data quiz.txt", ["--data=quiz.txt cannot be read with the tokenizer of runs/a: character '?' at position 7"]),
    ("data gone", "moved", ["the data of moved is unavailable: data.source=gone.txt", "to measure it on another text: --data FILE"]),
    ("data changed", "changed", ["the data of changed has changed", "bring the old text back; to measure it on another text: --data FILE"]),
    ("data unknown", "imported", ["imported does not say what it was trained on: data.json is missing", "--data FILE"]),
    ("data.json damaged", "damaged", ["data.json is damaged", "--data FILE"]),
    ("other texts", "runs/a elsewhere", ["the texts of runs/a (text.txt (val)) and elsewhere (", ") differ; give one for both with --data"]),
    ("no items", "runs/a --choices gone.jsonl", ["cannot read gone.jsonl: No such file"]),
    ("hub", "runs/a --choices hf:nobody/nothing", ["hf:nobody/nothing cannot be opened", "or give a local .jsonl file"]),
    ("hub form", "runs/a --choices hf:a:b:c:d", ["must have the form hf:NAME[:CONFIG[:SPLIT]]"]),
    ("no task", "runs/a --lm-eval own_nothing", ["lm-eval knows no task own_nothing"]),
    ("broken task", "runs/a --lm-eval own_broken --include-path broken", ["--lm-eval=own_broken cannot be loaded", "gone.jsonl"]),
    ("two runs for lm-eval", "runs/a runs/b --lm-eval x", ["--lm-eval measures one run at a time"]),
    ("include without task", "runs/a --include-path .", ["name a task too"]),
    ("include nothing", "runs/a --lm-eval x --include-path gone", ["--include-path=gone is not a directory"]),
    ("json nowhere", "runs/a --json gone/x.json", ["--json=gone/x.json: there is no directory gone"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def spoilt(place):
    """Runs that were copied and then lost something."""
    import shutil

    (place / "empty.txt").touch()
    (place / "broken").mkdir()
    (place / "broken/own_broken.yaml").write_text(task_file("own_broken", "own_words", "gone.jsonl"))
    (place / "latin1.txt").write_bytes("ratón".encode("latin-1"))
    (place / "one.txt").write_text("E")
    (place / "quiz.txt").write_text("El gato?")
    (place / "text2.txt").write_text(prose(1200, 9), encoding="utf-8")
    sources = {"moved": "gone.txt", "changed": "text2.txt", "elsewhere": "text2.txt"}
    for name, source in (sources | dict.fromkeys(("imported", "damaged", "young"), "")).items():
        shutil.copytree(place / "runs/a", place / name)
        path = place / name / "config.json"
        if source:
            path.write_text(path.read_text().replace("text.txt", source))
    (place / "imported/data.json").unlink()
    (place / "damaged/data.json").write_text("{")
    shutil.rmtree(place / "young/checkpoints")
    cfg = config.read_json(place / "elsewhere/config.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "elsewhere/data.json").write_text(json.dumps({"fingerprint": open_data(cfg.data).fingerprint}))


@pytest.mark.parametrize(("line", "words"), [w[1:] for w in WRONG_COMMANDS], ids=[w[0] for w in WRONG_COMMANDS])
def test_wrong_commands(here, spoilt, line, words, capsys, monkeypatch):
    from lm_eval.tasks import TaskManager

    # lm-eval's own 14,000 tasks take seconds to look through
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kw: TaskManager(**kw | {"include_defaults": False}))
    refused(evaluate.main, line, capsys, *words)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("--data text.txt", ["runs/large at step 0 gives a loss that is not finite: it has diverged"]),
        ("--choices choices.jsonl", ["the model gives likelihoods that are not finite: it has diverged"]),
        ("--last-word last.jsonl", ["the model gives likelihoods that are not finite: it has diverged"]),
    ],
)
def test_weights_that_are_finite_and_too_large_are_no_result(here, what, words, capsys):
    if not Path("runs/large").exists():
        shutil.copytree("runs/a", "runs/large", ignore=shutil.ignore_patterns("checkpoints"))
        params = load("runs/a")[0]
        params["ln_f"]["scale"] = params["ln_f"]["scale"] * 1e37
        save_params(Path("runs/large"), {**params, "wte": params["wte"] * 1e3})
    refused(evaluate.main, f"runs/large {what} --json large.json", capsys, *words)
    assert not Path("large.json").exists()


def test_without_lm_eval_it_says_how_to_have_it(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "nanogpt_jax.evaluation.lm_eval_adapter", raising=False)
    monkeypatch.setattr("nanogpt_jax.evaluation.lm_eval_adapter", None, raising=False)
    monkeypatch.delattr("nanogpt_jax.evaluation.lm_eval_adapter")
    refused(evaluate.main, "runs/a --lm-eval own_words", capsys, "--lm-eval needs pip install 'nanogpt-jax[lm-eval]'")


def test_in_a_process_of_its_own_a_mistake_is_one_line_before_jax_starts(here, clean_env):
    code = (
        "import sys; from nanogpt_jax import cli; code = cli.guarded(cli.command('eval'), ['--stride', '0']); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=clean_env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --stride=0 must be a whole number, at least 1\n"
