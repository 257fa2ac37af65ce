"""How the cost of a token grows with layers, width, context and batch on this machine, beside 6 N + 12 L C T.

Each point is a run of `nanogpt-jax bench`. One setting changes at a time, by a factor of 16. A straight line through
the logarithms gives the exponents of the measured cost and of the counted operations.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, UserError, command_line
from nanogpt_jax.config.command_line import COUNT, CommandLine, flag


@dataclass(frozen=True)
class Options(command_line.Options):
    picture: str | None = flag(
        "FILE", "draw the results (needs pip install 'nanogpt-jax[plot]'); the suffix is the format: .svg, .png, .pdf"
    )
    json: str | None = flag("FILE", "write the points as JSON")
    rounds: int = flag("N", "measurements of each point; the median counts", 3, must=COUNT)


COMMAND = CommandLine(
    "scaling",
    Options,
    "Measures the training step while one setting at a time grows by a factor of 16, and fits cost ~ setting^exponent.",
    kind=Config,
)

AXES = {
    "model.n_layer": (1, 2, 4, 8, 16),
    "model.n_embd": (64, 128, 256, 512, 1024),
    "model.block_size": (64, 128, 256, 512, 1024),
    "train.batch_size": (1, 2, 4, 8, 16),
}
BASE = {"model.n_layer": 4, "model.n_embd": 256, "model.block_size": 256, "train.batch_size": 4}


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    asked = read(argv)
    # fails now, and not after minutes
    plt = cli.pyplot("--picture", asked.picture) if asked.picture is not None else None
    points = {axis: [_measure(axis, value, asked.settings, asked.rounds) for value in AXES[axis]] for axis in AXES}
    print(f"{'':<20}{'measured':>10}{'counted':>10}   exponents of the cost of a token")
    fits = {}
    for axis, row in points.items():
        fits[axis] = [_exponent(row, "seconds_per_token"), _exponent(row, "flops_per_token")]
        print(f"{axis:<20}{fits[axis][0]:>10.2f}{fits[axis][1]:>10.2f}")
    if asked.json:
        cli.write_file("--json", asked.json, json.dumps({"points": points, "exponents": fits}, indent=2) + "\n")
    if plt and (place := asked.picture):
        cli.write_file("--picture", place, _drawn(plt, points, fits, cli.format_of(place)))
    return 0


def read(argv: list[str]) -> Options:
    """Our own options and the settings of train.py, checked."""
    asked = COMMAND.read(argv)
    if asked.words:
        raise UserError(f"{asked.words[0]} is not a flag\n       see nanogpt-jax scaling --help")
    for name, place in (("--picture", asked.picture), ("--json", asked.json)):
        if place is not None:
            cli.check_file(name, place)
    config.load([f"--{key}={value}" for key, value in asked.settings.items()])
    return asked


def _measure(axis: str, value: int, settings: dict[str, str], rounds: int) -> dict[str, Any]:
    """One point: the step with `axis` at `value`, the others at BASE."""
    wanted = {**{k: str(v) for k, v in BASE.items()}, "model.n_head": "4", "optim.name": "adamw", **settings}
    wanted[axis] = str(value)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "nanogpt_jax", "bench", "train", f"--rounds={rounds}", f"--json={folder}/r"]
        command += [word for key, setting in wanted.items() for word in (f"--{key}", setting)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"could not measure {axis}={value}\n       {done.stderr.strip().splitlines()[-1]}")
        (result,) = json.loads(Path(folder, "r").read_text())["results"]
    speed = result["tokens_per_second"]
    print(f"{axis}={value}: {speed:,.0f} tokens/s, {result['share_of_peak']:.0%} of the peak", file=sys.stderr)
    flops = result["gflops"] * 1e9 / speed
    return {"value": value, "seconds_per_token": 1 / speed, "flops_per_token": flops, "gflops": result["gflops"]}


def _exponent(row: list[dict[str, Any]], key: str) -> float:
    """The slope of log(key) over log(value), by least squares."""
    import numpy as np

    return float(np.polyfit(np.log([p["value"] for p in row]), np.log([p[key] for p in row]), 1)[0])


def _drawn(plt: Any, points: dict[str, list[dict[str, Any]]], fits: dict[str, list[float]], kind: str) -> bytes:
    figure, axes = plt.subplots(1, len(points), figsize=(3.2 * len(points), 3.2), sharey=True, layout="constrained")
    for axis, (name, row) in zip(axes, points.items(), strict=True):
        values, cost = [p["value"] for p in row], [p["seconds_per_token"] * 1e6 for p in row]
        middle = len(row) // 2
        # the cost at a constant speed, that of the middle point
        counted = [cost[middle] * p["flops_per_token"] / row[middle]["flops_per_token"] for p in row]
        axis.loglog(values, cost, "o-", label=f"measured, exponent {fits[name][0]:.2f}")
        axis.loglog(values, counted, "--", label=f"6N + 12LCT, {fits[name][1]:.2f}")
        axis.set_xticks(values, [str(v) for v in values])
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("µs a token")
    picture = BytesIO()
    figure.savefig(picture, format=kind)
    return picture.getvalue()
