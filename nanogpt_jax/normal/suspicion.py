"""From what left the band, and in which direction, to what may be the cause: one line."""

from collections.abc import Sequence
from typing import Any

from nanogpt_jax.normal.judge import LOSS, NORM, RATES, VALIDATION, Finding


def of(findings: Sequence[Finding], last_rate: int, training_off: float) -> str:
    """`findings`: all of a run so far, in the order of steps, at least one. `last_rate`: the last step whose learning
    rate is known. `training_off`: by how much the training loss is above the reference's now, perhaps by chance."""
    first = {one.series: one for one in reversed(findings)}
    if RATES in first:
        return _rate([one for one in findings if one.series == RATES], last_rate)
    loss, norm, validation = (first.get(series) for series in (LOSS, NORM, VALIDATION))
    if loss and loss.step <= 2:
        return "Other initial weights, or another loss, than GPT-2's?" if loss.is_high else LEAK
    if loss and not loss.is_high:
        return LEAK
    if validation and not loss and abs(training_off) < abs(validation.value - validation.expected) / 2:
        if validation.is_high:
            return "Training is normal: is dropout left on in evaluation, or is it another validation text?"
        return "Training is normal: is the validation text part of the training text?"
    if norm and (not loss or norm.step < loss.step):
        if norm.is_high:
            times = norm.value / norm.expected
            return f"Gradients {times:.2g} times as large: a smaller batch (half of it gives up to 1.4)?"
        return "Smaller gradients: a larger batch, or another mean over the tokens?"
    if any(one.value - one.expected > MUCH for one in (loss, validation) if one):
        return "It learns far less than it should: are the targets the next tokens, and in order?"
    return "It learns less than it should: is the batch smaller, or the update too large or too small?"


def of_data(data: dict[str, Any], reference: dict[str, Any]) -> str:
    """Of `facts` of the data: "" if nothing is suspected."""
    times = data["train"] / max(reference["train"], 1)
    if data["vocabulary"] == reference["vocabulary"] and times > 1.5 and abs(times - round(times)) < 0.01:
        return f" Is the text there {round(times)} times?"
    return " Is it another tokenizer?" if data["vocabulary"] != reference["vocabulary"] else ""


MUCH = 0.25  # nats: no batch half as large costs so much
LEAK = "It predicts too well: does a position see its target (the mask), or are the targets the inputs?"


def _rate(findings: Sequence[Finding], last: int) -> str:
    ratios = [one.value / max(one.expected, 1e-12) for one in findings]
    if ratios[0] > 1.5 and (ratios[0] > 1.1 * ratios[-1] or findings[-1].step < last):  # it has come down since
        return "The learning rate starts too high: is the warm-up missing?"
    if abs(ratios[0] - 1) > 0.1 and max(ratios) < 1.1 * min(ratios):
        return f"The learning rate is {ratios[0]:.3g} times what it was there: optim.learning_rate, or its schedule?"
    return "The learning rate follows another schedule: does it fall as optim.schedule says?"
