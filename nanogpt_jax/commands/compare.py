"""nanogpt-jax compare: many runs beside each other: settings that differ, losses over seeds, curves, speed."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanogpt_jax import cli, config
from nanogpt_jax.comparing import groups, runs, shown
from nanogpt_jax.comparing.groups import Comparison, Group
from nanogpt_jax.comparing.runs import NATS, Run
from nanogpt_jax.config import UserError, command_line
from nanogpt_jax.config.command_line import CommandLine, flag
from nanogpt_jax.evaluation import compare, texts
from nanogpt_jax.host import messages, progress
from nanogpt_jax.run import opened

CUT = "A line a run; its number is its group. Losses far above what most runs have after the first fifth are cut off."


@dataclass(frozen=True)
class Options(command_line.Options):
    out: str | None = flag("FILE", "where the page goes (default: compare.html beside the first run)")
    paired: bool = flag(
        "",
        "measure the best group and the second now, on the same windows of their validation text, and compare them "
        "stretch by stretch as eval does",
        False,
    )
    data: str | None = flag("SOURCE", "the same on this text, any source that train.py takes")
    checkpoint: str = flag("WHICH", "what is measured: best, latest or a step", "best")


COMMAND = CommandLine(
    "compare",
    Options,
    "Compares runs by what they logged: the settings that differ, final losses as means over seeds, curves against "
    "steps, tokens and seconds, and speed; as text and as one page.",
    {"RUN": "a run directory", "[RUN ...]": "more of them, or a pattern in quotes: 'runs/*'"},
)


def read(argv: list[str]) -> Options:
    """The command line; UserError if it is invalid. No jax here."""
    asked = COMMAND.read(argv)
    if not asked.words:
        raise UserError("which runs? name two or more, or a pattern in quotes: 'runs/*'")
    if asked.data == "":
        raise UserError("--data is empty")
    if asked.checkpoint != "best" and not (asked.paired or asked.data):
        raise UserError(f"--checkpoint={asked.checkpoint} is about what is measured now; add --paired")
    return asked


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    asked = read(argv)
    pages = _pages(asked.out)
    every, left_out = runs.find(asked.words)
    own = every[0].path.parent / runs.PAGE
    out = cli.check_page(asked.out, own) if pages else own
    found = groups.compare(every)
    measured = _measured(found, asked) if asked.paired or asked.data else []
    print(shown.page(found, left_out, measured))
    if pages:
        cli.write_page(asked.out, out, _page(pages, found, left_out, measured))
        print(f"\n{out}: open it in a browser")
    return 0


# ---- measured now ----------------------------------------------------------------------------------------------------


def _measured(found: Comparison, asked: Options) -> list[str]:
    """The best group against the second on the same windows, in words."""
    first, second = _leading(found)
    corpus = texts.read(asked.data, "text") if asked.data else None

    def text_of(run: opened.Run) -> texts.Text:
        if corpus and asked.data:
            return texts.given(asked.data, corpus, run.tokenizer, run.path)
        return texts.own("val", run.cfg.data, run.tokenizer, run.path)

    told: list[str] = []
    both = [(group, _opened(group, told)) for group in (first, second)]
    its = [text_of(run) for _, members in both for run in members]
    for text in its[1:]:
        if text.content() != its[0].content():
            raise UserError(
                f"the validation texts of groups {first.number} and {second.number} differ; give one for both with "
                "--data, from which neither has learned"
            )
    sides = [_side(group, members, text_of, asked.checkpoint) for group, members in both]
    words = [one["words"] for one in compare.differences(*sides)]
    return [*told, *(f"Measured now on {its[0].name}, the same windows for all: {each}" for each in words)]


def _leading(found: Comparison) -> tuple[Group, Group]:
    """The two groups to measure: the best and the second; of two without figures, both."""
    if found.verdicts:
        return found.verdicts[0].best, found.verdicts[0].second
    if len(found.groups) == 1:
        raise UserError("all runs are of one group: they differ in their seed alone, so there are no two to measure")
    if len(found.groups) > 2:
        raise UserError("which two groups should be measured? Without finished runs of one text, name runs of two")
    return found.groups[0], found.groups[1]


def _opened(group: Group, told: list[str]) -> list[opened.Run]:
    """The group's runs that can be measured; all finished ones, or all if none is."""
    members = []
    for run in group.finished or group.runs:
        try:
            members.append(opened.open_run(run.path))
        except UserError as e:
            told.append(f"Not measured: {run.name}: {messages.first_line(e)}")
    if not members:
        raise UserError(f"no run of group {group.number} can be measured\n       {told[-1]}")
    return members


def _side(group: Group, members: list[opened.Run], text_of: Callable[..., texts.Text], which: str) -> compare.Side:
    """The mean over the group's runs of each token's nats [N-1]."""
    from nanogpt_jax import api  # jax takes seconds, so only now
    from nanogpt_jax.distributed.mesh import start
    from nanogpt_jax.evaluation import loss

    start()
    total, text, T = np.zeros(()), text_of(members[0]), members[0].cfg.model.block_size
    for run in members:
        if run.tokenizer.fingerprint != text.tokenizer.fingerprint:
            raise UserError(f"{run.path} and {members[0].path} have different tokenizers, so they are no group")
        model, step = api.for_scoring(run, which)
        watched = functools.partial(progress.over, f"loss of {run.path}")
        nats = loss.token_nats(model.score, model.params, text.tokens, model.mesh, block_size=T, track=watched)
        if not np.isfinite(nats).all():
            raise UserError(f"{run.path} at step {step} gives a loss that is not finite: it has diverged")
        total = total + nats
    name = runs.shown(members[0].path) if len(members) == 1 else f"group {group.number} ({len(members)} runs)"
    return compare.Side(name, T, text, {"nats": total / len(members)})


# ---- the page --------------------------------------------------------------------------------------------------------


def _pages(out: str | None) -> Any:
    """(html, curves) of pages/; None if it was removed. UserError if a page is asked for nevertheless."""
    try:
        from nanogpt_jax.pages import curves, html
    except ImportError:
        if out is not None:
            raise UserError(f"--out={out} needs nanogpt_jax/pages, and that was removed") from None
        print("note: no page is written, as nanogpt_jax/pages was removed", file=sys.stderr)
        return None
    return html, curves


def _page(pages: Any, found: Comparison, left_out: dict[str, str], measured: list[str]) -> str:
    """The page, as HTML."""
    html, curves = pages
    title = shown.title(found)

    def table(heads: list[str], rows: list[list[object]], caption: str) -> str:
        inside = html.table(heads, rows, caption)
        return f'<div class="scrolls" tabindex="0" role="group" aria-label="{html.escape(caption)}">{inside}</div>'

    def said(sentences: list[str]) -> list[str]:
        return [f"<p>{html.escape(each)}</p>" for each in sentences]

    parts = [f"<header><h1>{html.escape(title)}</h1></header><main>"]
    parts += [f'<p class="note">{html.escape(each)}</p>' for each in [*shown.warnings(found)]]
    parts += ["<h2>Which is better</h2>", *said([*shown.verdicts(found), *measured])]
    parts += [table(*shown.groups(found), f"Validation loss at the last step, {found.unit}"), *said([shown.GROUPS])]
    parts += ["<h2>Settings that differ</h2>"]
    parts += [table(*shown.settings(found), "These, and no others")] if found.differences else said(["None."])
    parts += ["<h2>How training went</h2>", *_curves(html, curves, found)]
    parts += ["<h2>Every run</h2>", table(*shown.single(found), "All single values")]
    if left_out:
        parts += ["<h2>Left out</h2>", table(["what", "why"], shown.omitted(left_out), "Named, but not compared")]
    return html.page(title, "\n".join([*parts, "</main>"]), style=html.asset("compare.css"))


def _curves(html: Any, curves: Any, found: Comparison) -> list[str]:
    """Validation and training loss against steps, tokens and seconds: a line a run, a kind of line a group."""
    told, kinds, normal = groups.labels(found), min(curves.KINDS, len(found.groups)), _normal(found)
    rows = [(group.number - 1, f"group {group.number} {told[group.number]}".strip()) for group in found.groups[:kinds]]
    if others := len(found.groups) - kinds:
        rows.append((-1, f"the other {others} group{'s' * (others > 1)}"))
    legend = "".join(f"<li>{curves.sample(kind)}{html.escape(label)}</li>" for kind, label in rows)
    if normal:
        where = f"where our own runs lie: {', '.join(normal)}"
        legend += f"<li>{curves.shade()}{html.escape(where)}</li>"
    drawn: dict[str, list[str]] = {}
    for what, points in (("Validation loss", lambda run: run.validation[found.unit]), ("Training loss", _training)):
        if what == "Training loss" and found.unit != NATS:
            continue
        for axis, x in AXES.items():
            lines = [
                curves.Line(str(group.number), group.number - 1, line)
                if group.number <= kinds
                else curves.Line("", -1, line)
                for group in found.groups
                for run in group.runs
                if (line := [(at, loss) for step, loss in points(run) if (at := x(run, step)) is not None])
            ]
            title = f"{what} against {axis}"
            areas = [shades[what][axis] for shades in normal.values() if axis in shades[what]]
            told_too = f"{title}; the tables hold its figures"
            drawn.setdefault(what, []).append(curves.chart(title, axis, lines, told_too, areas))
    without = [run.name for group in found.groups for run in group.runs if not (run.training or run.validation[NATS])]
    silent = [run.name for group in found.groups for run in group.runs if run.training and not run.clock]
    notes = [f"In {found.unit}. {CUT}", shown.SECONDS] + (
        ["Training losses are of different tokens, so they are not drawn."] * (found.unit != NATS)
    )
    notes += [f"No curve, as they have no metrics: {', '.join(without)}."] if without else []
    notes += [f"Not drawn against seconds, as they logged no speed: {', '.join(silent)}."] if silent else []
    shelves = [f'<div class="curves">{"".join(charts)}</div>' for charts in drawn.values()]
    return [f'<ul class="legend">{legend}</ul>', *shelves, *(f"<p class='soft'>{html.escape(n)}</p>" for n in notes)]


def _normal(found: Comparison) -> dict[str, dict[str, dict[str, Any]]]:
    """Bands of our own runs, if there are such of a group's recipe: label -> chart -> axis -> the area."""
    try:
        from nanogpt_jax.normal import reference, verdict
    except ImportError:  # the room was removed
        return {}
    bands: dict[str, dict[str, dict[str, Any]]] = {}
    known = reference.known() if found.unit == NATS else []
    for run in [group.runs[0] for group in found.groups]:
        match, _ = verdict.find(config.read_json(run.path / "config.json"), run.path, known)
        if match and match.same_data:
            its, T = verdict.bands(match.reference), run.tokens_per_step
            bands[f"{match.reference.n} of {match.reference.name}"] = {
                what: {"steps": its[key], "tokens": [(step * T, low, high) for step, low, high in its[key]]}
                for what, key in (("Validation loss", "val/loss"), ("Training loss", "train/loss"))
            }
    return bands


def _training(run: Run) -> runs.Curve:
    return run.training


AXES: dict[str, Callable[[Run, int], float | None]] = {
    "steps": lambda run, step: step,
    "tokens": lambda run, step: step * run.tokens_per_step,
    "seconds of training": lambda run, step: run.seconds(step),
}
