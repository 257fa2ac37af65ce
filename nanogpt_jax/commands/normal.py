"""nanogpt-jax normal: does a run lie in the band of runs of its recipe? And --make, which makes such a band."""

from dataclasses import dataclass
from pathlib import Path

from nanogpt_jax import cli
from nanogpt_jax.config import UserError, command_line
from nanogpt_jax.config.command_line import CommandLine, flag
from nanogpt_jax.host import files
from nanogpt_jax.normal import make, reference, verdict
from nanogpt_jax.run.opened import newest


@dataclass(frozen=True)
class Options(command_line.Options):
    make: str | None = flag(
        "CONFIG",
        "make the reference of this config anew, from finished runs of at least five seeds that logged every step, and "
        "put it into the package, over the one that is there",
    )


COMMAND = CommandLine(
    "normal",
    Options,
    "Says whether a run, finished or not, lies in the band of our own runs with its settings and data; if not, since "
    "which step, and what may be the cause.",
    {"[RUN]": "a run directory (default: the newest in runs/); with --make, the runs of the reference"},
)


def read(argv: list[str]) -> Options:
    """The command line; UserError if it is invalid."""
    asked = COMMAND.read(argv)
    if asked.make is None:
        return asked.of_one_run()
    if not asked.make.isidentifier() or not asked.words:
        raise UserError(f"--make={asked.make} needs the name of a config, and the runs of its reference")
    return asked


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    asked = read(argv)
    if asked.make:
        return _make(asked.make, [make.read(Path(word)) for word in asked.words])
    run = make.read(Path(asked.words[0]) if asked.words else newest(Path("runs")))
    match, data = verdict.find(run.cfg, run.path)
    if run.extended:
        print("its steps were changed on the way, so its schedule is like no other's: no reference")
    elif match is None:
        print(verdict.without_reference(run.cfg))
    elif not match.same_data:
        print(verdict.other_data(match.reference, data))
    else:
        print(verdict.page(verdict.judged(match, data, run.rows)))
    return 0


def _make(name: str, runs: list[make.Logged]) -> int:
    one = make.make(name, runs)
    text, place = reference.to_json(one), reference.FOLDER / f"{name}.json"
    try:
        place.parent.mkdir(exist_ok=True)
        files.write(place, text)
    except OSError as e:
        raise UserError(f"cannot write {place}: {e.strerror or e}") from None
    alarms = verdict.false_alarms(reference.from_json(text))
    print(f"{place}: {one.n} runs, {len(text):,} bytes; leaving one out, {len(alarms)} of {one.n} would be outside")
    return 0
