"""Three lines of Python: what `import nanogpt_jax` offers."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import interrupt_at

import nanogpt_jax
from nanogpt_jax import api, cli, config
from nanogpt_jax.config import UserError
from nanogpt_jax.data import batches
from nanogpt_jax.run.run_dir import checkpoint_steps

TINY = {
    "model.block_size": 16,
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 16,
    "train.steps": 30,
    "train.batch_size": 8,
}
TEXT = "a cat sat on a mat. " * 60


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("api")
    (home / "text.txt").write_text(TEXT)
    return home


def settings(home: Path, **more: object) -> dict[str, object]:
    return {**TINY, "data.source": str(home / "text.txt"), "data.dir": str(home / "data"), **more}


@pytest.fixture(scope="module")
def run(home):
    return nanogpt_jax.train(None, settings(home), run_dir=home / "run")


def test_importing_it_takes_no_jax_and_changes_nothing(clean_env):
    program = (
        "import os, signal, sys, threading, warnings\n"
        "def state(): return ([signal.getsignal(s) for s in (2, 15)], dict(os.environ), threading.active_count(),\n"
        "    list(warnings.filters), sys.stdout, sys.excepthook)\n"
        "before = state()\n"
        "import nanogpt_jax\n"
        "assert state() == before\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'jax', 'flax', 'numpy', 'orbax', 'tiktoken'}))\n"
    )
    told = subprocess.run([sys.executable, "-c", program], env=clean_env, capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_there_are_at_most_twelve_names(run):
    names = [*nanogpt_jax.__all__, *(name for name in dir(run) if not name.startswith("_"))]
    assert len(names) == 12, names
    page = (Path(nanogpt_jax.__file__).parent / "README.md").read_text(encoding="utf-8")
    table = page.partition("## From Python")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(?:run\.)?(\w+)(?:\(.*?\))?`(?=[ ,].*\| )", table)) == set(names)
    for name in nanogpt_jax.__all__:
        assert name in dir(nanogpt_jax)
        assert getattr(nanogpt_jax, name).__doc__, name
    assert (
        repr(run)
        == "<Run: GPT-2 of 2 layers of 2 heads, 16 channels, context 16, trained on " + run.config.data.source + ">"
    )
    with pytest.raises(AttributeError, match="'lode'"):
        nanogpt_jax.lode  # noqa: B018


def test_training_again_resumes_and_loading_gives_the_same_run(home, run):
    again = nanogpt_jax.train(None, settings(home, **{"train.steps": 35}), run_dir=home / "run")
    assert checkpoint_steps(home / "run")[-1] == 35
    loaded = nanogpt_jax.load(str(home / "run"), "30")
    assert loaded.config.train.steps == again.config.train.steps == 35
    for path, value in jax.tree.leaves_with_path(loaded.params):
        assert (value == dict(jax.tree.leaves_with_path(run.params))[path]).all(), path


def test_a_config_is_taken_as_it_is(home, run):
    command = api._command(run.config, {"train.steps": 7}, {"run-dir": home / "other", "resume": "never"})
    read = config.load(command)
    assert read.cfg == config.merge(run.config, {"train.steps": 7}, "a test")
    assert (read.run_dir, read.resume) == (home / "other", "never")


def test_what_is_generated_is_what_sample_py_writes(home, run, capsys):
    flags = ["--max-new-tokens=40", "--seed=3", "--top-k=4", "--stop=zz", "--stop=qq", "--checkpoint=30"]
    cli.door("sample").main([str(home / "run"), "--prompt=a cat", *flags])
    how = {"max_new_tokens": 40, "seed": 3, "top_k": 4, "stop": ("zz", "qq")}
    text = run.generate("a cat", **how)
    assert capsys.readouterr().out == f"a cat{text}\n"
    pieces = list(run.stream("a cat", **how))
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_logits_loss_attention_and_hidden_fit_together(run):
    text = "a cat sat on a"
    T, cfg = len(text), run.config.model
    logits = run.logits(text)
    assert logits.shape == (T, cfg.vocab_size)
    ids = run.tokenizer.encode(text)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(run.loss(text), -log_p[np.arange(T - 1), ids[1:]], atol=1e-4)
    assert run.loss(text).mean() < np.log(cfg.vocab_size)
    np.testing.assert_array_equal(run.logits(ids), logits)
    weights = run.attention(text)
    assert weights.shape == (cfg.n_layer, cfg.n_head, T, T)
    assert (weights[..., ~np.tri(T, dtype=bool)] == 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    hidden = run.hidden(text)
    assert hidden.shape == (cfg.n_layer + 1, T, cfg.n_embd)
    np.testing.assert_allclose(hidden[0], run.params["wte"][ids] + run.params["wpe"][:T], atol=1e-6)


def test_the_loss_of_a_long_text_is_that_of_its_windows(run):
    text = TEXT[:50]
    nats, T = run.loss(text), run.config.model.block_size
    assert len(nats) == len(text) - 1
    np.testing.assert_allclose(nats[T : 2 * T], run.loss(text[T : 2 * T + 1]), atol=1e-4)


def test_forward_is_pure_and_jit_grad_and_vmap_take_it(run):
    tokens = jnp.asarray(run.tokenizer.encode("a cat sat"))

    def loss(params, tokens):
        log_p = jax.nn.log_softmax(nanogpt_jax.forward(params, run.config, tokens))
        return -jnp.take_along_axis(log_p[:-1], tokens[1:, None], axis=-1).mean()

    value, slope = jax.jit(jax.value_and_grad(loss))(run.params, tokens)
    np.testing.assert_allclose(value, run.loss("a cat sat").mean(), atol=1e-4)
    assert jax.tree.structure(slope) == jax.tree.structure(run.params)
    both = jnp.stack([tokens, tokens[::-1]])
    one_by_one = [loss(run.params, row) for row in both]
    np.testing.assert_allclose(jax.vmap(loss, (None, 0))(run.params, both), one_by_one, atol=1e-5)
    batch = nanogpt_jax.forward(run.params, run.config.model, both)
    np.testing.assert_allclose(batch[0], run.logits("a cat sat"), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: run.generate("a", temperature=-1), "--temperature=-1.0 must be 0 (always the likeliest token)"),
        (lambda run: run.generate("a", temprature=1), "did you mean --temperature?"),
        (lambda run: run.generate("a", seed="x"), "--seed=x must be a whole number"),
        (lambda run: run.generate("a", num_samples=3), "num_samples is a flag of sample.py that has no meaning here"),
        (lambda run: run.generate("é"), "character 'é' at position 0 is not among the"),
        (lambda run: run.logits(""), "the text has 0 tokens; at least 1 is needed"),
        (lambda run: run.logits("a" * 17), "the text has 17 tokens, more than the model's context of 16"),
        (lambda run: run.attention([99]), "tokens must lie in 0 to"),
        (lambda run: run.hidden([-1]), "but are -1 to -1"),
        (lambda run: run.logits([0.5]), "tokens must be whole numbers in one row, but are float64 of shape (1,)"),
        (lambda run: run.logits([[1, 2]]), "of shape (1, 2)"),
        (lambda run: run.loss("a"), "the text has 1 tokens; at least 2 are needed"),
        (lambda run: nanogpt_jax.load("runs/none"), "no run runs/none"),
        (lambda run: nanogpt_jax.train("nothing"), "nothing"),
        (lambda run: nanogpt_jax.train(None, {"model.n_layers": 3}), "did you mean model.n_layer?"),
        (lambda run: nanogpt_jax.train(None, {"train.steps": "many"}), "train.steps='many' must be a whole number"),
        (lambda run: nanogpt_jax.train(None, resume="perhaps"), "--resume=perhaps is not one of auto, never, must"),
    ],
)
def test_what_is_wrong_is_said_by_name(run, call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        call(run)
    assert words in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_an_interrupt_saves_and_returns_the_run(home, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, batches, 12)
        run = nanogpt_jax.train(None, settings(home, **{"train.steps": 400}), run_dir=tmp_path)
    (saved,) = checkpoint_steps(tmp_path)
    assert 0 < saved < 400
    assert f"SIGINT: saved step {saved} of 400" in capsys.readouterr().out
    assert run.generate("a", max_new_tokens=3)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_second_interrupt_never_ends_an_interactive_python(home, tmp_path, monkeypatch):
    make = batches.batch

    def batch(*args, **options):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return make(*args, **options)

    monkeypatch.setattr(sys, "ps1", "> ", raising=False)
    monkeypatch.setattr(batches, "batch", batch)
    with pytest.raises(KeyboardInterrupt, match="ended at once"):
        nanogpt_jax.train(None, settings(home), run_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_if_jax_was_imported_before_us_no_second_program_is_compiled(home, monkeypatch):
    """XLA reads its environment once, and would write half a million warnings."""
    given: list[list[str]] = []

    def main(argv: list[str]) -> None:
        given.append(argv)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "door", lambda name: SimpleNamespace(main=main))
    for level in ("2", "0"):
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)
        with pytest.raises(KeyboardInterrupt):
            nanogpt_jax.train(None, settings(home), run_dir=home / "none")
    assert [config.load(argv).cfg.train.recompile for argv in given] == ["auto", "off"]
