"""Are faults seen? Ten of them, made on purpose, each trained for a quarter of a recipe's run.

`python tests/faults.py frases` needs no data; `python tests/faults.py shakespeare_quick nanogpt_cpu --text FILE` needs
tiny Shakespeare; `--only WORD` takes the faults with that word. A fault is in the code, and the settings are the
recipe's, so that its reference is found. Each row: at which step it was seen, by whatever is compared, and by losses
and norms alone.
"""

import contextlib
import dataclasses
import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt_jax import config
from nanogpt_jax.data import batches, corpora, dataset, tokenizer
from nanogpt_jax.distributed.mesh import make_mesh, start
from nanogpt_jax.evaluation import loss
from nanogpt_jax.host import runtime
from nanogpt_jax.host.signals import StopRequest
from nanogpt_jax.model import attention, execution, gpt2, losses
from nanogpt_jax.normal import verdict
from nanogpt_jax.run import run_dir
from nanogpt_jax.run.metrics import read_metrics
from nanogpt_jax.run.recording import Recording
from nanogpt_jax.training import dials, language_model, loop, optim
from nanogpt_jax.training.step import make_train_step

EVALUATIONS = 16  # in a whole run; a quarter of them are made
Patch = pytest.MonkeyPatch


def rate_times_4(patch: Patch) -> None:
    make = optim.make_schedule
    patch.setattr(dials, "make_schedule", lambda cfg, steps: lambda step: 4 * make(cfg, steps)(step))


def no_warmup(patch: Patch) -> None:
    make = optim.make_schedule
    patch.setattr(dials, "make_schedule", lambda cfg, steps: make(dataclasses.replace(cfg, warmup_steps=0), steps))


def weights_times_5(patch: Patch) -> None:
    init = gpt2.init_params
    norms = ("scale", "bias")

    def larger(cfg: Any, key: jax.Array) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, x: x if path[-1].key in norms else 5 * x, init(cfg, key))

    patch.setattr(gpt2, "init_params", larger)


def leaking_mask(patch: Patch) -> None:
    """Each position sees the next one, too."""
    patch.setattr(attention, "causal_mask", lambda T, documents=None: jnp.tril(jnp.ones((T, T), bool), 1)[None, None])


def shifted_targets(patch: Patch) -> None:
    """Training asks for the token after the next."""

    def mean_loss(cfg: Any, params: Any, tokens: jax.Array, dropout_key: Any = None) -> jax.Array:
        logits = gpt2.forward(cfg, params, tokens[:, :-1], dropout_key=dropout_key)
        return losses.cross_entropy(logits[:, :-1], tokens[:, 2:]).mean()

    patch.setattr(language_model, "mean_loss", mean_loss)


def data_twice(patch: Patch) -> None:
    read = corpora.read

    def twice(*args: Any) -> Any:
        corpus = read(*args)

        def blocks(on_progress: Any) -> Iterator[Any]:
            yield from corpus.blocks(on_progress)
            yield from corpus.blocks(on_progress)

        return dataclasses.replace(corpus, blocks=blocks)

    patch.setattr(corpora, "read", twice)


def dropout_in_evaluation(patch: Patch) -> None:
    """At a rate of 0.1, as no recipe with a reference has dropout."""

    def make_score(cfg: Any, mesh: Any) -> Any:
        cfg = dataclasses.replace(loss.for_scoring(cfg, "cpu"), dropout=0.1)

        @jax.jit
        def score(params: Any, tokens: jax.Array) -> Any:
            def group(tokens: jax.Array) -> Any:
                logits = gpt2.forward(cfg, params, tokens[:, :-1], dropout_key=jax.random.key(0))
                return losses.cross_entropy(logits, tokens[:, 1:]), tokens[:, 1:] > 0

            return jax.lax.map(group, tokens)

        return score

    patch.setattr(language_model, "make_score", make_score)


def constant_schedule(patch: Patch) -> None:
    make = optim.make_schedule
    patch.setattr(dials, "make_schedule", lambda cfg, steps: make(dataclasses.replace(cfg, schedule="constant"), steps))


def another_tokenizer(patch: Patch) -> None:
    """Characters where words are asked for, and byte pairs where characters are."""
    make = tokenizer.make
    patch.setattr(tokenizer, "make", lambda kind, *rest: make({"word": "char", "char": "bpe:512"}[kind], *rest))


def half_a_batch(patch: Patch) -> None:
    """The second half of each batch repeats the first, which gives the gradient of half a batch."""
    make = batches.batch

    def half(tokens: Any, *, batch_size: int, rows: Any = slice(None), **rest: Any) -> np.ndarray:
        first = make(tokens, batch_size=batch_size // 2, **rest)
        return np.concatenate([first, first], axis=-2)[..., rows, :]

    patch.setattr(batches, "batch", half)


def nothing(patch: Patch) -> None:
    del patch


FAULTS: dict[str, Callable[[Patch], None]] = {
    "learning rate × 4": rate_times_4,
    "no warm-up": no_warmup,
    "initial weights × 5": weights_times_5,
    "a mask that leaks": leaking_mask,
    "targets shifted by one": shifted_targets,
    "data duplicated": data_twice,
    "dropout in evaluation": dropout_in_evaluation,
    "constant schedule": constant_schedule,
    "another tokenizer": another_tokenizer,
    "half the batch": half_a_batch,
    "no fault": nothing,
}


def train_a_quarter(argv: list[str]) -> None:
    """What `train.py` does with this command line, until a quarter of the steps."""
    command = config.load(argv)
    stop, data = StopRequest(), dataset.open_data(command.cfg.data)
    cfg = config.with_vocabulary(command.cfg, data.tokenizer.n_vocab, data.tokenizer.end_of_text, command.origin)
    with run_dir.claim(command) as directory:
        run_dir.prepare(directory, command, cfg, data)
        mesh = make_mesh(cfg.mesh)
        cfg, how = execution.choose(cfg, start(), mesh.size)
        task = language_model.language_model(cfg, mesh, data)
        left = iter(range(EVALUATIONS // 4 - 1, -1, -1))

        def evaluate(params: Any) -> Any:
            if not next(left):
                stop.received = signal.SIGTERM
            return task.evaluate(params)

        step = make_train_step(cfg, optim.make_optimizer(cfg.optim, cfg.train.steps), mesh, task, how)
        with Recording(directory, cfg.train) as run:
            state = loop.start_state(cfg, step, run)
            loop.fit(cfg, dataclasses.replace(task, evaluate=evaluate), state, step, run, stop)


def seen(fault: str, recipe: str, folder: Path, flags: list[str]) -> tuple[int | None, int | None, str]:
    """Steps at which a fault was seen, by everything that is compared, and by losses and norms alone; what was said."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    jax.clear_caches()
    for kept in (loss.make_score, dials.rates_of, dials._table):  # what a fault before has left
        kept.cache_clear()
    data = folder / ("data" if FAULTS[fault] not in (data_twice, another_tokenizer) else f"data-{fault}")
    if (text := folder / "shakespeare.txt").exists():
        data.mkdir(exist_ok=True)
        shutil.copy(text, data / text.name)
    steps = config.load([recipe] if recipe != "default" else []).cfg.train.steps
    argv = [] if recipe == "default" else [recipe]
    argv += [f"--train.eval-every={steps // EVALUATIONS}", "--train.save-every=0", "--train.recompile=off"]
    noted = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(noted):
        FAULTS[fault](patch)
        train_a_quarter([*argv, *flags, f"--data.dir={data}", f"--run-dir={run}"])
    cfg, rows = config.read_json(run / "config.json"), read_metrics(run / "metrics.jsonl")
    match, facts = verdict.find(cfg, run)
    assert match, f"there is no reference of {recipe}"
    if not match.same_data:
        return 0, None, verdict.other_data(match.reference, facts)
    alone = [{key: value for key, value in row.items() if key != "learning_rate"} for row in rows]
    if start := [line for line in noted.getvalue().splitlines() if line.startswith("step 1: ")]:
        return 1, 1, start[0]
    at = [_first(match, facts, which) for which in (rows, alone)]
    found = verdict.judged(match, facts, rows)
    return at[0], at[1], verdict.outside(found) if found.findings else ""


def _first(match: Any, facts: Any, rows: list[dict[str, Any]]) -> int | None:
    """The first evaluation that said so."""
    evaluations = [row["step"] for row in rows if "val/loss" in row]
    return next((step for step in evaluations if verdict.judged(match, facts, rows, step).findings), None)


def main(argv: list[str]) -> int:
    if not argv or "--help" in argv:
        print(__doc__)
        return 0
    text = Path(argv.pop(argv.index("--text") + 1)) if "--text" in argv else None
    only = argv.pop(argv.index("--only") + 1) if "--only" in argv else ""
    flags = [word for word in argv if word.startswith("--") and word not in ("--text", "--only")]
    recipes = [word for word in argv if not word.startswith("--")]
    runtime.set_up()  # faults share most compiled programs
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        if text:
            shutil.copy(text, Path(folder) / "shakespeare.txt")
        for recipe in recipes:
            steps = config.load([] if recipe == "default" else [recipe]).cfg.train.steps
            print(f"{recipe}, {steps} steps:\n| fault | seen at step | by losses and norms alone | what was said |")
            print("|---|---|---|---|")
            for fault in [name for name in FAULTS if only in name]:
                with contextlib.redirect_stdout(open(os.devnull, "w")):
                    every, alone, words = seen(fault, recipe, Path(folder), flags)
                row = [fault, *("" if at is None else str(at) for at in (every, alone)), words]
                print(f"| {' | '.join(row)} |", flush=True)
                missed += (every is None) == (fault != "no fault")
    return 1 if missed > 2 * len(recipes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
