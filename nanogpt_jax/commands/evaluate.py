"""nanogpt-jax eval: measures a run on a whole text or on items with an answer, or compares two runs."""

import functools
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanogpt_jax import cli
from nanogpt_jax.config import UserError, command_line
from nanogpt_jax.config.command_line import COUNT, CommandLine, flag
from nanogpt_jax.evaluation import compare, texts
from nanogpt_jax.evaluation.statistics import Estimate, number_format
from nanogpt_jax.evaluation.texts import Text
from nanogpt_jax.host import progress
from nanogpt_jax.run.opened import Run, newest, open_run


@dataclass(frozen=True)
class Options(command_line.Options):
    data: str | None = flag(
        "SOURCE",
        "any source that train.py takes, read with the run's tokenizer (default: the data of the run)",
        heading="The loss of a whole text: nats a token, perplexity and bits per byte, each with its standard error:",
    )
    field: str | None = flag(
        "NAME", "the column with the text of --data, in rows of .jsonl, .csv, .parquet and the hub (default: text)"
    )
    split: Literal["val", "train"] | None = flag("", "which part of the run's own data (default: val)")
    stride: int = flag(
        "N",
        "windows begin N tokens apart, so that each token is predicted from at least block_size - N tokens before it; "
        "smaller is better and slower (default: block_size, windows side by side)",
        0,
        must=COUNT,
    )
    batch_size: int = flag(
        "N",
        "windows in a call for each device; no figure depends on it (default: by their length)",
        0,
        must=COUNT,
    )
    choices: str | None = flag(
        "FILE",
        'multiple choice: {"ctx", "endings", "label"} as in HellaSwag, or {"query", "choices", "gold"}, each perhaps '
        'with a "group"; or frases: what agrees with what in that corpus',
        heading="Items with an answer, one JSON object a line, or hf:NAME[:CONFIG[:SPLIT]] from the Hugging Face hub:",
    )
    last_word: str | None = flag("FILE", 'the last word of each {"text"}, as in LAMBADA')
    lm_eval: str | None = flag(
        "TASKS", "tasks of lm-evaluation-harness, with commas (needs pip install 'nanogpt-jax[lm-eval]')"
    )
    include_path: str | None = flag(
        "DIR", "where lm-eval looks for your own tasks; they may name Python code, which it runs"
    )
    checkpoint: str = flag("WHICH", "best, latest or a step", "best", heading="With either:")
    json: str | None = flag("FILE", "write all figures, with every digit, as JSON")

    @property
    def tasks(self) -> list[str]:
        return self.lm_eval.split(",") if self.lm_eval else []

    @property
    def wants_loss(self) -> bool:
        """The loss is measured unless something else is asked for."""
        return bool(self.data or self.split) or not (self.choices or self.last_word or self.lm_eval)


COMMAND = CommandLine(
    "eval",
    Options,
    "Measures a run. With OTHER, measures both on the same text and says which one is better.",
    {"[RUN]": "a run directory (default: the newest in runs/)", "[OTHER]": "another one, to compare"},
    after="A standard error says how far a figure would move on another text of this kind. It treats stretches of text "
    "(or items) as independent, but not tokens, as neighbours resemble each other. It does not cover another seed of "
    "the same recipe.",
)


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    return run(read(argv))


def run(asked: Options) -> int:
    runs = [open_run(Path(word)) for word in asked.words] or [open_run(newest(Path("runs")))]
    _check_places(asked)
    for run in runs:
        if asked.stride > run.cfg.model.block_size:
            raise UserError(f"--stride={asked.stride} exceeds block_size={run.cfg.model.block_size} of {run.path}")
    texts_of = _texts(asked, runs) if asked.wants_loss else [None] * len(runs)
    tasks = _lm_eval().load_tasks(asked.tasks, asked.include_path) if asked.tasks else None  # not after minutes

    from nanogpt_jax import api  # jax takes seconds, so only now
    from nanogpt_jax.evaluation import figures, loss, multiple_choice

    choices = multiple_choice.read_choices(asked.choices) if asked.choices else []
    words = multiple_choice.read_last_words(asked.last_word) if asked.last_word else []
    columns: list[dict[str, Any]] = []
    sides: list[compare.Side] = []
    for run, text in zip(runs, texts_of, strict=True):
        model, step = api.for_scoring(run, asked.checkpoint)
        T = run.cfg.model.block_size
        column: dict[str, Any] = {"run": str(run.path), "step": step}
        found: dict[str, np.ndarray] = {}
        if text:
            found["nats"] = loss.token_nats(
                model.score, model.params, text.tokens, model.mesh, block_size=T, stride=asked.stride,
                batch_size=asked.batch_size, track=_watched(f"loss of {run.path}"),
            )  # fmt: skip
            if not np.isfinite(found["nats"]).all():
                raise UserError(f"{run.path} at step {step} gives a loss that is not finite: it has diverged")
            column["loss"] = figures.of_text(found["nats"], text, T, asked.stride)
        if choices:
            scores = multiple_choice.score_choices(model, choices, _watched(f"choices of {run.path}"))
            found |= {f"choices {name}": each for name, each in scores.items()}
            column["choices"] = figures.of_choices(scores, choices, asked.choices)
        if words:
            scores = multiple_choice.score_last_words(model, words, _watched(f"last words of {run.path}"))
            found |= {f"words {name}": each for name, each in scores.items()}
            column["last_word"] = figures.of_last_words(scores, asked.last_word)
        if tasks:
            column["lm_eval"] = _lm_eval().measure(model, tasks, _watched(f"lm-eval on {run.path}"))
        _print(column)
        columns.append(column)
        sides.append(compare.Side(str(run.path), T, text, found))
    result: dict[str, Any] = {"runs": columns}
    if len(sides) == 2:
        result["differences"] = compare.differences(*sides)
        for difference in result["differences"]:
            print(difference["words"])
    if asked.json:
        cli.write_file("--json", asked.json, json.dumps(figures.finite(result), indent=2, allow_nan=False) + "\n")
    return 0


# ---- the command line -----------------------------------------------------------------------------------------------


def read(argv: list[str]) -> Options:
    """The command line; UserError if it is invalid. No jax here."""
    asked = COMMAND.read(argv)
    if len(asked.words) > 2:
        raise UserError(f"one run, or two to compare, but got {', '.join(asked.words)}")
    for one in fields(asked):
        if getattr(asked, one.name) == "":
            raise UserError(f"{command_line.flag_of(one.name)} is empty")
    if asked.split and asked.data:
        raise UserError("--split is a part of the run's own data; of --data the whole text is measured: leave one out")
    if asked.field and not asked.data:
        raise UserError("--field says how to read --data, which is not given")
    if asked.include_path and not asked.lm_eval:
        raise UserError("--include-path is where --lm-eval looks for tasks; name a task too")
    if asked.lm_eval and len(asked.words) == 2:
        raise UserError("--lm-eval measures one run at a time; leave the other one out")
    if (asked.stride or asked.batch_size) and not asked.wants_loss:
        raise UserError("--stride and --batch-size are about the loss of a text; add --data or --split")
    return asked


def _check_places(asked: Options) -> None:
    if asked.include_path and not Path(asked.include_path).is_dir():
        raise UserError(f"--include-path={asked.include_path} is not a directory")
    if asked.json:
        cli.check_file("--json", asked.json)


# ---- runs and texts -------------------------------------------------------------------------------------------------


def _lm_eval() -> Any:
    try:
        from nanogpt_jax.evaluation import lm_eval_adapter
    except ImportError as e:
        raise UserError(f"--lm-eval needs pip install 'nanogpt-jax[lm-eval]' ({e})") from None
    return lm_eval_adapter


def _texts(asked: Options, runs: list[Run]) -> list[Text]:
    """The text as each run reads it. UserError unless both are the same text."""
    if asked.data:
        corpus = texts.read(asked.data, asked.field or "text")
        return [texts.given(asked.data, corpus, run.tokenizer, run.path) for run in runs]
    found = [texts.own(asked.split or "val", run.cfg.data, run.tokenizer, run.path) for run in runs]
    if len(runs) == 2 and found[0].content() != found[1].content():
        raise UserError(
            f"the texts of {runs[0].path} ({found[0].name}) and {runs[1].path} ({found[1].name}) differ; "
            "give one for both with --data, from which neither has learned"
        )
    return found


# ---- what is shown --------------------------------------------------------------------------------------------------


def _print(column: dict[str, Any]) -> None:
    print(f"{column['run']}, step {column['step']}")
    if loss := column.get("loss"):
        overlap = "" if loss["stride"] == loss["block_size"] else f", {loss['stride']} tokens apart"
        unit = "token" if loss["tokens"] == 1 else "tokens"
        print(f"  {loss['text']}: {loss['tokens']:,} {unit} in windows of {loss['block_size']}{overlap}")
        _row("loss", loss["nats_per_token"], 6, "nats a token")
        if best := loss.get("best_possible"):
            above: Estimate = loss["above_best"]
            _row("best possible", best, 6, "nats a token")
            _row("above that", above, 6, f"nats a token: {above.value / best.value:.1%}")
        _row("perplexity", loss["perplexity"], 4)
        _row("bits per byte", loss["bits_per_byte"], 6)
    if choices := column.get("choices"):
        print(f"  {choices['source']}: {choices['items']:,} items, multiple choice")
        _row("acc", choices["acc"], 4)
        _row("acc_norm", choices["acc_norm"], 4)
        for group, figures in choices.get("groups", {}).items():
            _row(f"acc, {group}", figures["acc"], 4, f"({figures['items']:,} items)", width=34)
    if words := column.get("last_word"):
        print(f"  {words['source']}: {words['items']:,} items, last word")
        _row("acc", words["acc"], 4)
        _row("perplexity", words["perplexity"], 4)
    for task, figures in column.get("lm_eval", {}).items():
        print(f"  {task} (lm-eval)")
        for key, value in figures.items():
            name, _, which = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = figures.get(f"{name}_stderr,{which}")
                _row(name, Estimate(value, error if isinstance(error, float) else None), 4)


def _row(name: str, figure: Estimate, digits: int, unit: str = "", width: int = 14) -> None:
    kind = number_format(figure.value, digits)
    error = "" if figure.error is None else f" ± {figure.error:{kind}}"
    print(f"    {name:<{width}}{format(figure.value, kind):>{digits + 6}}{error} {unit}".rstrip())


def _watched(what: str) -> Any:
    """An `evaluation.loss.Track`."""
    return functools.partial(progress.over, what)
