"""nanogpt-jax plan: what a run would need and cost, here or on devices that are not here, before it starts."""

import sys
from dataclasses import dataclass
from pathlib import Path

from nanogpt_jax import cli, config
from nanogpt_jax.config import Command, Config, UserError, command_line
from nanogpt_jax.config.command_line import AT_LEAST_1, CommandLine, flag
from nanogpt_jax.planning import estimate, shown, tables, targets
from nanogpt_jax.planning.estimate import Plan
from nanogpt_jax.planning.targets import Target


@dataclass(frozen=True)
class Options(command_line.Options):
    target: str = flag(
        "DEVICES", f"cpu (this machine), or with a number or a topology: {', '.join(targets.EXAMPLES)}", "cpu"
    )
    tokens: int | None = flag("N", "tokens of the training text, if it was not prepared yet", must=AT_LEAST_1)
    compile: bool = flag(
        "",
        "ask XLA itself: compile the step for the target, ahead of time; it needs its compiler, not the device",
        False,
    )
    card: Path | None = flag("FILE", "a GPU in XLA's text format, for --compile (default: from the maker's numbers)")
    measure: bool = flag("", "take real steps here, and say how long the run takes", False)
    tables: bool = flag(
        "", "print the tables of distributed/README.md instead: every shipped config on every target", False
    )


COMMAND = CommandLine(
    "plan",
    Options,
    "Says what a run would need and cost before it starts: memory by part, the largest micro-batch that fits, disk, "
    "time and what is unusual. Without --compile and --measure it computes, in under a second and without JAX.",
    {"[CONFIG.toml]": "a config file, or the name of a shipped one"},
    kind=Config,
)


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    return run(*read(argv))


def read(argv: list[str]) -> tuple[Options, Command, Target]:
    """The command line, the settings and the target; UserError if one is invalid. No jax here."""
    asked = COMMAND.read(argv)
    flags = [f"--{key}={value}" for key, value in asked.settings.items()]
    command = config.load([*asked.words, *flags])
    target = targets.find(asked.target)
    if asked.measure and (asked.target != "cpu" or asked.compile):
        other = "--compile" if asked.compile else f"--target={asked.target}"
        raise UserError(f"--measure takes steps on this machine, so it excludes {other}; leave one out")
    if asked.card and not (asked.compile and target.kind.platform == "gpu"):
        raise UserError(f"--card={asked.card} describes a GPU for --compile, which is not asked for")
    return asked, command, target


def run(asked: Options, command: Command, target: Target) -> int:
    if asked.tables:
        print(tables.fits())
        print()
        print(tables.scale())
        return 0
    made = estimate.plan(command.cfg, target, asked.tokens or 0)
    print(shown.page(made, command.run_dir.name), flush=True)
    if asked.compile:
        print(_compiled(made, asked.card))
    if asked.measure:
        from nanogpt_jax.planning import measured

        first, second = measured.step_seconds(made)
        print(f"\n{shown.measured(made, first, second, measured.run_seconds(made, first, second))}")
    return 0


def _compiled(made: Plan, card: Path | None) -> str:
    """What XLA says of the step; if it does not fit, of the changes with which it does, too."""
    from nanogpt_jax.planning import compiled

    print("\ncompiling ...", file=sys.stderr, flush=True)
    compiled.set_up(made.target)
    its = compiled.of_plan(made, card)
    words = shown.compiled(made, its)
    if its.total <= made.target.room:
        return words
    good = []
    for change, other in estimate.remedies(made):
        print(f"compiling with {change} ...", file=sys.stderr, flush=True)
        if (one := compiled.of_plan(other, card)).total <= made.target.room:
            good.append((change, one))
    return f"{words}\n{shown.changes(good)}"
