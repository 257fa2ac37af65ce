"""nanogpt-jax report: one page about a run, for people and for the record."""

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, UserError, command_line, settings
from nanogpt_jax.config.command_line import CommandLine, flag
from nanogpt_jax.evaluation import texts
from nanogpt_jax.host import files, progress
from nanogpt_jax.model import sizes
from nanogpt_jax.pages import drawing, html
from nanogpt_jax.run import origin
from nanogpt_jax.run.metrics import read_metrics
from nanogpt_jax.run.opened import Run, newest, open_run
from nanogpt_jax.run.run_dir import REPORT_PAGE

CURVES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, unclipped",
    "tokens_per_second": "Tokens/s",
    "skipped": "Skipped steps, in all",
}
DERIVED = ("model.vocab_size", "model.end_of_text")  # settings that follow from the data
SENTENCES = ("El gato persigue al ratón.", "The cat sat on the mat.")  # the first that the tokenizer knows is shown
LENGTH = 32  # most tokens of it
LOOKS = (
    "Of each layer the head that looks at the fewest tokens. A row is a token that looks, a column one that is looked "
    "at; nobody looks ahead. A weight alone explains nothing, as the value behind it may be short."
)


@dataclass(frozen=True)
class Options(command_line.Options):
    out: str | None = flag("FILE", "where the page goes (default: RUN/report.html)")
    checkpoint: str = flag("WHICH", "best, latest or a step", "best")


COMMAND = CommandLine(
    "report",
    Options,
    "Writes one page about a run: settings, curves, evaluation, a sample, attention, versions, and the command that "
    "makes it again.",
    {"[RUN]": "a run directory (default: the newest in runs/)"},
)


def read(argv: list[str]) -> Options:
    """The command line; UserError if it is invalid. No jax here."""
    return COMMAND.read(argv).of_one_run()


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    asked = read(argv)
    run = open_run(Path(asked.words[0]) if asked.words else newest(Path("runs")))
    out = cli.check_page(asked.out, run.path / REPORT_PAGE)
    cli.write_page(asked.out, out, page(run, asked.checkpoint))
    print(f"{out}: open it in a browser")
    return 0


def page(run: Run, checkpoint: str) -> str:
    """The page, as HTML."""
    from nanogpt_jax import api  # jax takes seconds, so only now
    from nanogpt_jax.distributed.mesh import start

    start()
    model, step = api.for_scoring(run, checkpoint)
    known, m = api.Run(run.cfg, model.params, run.tokenizer), run.cfg.model
    metrics = read_metrics(run.path / "metrics.jsonl")
    told, title = origin.read(run.path), f"{run.path}, step {step}"
    about = f"GPT-2 of {sizes.n_params(m):,} parameters: n_layer={m.n_layer} n_head={m.n_head} n_embd={m.n_embd} "
    about += f"block_size={m.block_size}; trained on {run.cfg.data.title}"
    sample = known.generate("" if run.tokenizer.name == "char" else "\n", max_new_tokens=300)
    parts = [f"<header><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p></header><main>"]
    parts += ["<h2>What was asked for</h2>", _settings(run, told.get("settings", {}))]
    parts += ["<h2>How training went</h2>", *_curves(metrics, *_normal(run, metrics))]
    parts += ["<h2>How good it is</h2>", *_evaluation(run, model)]
    parts += ["<h2>What it writes</h2>", f"<pre>{html.escape(sample)}</pre>"]
    parts += ["<h2>What it looks at</h2>", *_attention(known, run.path)]
    parts += ["<h2>How to make it again</h2>", *_made(run, told), "</main>"]
    return html.page(title, "\n".join(parts), style=html.asset("report.css"))


def _table(heads: list[str], rows: list[list[object]], caption: str) -> str:
    table = html.table(heads, rows, caption)
    return f'<div class="scrolls" tabindex="0" role="group" aria-label="{html.escape(caption)}">{table}</div>'


def _settings(run: Run, came_from: dict[str, str]) -> str:
    default = dict(settings.items(Config()))
    rows: list[list[object]] = [
        [key, _typed(value), _typed(default[key]), "the data" if key in DERIVED else came_from.get(key, "not recorded")]
        for key, value in settings.items(run.cfg)
        if value != default[key]
    ]
    return _table(["setting", "value", "default", "from"], rows, "Settings that are no defaults, and who set them")


def _normal(run: Run, metrics: list[dict[str, Any]]) -> tuple[str, Mapping[str, drawing.Area]]:
    """Whether the run is like our own of its recipe, in words; and their bands. "" and none without a reference."""
    try:
        from nanogpt_jax.normal import verdict
    except ImportError:  # the room was removed
        return "", {}
    match, data = verdict.find(run.cfg, run.path)
    if match is None:
        return "", {}
    if not match.same_data:
        return verdict.other_data(match.reference, data), {}
    return verdict.page(verdict.judged(match, data, metrics)), verdict.bands(match.reference)


def _curves(metrics: list[dict[str, Any]], normal: str, bands: Mapping[str, drawing.Area]) -> list[str]:
    def points(key: str) -> list[tuple[int, float]]:
        return [(row["step"], float(row[key])) for row in metrics if isinstance(row.get(key), int | float)]

    measured = points("val/loss")
    rows: list[list[object]] = [[step, f"{loss:.4f}"] for step, loss in measured]

    def curve(key: str, title: str, dots: drawing.Points = ()) -> str:
        band = bands.get(key, ())
        return drawing.curve(f"{title}; shaded: our own runs" if band else title, points(key), dots, band)

    return [
        f"<p>{html.escape(normal[:1].upper() + normal[1:])}.</p>" if normal else "",
        '<div class="curves">',
        curve("train/loss", "Loss, nats a token; dots: the whole validation split", measured),
        *(curve(key, title) for key, title in CURVES.items()),
        "</div>",
        _table(["step", "nats a token"], rows, "Loss of the whole validation split"),
    ]


def _evaluation(run: Run, model: Any) -> list[str]:
    """The figures of `eval` on the validation split."""
    from nanogpt_jax.evaluation import figures, loss
    from nanogpt_jax.evaluation.statistics import number_format

    try:
        text = texts.own("val", run.cfg.data, run.tokenizer, run.path)
    except UserError as e:
        return [f"<p>Not measured: {html.escape(str(e).splitlines()[0])}.</p>"]
    T, watched = run.cfg.model.block_size, functools.partial(progress.over, f"loss of {run.path}")
    nats = loss.token_nats(model.score, model.params, text.tokens, model.mesh, block_size=T, track=watched)
    if not np.isfinite(nats).all():
        raise UserError(f"{run.path} gives a loss that is not finite: it has diverged")
    found = figures.of_text(nats, text, T, 0)
    rows: list[list[object]] = []
    for name in [
        n for n in ("nats_per_token", "best_possible", "above_best", "perplexity", "bits_per_byte") if n in found
    ]:
        value, error = found[name].value, found[name].error
        kind = number_format(value, 4)
        rows.append([name.replace("_", " "), format(value, kind), "" if error is None else format(error, kind)])
    caption = f"{text.name}: {len(nats):,} tokens, each predicted once in windows of {T}"
    return [_table(["figure", "value", "standard error"], rows, caption)]


def _attention(run: Any, path: Path) -> list[str]:
    """A sentence, as the head of each layer sees it whose rows have the least entropy."""
    ids = np.array([], np.int32)
    for sentence in (*SENTENCES, run.generate("", max_new_tokens=LENGTH, temperature=0)):
        with contextlib.suppress(UserError):
            ids = run.tokenizer.encode(sentence)[: min(LENGTH, run.config.model.block_size)]
            break
    tokens, weights = [run.tokenizer.decode([i]) for i in ids], run.attention(ids)  # [L, H, T, T]
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(-1).mean(-1)  # [L, H]
    heads = [
        drawing.squares(f"layer {i + 1}, head {h + 1}: {entropy[i, h]:.2f} nats", weights[i, h].tolist(), tokens)
        for i, h in enumerate(entropy.argmin(-1).tolist())
    ]
    every = f"{config.program('attend')} {config.word(path)} {config.quoted(''.join(tokens))}"
    shown = f'<div class="heads">{"".join(heads)}</div>'
    return [f"<p>{LOOKS}</p>", shown, f"<p>All heads: <code>{html.escape(every)}</code></p>"]


def _made(run: Run, told: dict[str, Any]) -> list[str]:
    """The command that trains the run again, from its settings alone, and what computed it."""
    default = dict(settings.items(Config()))
    changed = [(key, v) for key, v in settings.items(run.cfg) if v != default[key] and key not in DERIVED]
    words = [f"--{key.replace('_', '-')}={_typed(value)}" for key, value in changed]
    command = f"{config.program('train')} {config.joined([*words, f'--run-dir={run.path}'])}"
    try:
        data = json.loads(files.read(run.path / "data.json"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        data = "not recorded"
    steps = [
        f"Its steps were {each['from_steps']} until step {each['at_step']}, and more were asked for then: train with "
        f"--train.steps={each['from_steps']} first."
        for each in told.get("extended", [])
    ]
    known = {**told.get("versions", {}), "data": data, "tokenizer": run.tokenizer.fingerprint}
    rows: list[list[object]] = [[what, value] for what, value in known.items()]
    sentences = "".join(f"<p>{html.escape(one)}</p>" for one in steps)
    return [f"{sentences}<pre>{html.escape(command)}</pre>", _table(["what", "value"], rows, "Versions and hashes")]


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
