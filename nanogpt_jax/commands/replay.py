"""nanogpt-jax replay: a step of a run once more, operation by operation, to see what broke, or what happened there."""

from dataclasses import dataclass
from pathlib import Path

from nanogpt_jax import cli
from nanogpt_jax.config import command_line
from nanogpt_jax.config.command_line import AT_LEAST_1, CommandLine, flag
from nanogpt_jax.replaying import past
from nanogpt_jax.run.opened import newest


@dataclass(frozen=True)
class Options(command_line.Options):
    step: int | None = flag(
        "N", "the step, counted from 1 as in metrics.jsonl (default: the one that broke the run, else the last)",
        must=AT_LEAST_1,
    )  # fmt: skip
    rows: int | None = flag(
        "N", "sequences of the batch to show in full, those with the largest loss (default: 3, cut)", must=AT_LEAST_1
    )


COMMAND = CommandLine(
    "replay",
    Options,
    "Takes a step of a run once more, with the very weights and batch that it had, and operation by operation: names "
    "the first result that is not finite, and shows the largest numbers and the gradient norm of each layer.",
    {"[RUN]": "a run directory (default: the newest in runs/)"},
    after="The state is rebuilt from the newest checkpoint before the step, or from the seed, by the run's own "
    "compiled step, and compared with what the run has logged. Nothing is written.",
)


def read(argv: list[str]) -> Options:
    """The command line; UserError if it is invalid. No jax here."""
    return COMMAND.read(argv).of_one_run()


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    asked = read(argv)
    run = past.read(Path(asked.words[0]) if asked.words else newest(Path("runs")))
    step = past.choose(run, asked.step)
    data = past.data_of(run)

    from nanogpt_jax.replaying import findings, rebuilt, shown  # jax takes seconds, so only now

    its = rebuilt.rebuild(run, data, step)
    print(shown.page(run, its, findings.find(its), asked.rows))
    return 0
