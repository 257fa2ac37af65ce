"""Whether a run is normal, in words: read from its directory alone, so a resumed run knows its earlier steps."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax.config import Config, ModelConfig, settings
from nanogpt_jax.host import files
from nanogpt_jax.normal import judge, reference, suspicion
from nanogpt_jax.normal.judge import Finding
from nanogpt_jax.normal.reference import Match, Reference
from nanogpt_jax.run import origin
from nanogpt_jax.run.metrics import read_metrics


@dataclass(frozen=True)
class Verdict:
    match: Match
    data: dict[str, Any]  # reference.facts of the run's
    findings: list[Finding]
    at: int  # the last step that was looked at
    training_off: float  # by how much the training loss is above the reference's now, nats
    last_rate: int  # the last step whose learning rate was logged
    validation: float | None  # the last validation loss
    expected: tuple[float, float] | None  # what it is in the reference, and half the width of the band


def beside(cfg: Config, directory: Path, at: int) -> str:
    """What stands behind the words of the evaluation after step `at`; "" if there is no reference.

    Other data than the reference's are told once, at the run's first evaluation.
    """
    try:
        match, data = find(cfg, directory)
        if match is None:
            return ""
        rows = read_metrics(directory / "metrics.jsonl")
    except OSError:  # the run goes on; what is wrong with its directory, others say
        return ""
    if not match.same_data:
        is_first = not any("val/loss" in row for row in rows if row["step"] < at)
        return f"\n{other_data(match.reference, data)}" if is_first else ""
    return _beside(judged(match, data, rows, at))


def find(
    cfg: Config, directory: Path, references: Sequence[Reference] | None = None
) -> tuple[Match | None, dict[str, Any]]:
    """The reference of a run, and `facts` of its data. None for a run that was extended: its schedule was another.

    `references`: those that are known, if they were read before.
    """
    try:
        data = reference.facts(json.loads(files.read(directory / "data.json")))
    except (OSError, ValueError, RecursionError):
        return None, {}
    if type(cfg) is not Config or origin.read(directory).get("extended"):
        return None, data
    return reference.match(cfg, data, reference.known() if references is None else references), data


def judged(match: Match, data: dict[str, Any], rows: Sequence[dict[str, Any]], until: int | None = None) -> Verdict:
    """What the rows up to step `until` say. Without the reference's data, no number is compared."""
    one = match.reference
    run = judge.measure(one, rows, until)
    at = int(max([run.last.max(initial=0), *(step for step, _ in run.validation)]))
    findings = judge.outside(one, run) if match.same_data else []
    step, validation = run.validation[-1] if run.validation else (0, None)
    expected = judge.validation_band(one, step)
    off = run.loss[run.count > 0] - one.loss.runs.mean(0)[run.count > 0]
    last_rate = max((step for step, _ in run.rates), default=0)
    return Verdict(match, data, findings, at, float(off[-1]) if off.size else 0.0, last_rate, validation, expected)


def bands(one: Reference) -> dict[str, list[tuple[int, float, float]]]:
    """To be drawn: of each number in metrics.jsonl (step, lowest, highest) of the single values at that step."""
    steps = np.unique([1, *np.exp(one.knots).round().astype(int), one.steps])
    found = {}
    for key, name in (("train/loss", judge.LOSS), ("grad_norm", judge.NORM)):
        low, high = judge.training_band(one, steps, name)
        found[key] = list(zip(steps.tolist(), low.tolist(), high.tolist(), strict=True))
    measured = [(step, judge.validation_band(one, step)) for step in one.evaluated.astype(int).tolist()]
    found["val/loss"] = [(step, band[0] - band[1], band[0] + band[1]) for step, band in measured if band]
    return found


def start(cfg: Config, directory: Path, loss: float) -> str:
    """A line if the loss of step 1 is not that of new weights: as in the reference; without one, about ln V. "" if it
    is, and for a run that begins with another's weights."""
    if type(cfg) is not Config or cfg.train.init_from != "scratch":
        return ""
    match, _ = find(cfg, directory)
    if match is None or not match.same_data:
        return unusual_start(cfg.model, loss)
    expected, within = judge.first_band(match.reference)
    if abs(loss - expected) <= within:
        return ""
    where = f"{match.reference.n} runs of {match.reference.name}"
    return f"the first loss is {loss:.3f}, but {_range(expected, within)} in {where}: {_why(loss > expected)}"


def _why(is_high: bool) -> str:
    return "are the initial weights too large?" if is_high else "does the model see what it has to predict?"


def unusual_start(model: ModelConfig, loss: float) -> str:
    """A line if the first loss of random weights is not about ln V: nobody can predict yet. "" if it is.

    The logits of GPT-2's initial weights, N(0, 0.02) and tied, have variance C 0.02² behind the last norm, which adds
    half of that to ln V. The token that asks has a larger one, at most C 0.02 / √2, where its embedding is half of what
    the norm sees, as in a model without blocks. A text that repeats itself is lower by as much.
    """
    V, C = model.vocab_size, model.n_embd
    spread, own = C * 0.02**2, min(C * 0.02 / math.sqrt(2), 500.0)  # e^709 is the largest float
    least = math.log(V) - own - 0.2
    most = math.log(math.exp(spread / 2) + math.exp(own) / V) + math.log(V) + 0.2
    if least <= loss <= most:
        return ""
    return (
        f"the first loss is {loss:.3f}, and a model that knows nothing has about ln {V:,} = {math.log(V):.3f}: "
        f"{_why(loss > most)}"
    )


# ---- words -----------------------------------------------------------------------------------------------------------


def _beside(verdict: Verdict) -> str:
    one = verdict.match.reference
    if verdict.findings:
        return f"\n{outside(verdict)}"
    if verdict.expected is None:
        return f"; normal so far, as in {one.n} runs of {one.name}"
    return f"; normal: {_range(*verdict.expected)} in {one.n} runs of {one.name}"


def outside(verdict: Verdict) -> str:
    """One line: what left the band first, and what may be the cause."""
    one, first = verdict.match.reference, verdict.findings[0]
    cause = suspicion.of(verdict.findings, verdict.last_rate, verdict.training_off)
    return f"not normal since step {first.step}: {told(first)} in {one.n} runs of {one.name}. {cause}"


def told(one: Finding) -> str:
    if one.series == judge.RATES:
        return f"{one.series} {one.value:.3g}, but {one.expected:.3g}"
    if one.series == judge.NORM:
        low, high = one.expected * math.exp(-one.within), one.expected * math.exp(one.within)
        return f"{one.series} {one.value:.3g}, but {low:.3g} to {high:.3g}"
    return f"{one.series} {one.value:.3f}, but {_range(one.expected, one.within)}"


def _range(expected: float, within: float) -> str:
    return f"{expected - within:.3f} to {expected + within:.3f}"


def other_data(one: Reference, data: dict[str, Any]) -> str:
    """One line on data that differ from the reference's, though source and tokenizer are called the same."""
    names = {"train": "tokens to train on", "val": "to validate", "vocabulary": "the vocabulary"}
    differ = [f"{data[key]:,} {name} ({one.data[key]:,})" for key, name in names.items() if data[key] != one.data[key]]
    source = one.settings["data.source"]
    why = suspicion.of_data(data, one.data)
    why += " Each version of Python brings another text." if source == "python-docs" else ""
    return (
        f"not compared with the {one.n} runs of {one.name}: data.source={source} gave them other data, in brackets: "
        f"{', '.join(differ) or 'as many tokens, but others'}.{why}"
    )


def without_reference(cfg: Config) -> str:
    """Why a run is not compared: what differs from the reference that is nearest."""
    known = reference.known()
    if type(cfg) is not Config or not known:
        return "there is no reference of such a run"
    mine = dict(settings.items(cfg))

    def apart(one: Reference) -> list[str]:
        return [f"{key}={mine[key]} ({value})" for key, value in one.settings.items() if mine[key] != value]

    near = min(known, key=lambda one: len([word for word in apart(one) if not word.startswith("data.")]))
    differ = ", ".join(apart(near)) or "the text"
    names = ", ".join(one.name for one in known)
    return (
        f"not compared: no reference has its settings and its text. The nearest, {near.name}, differs in {differ}; "
        f"its value in brackets.\nreferences: {names}"
    )


def page(verdict: Verdict) -> str:
    """All that left the band, in words."""
    one = verdict.match.reference
    if not verdict.at:
        return "it has logged nothing yet"
    if not verdict.findings:
        where = f"normal until step {verdict.at} of {one.steps}, as {one.n} runs of {one.name}"
        if verdict.validation is None or verdict.expected is None:
            return where
        return f"{where}: validation loss {verdict.validation:.3f}, and {_range(*verdict.expected)} in them"
    series = list(dict.fromkeys(each.series for each in verdict.findings))
    lines = []
    for name in series:
        its = [each for each in verdict.findings if each.series == name]
        more = f", and {len(its) - 1} more until step {its[-1].step}" if len(its) > 1 else ""
        lines.append(f"  step {its[0].step}: {told(its[0])}{more}")
    return "\n".join([outside(verdict), *lines])


def false_alarms(one: Reference) -> list[int]:
    """Seeds of the runs that the others would call not normal: each left out in turn, as logged at every step."""
    found = []
    for i, seed in enumerate(one.seeds):
        steps = list(zip(one.evaluated.astype(int).tolist(), one.validation[i].tolist(), strict=True))
        ends = np.append(one.blocks[1:] - 1, one.steps)
        length = np.diff(np.append(one.blocks, one.steps + 1))
        left_out = judge.Measured(one.loss.runs[i], one.norm.runs[i], length, ends, steps, [])
        (expected, within), first = judge.first_band(one.without(i)), one.loss.mean[0] + one.loss.runs[i, 0]
        if judge.outside(one.without(i), left_out) or abs(first - expected) > within:
            found.append(seed)
    return found
