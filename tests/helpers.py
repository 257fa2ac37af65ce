"""What several test files need: to train a little, to look into a run, and to give a command wrong input."""

import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config
from nanogpt_jax.data import batches
from nanogpt_jax.distributed import processes
from nanogpt_jax.distributed.mesh import make_mesh
from nanogpt_jax.distributed.sharding import laid_out
from nanogpt_jax.model import execution, gpt2
from nanogpt_jax.run.checkpoint import load_params
from nanogpt_jax.run.metrics import read_metrics
from nanogpt_jax.training.language_model import next_token
from nanogpt_jax.training.optim import make_optimizer
from nanogpt_jax.training.state import TrainState, init_state
from nanogpt_jax.training.step import TrainStep, make_train_step


def make_state(cfg: Config, given: Any = None, mesh: Mesh | None = None) -> TrainState:
    """The state at step 0 of a language model's run."""
    return init_state(make_step(cfg, mesh=mesh).born, cfg.train.seed, given)


def make_step(cfg: Config, per_call: int = 1, mesh: Mesh | None = None) -> TrainStep:
    """Its step, as train.py makes it on a CPU."""
    cfg, mesh = replace(cfg, train=replace(cfg.train, steps_per_dispatch=per_call)), mesh or make_mesh(cfg.mesh)
    cfg, how = execution.choose(cfg, "cpu", mesh.size)
    return make_train_step(cfg, make_optimizer(cfg.optim, cfg.train.steps), mesh, next_token(cfg.model), how)


def steps_of(cfg: Config, n: int) -> tuple[TrainState, list[float], list[jax.Array]]:
    """n steps on random tokens, of which this process makes its own rows -> the state, the losses and the batches."""
    state, step, t, T = make_state(cfg), make_step(cfg), cfg.train, cfg.model.block_size
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, 4000)
    losses, batches_, take = [], [], processes.together("the step", step.jitted)
    for i in range(n):

        def rows_of(rows: Any, i: int = i) -> np.ndarray:
            return batches.batch(tokens, seed=1, step=np.array([i]), batch_size=t.batch_size, block_size=T, rows=rows)

        batches_.append(processes.place_rows(step.layout, (1, t.batch_size, T + 1), rows_of))
        state, metrics = take(state, batches_[-1], np.int32(1), step.dials(i))
        losses.append(float(metrics["loss"][0]))
    return state, losses, batches_


def trees(state: TrainState) -> dict[str, Any]:
    """What a checkpoint keeps of a state."""
    return {"params": state.params, "opt_state": state.opt_state}


def load(run: Path | str, which: str = "best", mesh: Mesh | None = None, **more: Any) -> tuple[Any, int]:
    """The parameters of a run, and their step."""
    shapes = gpt2.param_shapes(config.read_json(Path(run) / "config.json").model)
    return load_params(Path(run), laid_out(mesh, shapes) if mesh else shapes, which, **more)


def refusal(code: int, out: str, err: str, *words: str) -> None:
    """What every wrong input gets: exit code 2, and on standard error `error: `, these words and no traceback."""
    assert code == 2, out + err
    assert re.search("^error: ", err, re.M), err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


def refused(program: Callable[[list[str]], int], line: str | Sequence[object], capture: Any, *words: str) -> str:
    """Gives a program of this process wrong input -> what it said. `capture`: pytest's capsys or capfd."""
    arguments = line.split() if isinstance(line, str) else [str(word) for word in line]
    code = cli.guarded(program, arguments)
    out, err = capture.readouterr()
    refusal(code, out, err, *words)
    assert not out
    return err


def with_flags(base: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A command line of flags and values, in which `flags` replace those of `base`."""
    merged = dict(zip(base[::2], base[1::2], strict=True)) | dict(zip(flags[::2], flags[1::2], strict=True))
    return [word for pair in merged.items() for word in pair]


def numbers(run: Path | str) -> list[dict[str, Any]]:
    """What a run has logged, without its speed: the same in every run of the same command."""
    return [
        {k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(Path(run) / "metrics.jsonl")
    ]


def interrupt_at(patch: pytest.MonkeyPatch, owner: Any, call: int) -> None:
    """Send this process a SIGINT when the loop makes its `call`-th batch with owner.batch."""
    make, calls = owner.batch, []

    def batch(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return make(*args, **options)

    patch.setattr(owner, "batch", batch)


def open_page(browser: Any, path: Path, **context: object) -> tuple[Any, list[str]]:
    """A page from the disk, without a network, and its errors and requests as they come."""
    view = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "bypass_csp": False, **context})
    page, seen = view.new_page(), []
    page.on("request", lambda request: seen.append(request.url))
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.goto(path.resolve().as_uri())
    return page, seen


def nothing_found(page: Any, axe: str, seen: list[str]) -> None:
    """The page, which this closes, is no wider than its window, has no fault that axe-core finds, on the screen and on
    paper, and neither complained nor asked for anything but itself."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"], "wider"
    for media in ("screen", "print"):
        page.emulate_media(media=media)
        found = page.evaluate(f"{axe}; axe.run()")["violations"]
        assert not found, [(one["id"], one["nodes"][0]["html"]) for one in found]
    assert seen == [page.url], seen
    page.context.close()


def looked_at(browser: Any, axe: str, path: Path) -> None:
    """A page without a script: `nothing_found`, wide and narrow, light and dark."""
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
        size = {"width": width, "height": 800}
        page, seen = open_page(browser, path, viewport=size, color_scheme=scheme)
        nothing_found(page, axe, seen)
