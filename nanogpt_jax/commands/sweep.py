"""nanogpt-jax sweep: many runs at once, a grid of settings times seeds, and an honest comparison."""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, UserError, command_line, parse
from nanogpt_jax.config.command_line import AT_LEAST_1, CommandLine, flag
from nanogpt_jax.host import files
from nanogpt_jax.host.signals import stop_on_signals
from nanogpt_jax.sweeping import halve, members, ranges, record, results
from nanogpt_jax.sweeping.members import FRESH, Sweep
from nanogpt_jax.sweeping.ranges import SEED, Range
from nanogpt_jax.sweeping.results import CONFIRM, SWEEP, Row, Stage

SEEDS = 3
LONGEST_NAME = 255  # bytes: file systems allow no more
MOST_DRAWN = 50  # rows of a drawing


@dataclass(frozen=True)
class Options(command_line.Options):
    over: tuple[str, ...] = flag(
        "NAME=VALUES",
        "a setting and its values: A,B,C or log:FROM:TO:N or lin:FROM:TO:N; A;B if values have commas; given several "
        "times, all combinations",
        (),
    )
    seeds: int | None = flag(
        "N",
        f"each configuration is trained with N seeds, train.seed and those after it (default: {SEEDS})",
        must=(f"lie in 1 to {FRESH}", lambda n: 1 <= n <= FRESH),
    )
    sample: int | None = flag("N", "take N combinations at random, the same ones every time", must=AT_LEAST_1)
    halve: bool = flag(
        "",
        "successive halving: short schedules for all, the better half goes on to longer ones, the last two are "
        "trained in full",
        False,
    )
    confirm: int = flag(
        "N",
        "train the best and the second again with N fresh seeds, since the best of many is flattered (default: no)",
        0,
        must=AT_LEAST_1,
    )
    together: Literal["auto", "on", "off"] = flag(
        "",
        "train members that differ in numbers alone at once, in one program; auto: if the work is long enough to try, "
        "and that is faster; on: without trying",
        "auto",
    )
    name: str | None = flag("NAME", "the sweep's directory is runs/NAME (default: that of the config file, -sweep)")


COMMAND = CommandLine(
    "sweep",
    Options,
    "Trains every combination of settings with several seeds, each as a run of its own in runs/NAME, and compares "
    "them: means, standard errors, the best against the second, a page, a table, and the best settings for train.py. "
    "The same command again trains only what is missing.",
    {"[CONFIG.toml]": "a config file, or the name of a shipped one"},
    kind=Config,
)


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    return run(read(argv), argv)


def read(argv: list[str]) -> Sweep:
    """The sweep that is asked for, each of its members valid; UserError if one is not. No jax here."""
    asked = COMMAND.read(argv)
    if len(asked.words) > 1:
        raise UserError(f"one config file at a time, but got {' and '.join(asked.words)}")
    if not asked.over:
        example = "--over optim.learning-rate=1e-2,2e-2"
        raise UserError(f"a sweep needs --over NAME=VALUES: which setting, and its values\n       like {example}")
    swept = ranges.read(asked.over)
    parse.merge(Config(), asked.settings, "command line")  # a value of a wrong type is none of the members' faults
    if both := [one.key for one in swept if one.key in asked.settings]:
        raise UserError(f"--{both[0]}={asked.settings[both[0]]} and --over {both[0]} exclude each other; leave one out")
    listed = [one for one in swept if one.key == SEED]
    if listed and asked.seeds is not None:
        raise UserError(f"--seeds={asked.seeds} and --over {SEED} exclude each other; leave one out")
    swept = [one for one in swept if one.key != SEED]
    if alone := [key for key in ranges.ALONE if key in asked.settings]:
        raise UserError(f"--{alone[0]}={asked.settings[alone[0]]}: a sweep runs in one process; leave it out")
    configurations = ranges.grid(swept, asked.sample)
    if asked.halve and len(configurations) < halve.LEAST:
        n = len(configurations)
        raise UserError(f"--halve needs {halve.LEAST} configurations or more, but --over gives {n}; leave it out")
    if asked.confirm and len(configurations) < 2:
        raise UserError(f"--confirm={asked.confirm} compares the best two, but --over gives one configuration")
    base = _base(asked.words, asked.settings)
    sweep = Sweep(
        Path("runs") / _name(asked),
        tuple(asked.words),
        asked.settings,
        tuple(swept),
        tuple(configurations),
        listed[0].values if listed else tuple(range(base, base + (asked.seeds or SEEDS))),
        asked.sample,
        asked.halve,
        asked.confirm,
        asked.together,
    )
    record.check_place(sweep.path)
    sweep.members(sweep.configurations, sweep.seeds, halve.share(len(configurations)) if sweep.halve else 1)
    record.check(sweep)
    return sweep


def _name(asked: Options) -> str:
    name = asked.name if asked.name is not None else f"{Path(asked.words[0]).stem if asked.words else 'default'}-sweep"
    if not name or name in (".", "..") or set(name) & set("/\\\0") or len(os.fsencode(name)) > LONGEST_NAME:
        raise UserError(
            f"--name={name} must be the name of a directory in runs/, without slashes, of at most {LONGEST_NAME} bytes"
        )
    return name


def _base(words: Sequence[str], given: dict[str, str]) -> int:
    """The first seed: train.seed of the command line, of the config file, or its default."""
    cfg = parse.merge(Config(), parse.read_toml(parse.find_config(words[0])) if words else {}, " ".join(words))
    return parse.merge(cfg, {k: v for k, v in given.items() if k == SEED}, "command line").train.seed


def run(sweep: Sweep, argv: list[str]) -> int:
    from nanogpt_jax.sweeping.conduct import Study  # with jax, which takes seconds

    command, study = config.command_again(argv, name="sweep"), None

    def standing() -> str:
        return f"{study.standing() if study else 'nothing was trained'}\ngo on with the same command: {command}"

    def write(stages: list[Stage]) -> None:
        _write(sweep, stages, command, standing())

    with stop_on_signals(standing) as stop, record.claim(sweep) as opened:
        study = Study(sweep, opened, stop, write)
        with contextlib.redirect_stdout(sys.stderr):  # what members say is progress; the result is the table
            stages = study.conduct()
        if study.interrupted:
            write(stages)
            print(
                "\n\n".join(
                    [*_tables(sweep, stages), "\n".join([*(study.saved or [study.interrupted.name]), standing()])]
                )
            )
            return 128 + study.interrupted
        _write(sweep, stages, command)
        found = [*_findings(sweep, stages), *([opened.ways] if opened.ways else [])]
        print("\n\n".join([*_tables(sweep, stages), "\n".join(found), _next(sweep, stages)]))
        return 0


# ---- the result -----------------------------------------------------------------------------------------------------


def _final(stages: Sequence[Stage]) -> Stage:
    """The table that decides: the last, but for that of --confirm."""
    return [stage for stage in stages if stage.name != CONFIRM][-1]


def _confirmed(stages: Sequence[Stage]) -> Stage | None:
    return stages[-1] if stages[-1].name == CONFIRM else None


def _best(stages: Sequence[Stage]) -> Row | None:
    """The best configuration: the sweep's, unless fresh seeds clearly say otherwise."""
    again = _confirmed(stages)
    fresh = results.verdict(again.rows) if again else None
    first = results.verdict(_final(stages).rows)
    return fresh.best if fresh and fresh.is_clear else first.best if first else None


def _title(stage: Stage, sweep: Sweep) -> str:
    """What a table shows."""
    length = f"1/{stage.share} of the steps" if stage.share > 1 else "all steps"
    what = f"validation loss at the last step, {results.figure_of(sweep.keys).unit}; mean and standard error of seeds"
    name = {SWEEP: "", CONFIRM: "fresh seeds: "}.get(stage.name, f"{stage.name}, {length}: ")
    return f"{name}{what}"


def _correlation(stage: Stage) -> str:
    if not stage.n_correlated:
        return ""
    found = "unknown" if stage.correlation is None else f"{stage.correlation:.2f}"
    return f"rank correlation with the round before: {found} ({stage.n_correlated} configurations)"


def _tables(sweep: Sweep, stages: Sequence[Stage]) -> list[str]:
    parts = []
    for stage in stages:
        lines = [_title(stage, sweep), results.text(stage.rows, sweep.keys, stage.seeds), _correlation(stage)]
        parts.append("\n".join(line for line in lines if line))
    return parts


def _findings(sweep: Sweep, stages: Sequence[Stage]) -> list[str]:
    """Who is best, with what certainty, and what is to be known before it is believed."""
    figure, final, again = results.figure_of(sweep.keys), _final(stages), _confirmed(stages)
    lines = [results.words(results.verdict(final.rows), figure)]
    if again:
        lines.append(f"on fresh seeds: {results.words(results.verdict(again.rows), figure, '--confirm')}")
    every = [row for stage in stages for row in stage.rows]
    return [*lines, *(f"warning: {line}" for line in results.warnings(sweep.ranges, _best(stages), every))]


def _next(sweep: Sweep, stages: Sequence[Stage]) -> str:
    lines = [f"table: {sweep.path / record.CSV}"]
    if (sweep.path / record.PAGE).exists():
        lines.append(f"page: {sweep.path / record.PAGE}: open it in a browser")
    if _best(stages):
        lines.append(f"the best settings: {_with_the_best(sweep)}")
    return "\n".join(lines)


def _with_the_best(sweep: Sweep) -> str:
    """The command that trains with the best settings, in a directory of this sweep's."""
    best = sweep.path / record.BEST
    return f"{config.program('train')} {config.word(best)} --run-dir {config.word(best.with_suffix(''))}"


def _write(sweep: Sweep, stages: Sequence[Stage], command: str, standing: str = "") -> None:
    """The table, the page and, if the sweep is complete, the best settings. `standing`: how far it is."""
    contents = {record.CSV: results.as_csv(stages, sweep.keys)}
    if page := _page(sweep, stages, command, standing):
        contents[record.PAGE] = page
    if not standing and (best := _best(stages)):
        one = members.member(sweep, best.values, sweep.seeds[0])
        about = [f"The best of {sweep.path}: {ranges.label(best.values)}", _with_the_best(sweep)]
        contents[record.BEST] = members.best_toml(one, about)
    for name, content in contents.items():
        try:
            files.write(sweep.path / name, content)
        except OSError as e:
            what = f"cannot write {sweep.path / name}: {e.strerror or e}"
            raise UserError(f"{what}\n       see to that, then give the same command again: no run is lost") from None


# ---- the page -------------------------------------------------------------------------------------------------------


def _page(sweep: Sweep, stages: Sequence[Stage], command: str, standing: str) -> str:
    """The page, as HTML; "" if the room that makes pages was removed."""
    try:
        from nanogpt_jax.pages import html
    except ImportError:
        return ""
    n, title = len(sweep.configurations), f"Sweep {sweep.path}"
    about = f"{n} configuration{'s' if n > 1 else ''} with {len(sweep.seeds)} seed{'s' if len(sweep.seeds) > 1 else ''}"
    about += " each. A bar is one standard error to each side, and a ring is one run. Less is better."
    found = [f"Not finished: {standing.splitlines()[0]}."] if standing else _findings(sweep, stages)
    notes = "".join(f'<p class="note">{html.escape(line)}</p>' for line in found)
    parts = [f"<header><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p></header><main>"]
    parts += ["<h2>What was found</h2>", notes, *_drawings(stages[0], sweep), "<h2>Every configuration</h2>"]
    for stage in stages:
        heads, lines = results.cells(stage.rows, sweep.keys, stage.seeds)
        caption = "; ".join(filter(None, [_title(stage, sweep), _correlation(stage)]))
        table = html.table(heads, [list(line) for line in lines], caption)
        parts.append(
            f'<div class="scrolls" tabindex="0" role="group" aria-label="{html.escape(caption)}">{table}</div>'
        )
    parts += ["<h2>How to make it again</h2>", f"<pre>{html.escape(command)}</pre>", "</main>"]
    return html.page(title, "\n".join(parts), style=html.asset("plots.css"))


def _drawings(stage: Stage, sweep: Sweep) -> list[str]:
    """Points with error bars of all; of one swept number also a curve, of two settings a map."""
    from nanogpt_jax.pages import plots

    def point(row: Row, x: float = 0.0) -> plots.Point:
        mean, error = (row.mean.value, row.mean.error) if row.mean else (None, None)
        return plots.Point(ranges.label(row.values), mean, error, list(row.finite.values()), x)

    title, keys = _title(stage, sweep), sweep.keys
    known = [row for row in stage.rows if row.by_seed]
    first = f"the best {MOST_DRAWN} of {len(known)} configurations" if len(known) > MOST_DRAWN else "the best first"
    drawn = [plots.intervals(f"{first}, {results.figure_of(keys).unit}", [point(row) for row in known[:MOST_DRAWN]])]
    numbers = [value for one in sweep.ranges for value in one.values if type(value) in (int, float)]
    if len(keys) == 1 and len(numbers) == len(sweep.ranges[0].values):
        log = min(numbers) > 0 and max(numbers) / min(numbers) >= 8
        drawn.insert(0, plots.curve(title, keys[0], [point(row, float(row.values[keys[0]])) for row in known], log))
    if len(keys) == 2:
        columns, lines = (_in_order(one) for one in sweep.ranges)
        cells = {
            (columns.index(row.values[keys[0]]), lines.index(row.values[keys[1]])): row.mean.value if row.mean else None
            for row in known
        }
        across, down = (
            (key, [ranges.shown(value) for value in values]) for key, values in zip(keys, (columns, lines), strict=True)
        )
        drawn.insert(0, plots.heat(f"{title}; the fuller, the lower", across, down, cells))
    return drawn


def _in_order(one: Range) -> list:
    """Its values: numbers by size, others as given."""
    return sorted(one.values) if all(type(value) in (int, float) for value in one.values) else list(one.values)
