"""How fast members of a sweep are trained at once, in one vmapped program, beside one after the other.

    python tests/together_or_in_turn.py [--members=2,4,8,16] CONFIG [--SECTION.NAME VALUE ...]

New weights, real batches. As in a sweep's own trial, calls of both ways alternate, and the medians count. The ratio is
the median of those within a round, with its quartiles: other load moves both of a round.
"""

import os
import statistics
import sys

from nanogpt_jax import config
from nanogpt_jax.host import runtime

runtime.set_up()

import jax  # noqa: E402

from nanogpt_jax.host.signals import StopRequest  # noqa: E402
from nanogpt_jax.sweeping import faster, in_turn  # noqa: E402
from nanogpt_jax.sweeping.members import Member  # noqa: E402

ROUNDS = 12  # more than a sweep takes


def main(argv: list[str]) -> None:
    sizes = next((word.partition("=")[2] for word in argv if word.startswith("--members=")), "2,4,8,16")
    command = config.load([word for word in argv if not word.startswith("--members=")])
    (one,) = in_turn.ready([Member("measured", {}, 0, 1, command)], {})
    steps: in_turn.Steps = {}
    print("| members | ms a member-step, together | in turn | speed together / in turn | quartiles | load |")
    print("|---|---|---|---|---|---|", flush=True)
    for M in map(int, sizes.split(",")):
        found = faster.measure(one, M, StopRequest(), steps, rounds=ROUNDS)
        assert found
        low, ratio, high = statistics.quantiles([b / a for a, b in found.rounds], n=4)
        both = f"{1e3 * found.together:.3g} | {1e3 * found.in_turn:.3g} | {ratio:.2f}"
        print(f"| {M} | {both} | {low:.2f} to {high:.2f} | {os.getloadavg()[0]:.1f} |", flush=True)
    print(f"{len(jax.devices())} {jax.devices()[0].device_kind}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
