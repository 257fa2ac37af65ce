"""A comparison in words: tables and sentences, for the terminal and for the page."""

import textwrap

from nanogpt_jax.comparing.groups import Comparison, Difference, Group, Verdict, labels
from nanogpt_jax.comparing.runs import BITS, DATA, EXTENDED, NATS
from nanogpt_jax.evaluation.compare import CLEAR
from nanogpt_jax.evaluation.statistics import Estimate
from nanogpt_jax.host.messages import listed

SEED = "train.seed"
WIDTH = 108  # columns of a sentence
LABEL = 60  # characters of the settings of a group; if one is longer, the rows have the name of its first run instead
NAMED = 6  # runs that are named; of more, their number is said
Table = tuple[list[str], list[list[object]]]  # heads and rows
SECONDS = (
    "The metrics hold no time: seconds are those of training, from the logged tokens/s, without compiling and "
    "evaluating."
)
GROUPS = (
    "A group is made of runs that differ in their seed alone, or in how they were computed and logged. Its mean is "
    "over seeds, of finished runs, ± the standard error; n counts the seeds."
)


def title(found: Comparison) -> str:
    n, groups = sum(len(group.runs) for group in found.groups), len(found.groups)
    return f"{n} runs in {groups} group{'s' * (groups > 1)}"


def page(found: Comparison, left_out: dict[str, str], measured: list[str]) -> str:
    """All of it for the terminal. `measured`: what was measured now on the same windows."""
    parts = [title(found)]
    parts += [_titled("settings that differ", _columns(settings(found)))] if found.differences else []
    parts += [_titled(f"validation loss at the last step, {found.unit}", _columns(groups(found)))]
    sentences = [GROUPS, *verdicts(found), *measured, *warnings(found)]
    parts += ["\n".join(textwrap.fill(each, WIDTH, break_on_hyphens=False) for each in sentences)]
    parts += [_titled("runs", _columns(single(found)))]
    parts += [SECONDS]
    if rows := omitted(left_out):
        parts += [_titled("left out", _columns((["what", "why"], rows), heads=False))]
    return "\n\n".join(parts)


def settings(found: Comparison) -> Table:
    """The settings that differ, and only those: who has which value."""
    rows: list[list[object]] = []
    for one in found.differences:
        if one.key == SEED:
            rows.append([SEED, listed(sorted(map(int, one.values))), "seeds, which make no groups"])
            continue
        for value, who in one.values.items():
            rows.append([_key(one.key), value, _who(one, who)])
    return ["setting", "value", "of"], rows


def groups(found: Comparison) -> Table:
    """A row a group, the best of a text first."""
    told, units = labels(found), [NATS, BITS] if found.unit == BITS else [NATS]
    longest = max(map(len, told.values()))
    head = "settings" if longest <= LABEL else "first run"
    if longest > LABEL:
        told = {group.number: group.runs[0].name for group in found.groups}
    heads = ["group", *([head] * (longest > 0)), "n", *(f"final, {unit}" for unit in units)]
    heads += ["best", "tokens/s", "seconds", "runs"]
    rows: list[list[object]] = []
    for group in found.groups:
        finals = [_estimate(group.final(unit), 4) for unit in units]
        best, speed, seconds = group.best(found.unit), group.speed, group.seconds
        rows.append(
            [
                *(group.number, *([told[group.number]] * (longest > 0)), len(group.by_seed(found.unit)), *finals),
                *(_estimate(best, 4), _estimate(speed, 0), _estimate(seconds, 1), _states(group)),
            ]
        )
    return heads, rows


def single(found: Comparison) -> Table:
    """A row a run: all single values."""
    heads = ["run", "group", "seed", "step", f"validation loss, {found.unit}", "best, at step"]
    heads += ["tokens/s", "seconds", "state"]
    rows: list[list[object]] = []
    for group in found.groups:
        for run in group.runs:
            steps, curve, best = run.settings["train.steps"], run.validation[found.unit], run.best(found.unit)
            last = "–" if not curve else f"{curve[-1][1]:.4f}"
            if curve and run.state != "finished":
                last += f" at step {curve[-1][0]:,}"
            seconds = run.seconds(run.step)
            at = f"{run.step:,} of {steps:,}"
            state = f"diverged at step {at}" if run.state == "diverged" else run.state
            rows.append(
                [
                    *(run.name, group.number, run.seed, at, last),
                    "–" if best is None else f"{best[1]:.4f}, {best[0]:,}",
                    *("–" if x is None else f"{x:,.{digits}f}" for x, digits in ((run.speed, 0), (seconds, 1))),
                    "; ".join([state, *run.notes]),
                ]
            )
    return heads, rows


def omitted(left_out: dict[str, str]) -> list[list[object]]:
    """What was named or matched and is not compared, and why: a row a reason."""
    whys: dict[str, list[str]] = {}
    for name, why in left_out.items():
        whys.setdefault(why, []).append(name)
    return [[_listed(names), why] for why, names in whys.items()]


def verdicts(found: Comparison) -> list[str]:
    """Which is better, of each validation text."""
    if not found.texts:
        return ["No run is finished, so no final losses are compared."]
    return [verdict(one, found.unit) for one in found.verdicts]


def verdict(one: Verdict, unit: str) -> str:
    """Whether the best group is better than the second, and how that is known."""
    first, second = f"group {one.best.number}", f"group {one.second.number}"
    flattered = f"; the best of {one.of} groups is flattered by the choice" if one.of > 2 else ""
    if one.gap.error is None:
        return (
            f"Group {one.best.number} is ahead of {second} by {one.gap.value:.4f} {unit}; whether another seed would "
            f"turn that round is unknown, as it takes two seeds of each{flattered}."
        )
    how = f"paired by {one.pairs} seeds" if one.pairs else "seeds not paired, as fewer than two are in both"
    size = f"by {one.gap.value:.4f} ± {one.gap.error:.4f} {unit}, {one.gap.errors:.1f} standard errors ({how})"
    if one.is_clear:
        return f"Group {one.best.number} is better than {second} {size}{flattered}."
    if one.gap.value == 0:
        return f"No clear winner: {first} and {second} are equal ({how}){flattered}."
    return f"No clear winner: {first} is ahead of {second} {size}; below {CLEAR:.0f} that may be chance{flattered}."


def warnings(found: Comparison) -> list[str]:
    """What must be known before losses are compared."""
    told = []
    if found.texts > 1:
        told.append(
            f"Losses were measured on {found.texts} different validation texts, and only those of one text can be "
            "compared. To measure two groups on one text, name their runs and add --data FILE."
        )
    scored = [group.finished[0] for group in found.groups if group.finished]
    if len({run.step * run.tokens_per_step for run in scored}) > 1:
        told.append(
            "Groups were trained on different numbers of tokens; the curves against tokens and seconds compare them at "
            "equal cost, but a schedule that is not at its end is higher than one of that length."
        )
    if len({run.settings["model.block_size"] for run in scored}) > 1:
        told.append(
            "Contexts differ in length (model.block_size), and so do the windows in which losses were measured."
        )
    if found.unit == BITS:
        told.append(
            "Tokenizers differ, so losses are compared in bits a byte; a token of one is not a token of another."
        )
    for group in found.groups:
        for seed in sorted({run.seed for run in group.finished}):
            same = [run.name for run in group.finished if run.seed == seed]
            if len(same) > 1:
                told.append(f"{_listed(same)} of group {group.number} have the same seed {seed} and count once.")
    return told


def _states(group: Group) -> str:
    """How many runs are in which state: "3 finished, 1 diverged"."""
    states = [run.state for run in group.runs]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states), key=states.index))


def _key(key: str) -> str:
    return {DATA: "the data's fingerprint", EXTENDED: "steps asked for later"}.get(key, key)


def _who(one: Difference, who: list[int] | list[str]) -> str:
    if one.is_of_groups:
        return f"group{'s' * (len(who) > 1)} {', '.join(map(str, who))}"
    return f"{len(who)} runs" if len(who) > NAMED else _listed([str(name) for name in who])


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def _estimate(figure: Estimate | None, digits: int) -> str:
    if figure is None:
        return "–"
    return f"{figure.value:,.{digits}f}" + ("" if figure.error is None else f" ± {figure.error:,.{digits}f}")


def _titled(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def _columns(table: Table, heads: bool = True) -> list[str]:
    """Aligned columns: the first and the last to the left, figures to the right."""
    rows = [[str(cell) for cell in row] for row in ([table[0]] if heads else []) + table[1]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = {
        i for i in range(1, len(widths) - 1) if all(c[:1].isdigit() or c[:1] in "–-" for c in (r[i] for r in rows[1:]))
    }
    return [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
