"""Where a run leaves the band of a reference. The band is simultaneous: over all series and the whole run.

A run's mean over the logged steps of a block, less the reference's, has about Student's distribution when divided by

    sqrt(V/n + max(V - noise²/M, 0) + noise²/m)

V: variance between runs of the mean over the block's M steps; m: how many of them the run has logged; n: runs of the
reference. The limit is the quantile that all blocks of all series together exceed with probability ALPHA (Bonferroni).
"""

# n runs, B blocks, E evaluations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanogpt_jax.normal.reference import Reference, Series

ALPHA = 0.02  # of a false alarm, by the theory; what it is in fact is measured by leaving one out: README.md
LEAST_SD = {"loss": 0.003, "norm": 0.02, "validation": 0.003}  # another processor rounds to other digits
FIRST_ALPHA, FIRST_SD = 0.001, 0.01  # of the loss of step 1, which is one number more
NEIGHBOURS = 2  # blocks on each side, whose variances are averaged with a block's own
FEWEST = 4  # logged steps, or all of a block: gradient norms have spikes of a step or two, above all during warm-up
RATE = 0.02  # the learning rate is no random number: so much off is off
LOSS, NORM, VALIDATION, RATES = "training loss", "gradient norm", "validation loss", "learning rate"


@dataclass(frozen=True)
class Finding:
    """A number outside of the band."""

    series: str
    step: int  # the last one that it is about
    value: float
    expected: float
    within: float  # half the width of the band; of a gradient norm, of its logarithm

    @property
    def is_high(self) -> bool:
        return self.value > self.expected


@dataclass(frozen=True)
class Measured:
    """What a run has logged, beside a reference's mean curves."""

    loss: np.ndarray  # [B] mean of what is logged in a block, less the reference's curve; nan without any
    norm: np.ndarray  # [B] the same of ln of the gradient norm
    count: np.ndarray  # [B] steps logged
    last: np.ndarray  # [B] the last of them
    validation: list[tuple[int, float]]  # (step, loss)
    rates: list[tuple[int, float]]  # (step, learning rate)


def measure(reference: Reference, rows: Sequence[dict[str, Any]], until: int | None = None) -> Measured:
    """`rows` of metrics.jsonl, those after `until` left out."""
    end = min(reference.steps, until or reference.steps)
    B = len(reference.blocks)
    of = {key: points(rows, key, end) for key in ("train/loss", "grad_norm", "val/loss", "learning_rate")}

    def means(series: Series, steps: np.ndarray, values: np.ndarray) -> np.ndarray:
        block, off = block_of(reference, steps), values - curve(reference, series, steps)
        with np.errstate(invalid="ignore"):
            return np.bincount(block, off, B) / np.bincount(block, minlength=B)

    steps, norms = of["grad_norm"]
    norm = means(reference.norm, steps, np.log(np.maximum(norms, 1e-30)))
    steps, losses = of["train/loss"]
    last = np.zeros(B, int)
    np.maximum.at(last, block_of(reference, steps), steps)
    return Measured(
        means(reference.loss, steps, losses), norm, np.bincount(block_of(reference, steps), minlength=B), last,
        list(zip(*(x.tolist() for x in of["val/loss"]), strict=True)),
        list(zip(*(x.tolist() for x in of["learning_rate"]), strict=True)),
    )  # fmt: skip


def points(rows: Sequence[dict[str, Any]], key: str, until: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps, ascending, and the finite values of `key` there; both [_]."""
    found = {
        row["step"]: float(value)
        for row in rows
        if 0 < row["step"] <= until
        and isinstance(value := row.get(key), int | float)
        and abs(value) < 1e30  # no nan, and no integer beyond a float
    }
    steps = sorted(found)
    return np.array(steps, int), np.array([found[step] for step in steps], float)


def outside(reference: Reference, run: Measured) -> list[Finding]:
    """Everything outside of the band, in the order of steps."""
    found, limit = _rates(reference, run.rates), limit_of(reference)
    for name, series, off in ((LOSS, reference.loss, run.loss), (NORM, reference.norm, run.norm)):
        center, sd = series.runs.mean(0), block_sd(reference, series, run.count)
        if name == NORM:
            off = np.where(run.count >= np.minimum(_lengths(reference), FEWEST), off, np.nan)
        for b in np.flatnonzero(np.abs(off - center) > limit * sd):
            step = int(run.last[b])
            expected = float(curve(reference, series, np.array([step]))[0] + center[b])
            value, within = expected + float(off[b] - center[b]), float(limit * sd[b])
            if name == NORM:
                value, expected = math.exp(value), math.exp(expected)
            found.append(Finding(name, step, value, expected, within))
    for step, value in run.validation:
        band = validation_band(reference, step)
        if band and abs(value - band[0]) > band[1]:
            found.append(Finding(VALIDATION, step, value, *band))
    return sorted(found, key=lambda one: one.step)


def _rates(reference: Reference, rates: list[tuple[int, float]]) -> list[Finding]:
    least = reference.rates[:, 1].max() * 0.002
    found = []
    for step, value in rates:
        expected = float(np.interp(step, *reference.rates.T))
        if abs(value - expected) > (within := RATE * expected + least):
            found.append(Finding(RATES, step, value, expected, within))
    return found


# ---- the band --------------------------------------------------------------------------------------------------------


def curve(reference: Reference, series: Series, steps: np.ndarray) -> np.ndarray:
    """The mean curve at `steps` [_] -> [_]."""
    return np.interp(np.log(np.maximum(steps, 1)), reference.knots, series.mean)


def block_of(reference: Reference, steps: np.ndarray) -> np.ndarray:
    return np.searchsorted(reference.blocks, steps, side="right") - 1


def _lengths(reference: Reference) -> np.ndarray:
    """[B] steps of each block."""
    return np.diff(np.append(reference.blocks, reference.steps + 1))


def block_sd(reference: Reference, series: Series, logged: np.ndarray) -> np.ndarray:
    """Standard deviation of a new run's mean over `logged` [B] steps of each block, about the mean of n runs -> [B]."""
    n, length = len(series.runs), _lengths(reference)
    least = LEAST_SD["loss" if series is reference.loss else "norm"]
    between, noise = _smooth_variance(series.runs), series.noise**2
    logged = np.clip(logged, 1, length)
    return np.sqrt(between / n + np.maximum(between - noise / length, 0) + noise / logged + least**2)


def validation_band(reference: Reference, step: int) -> tuple[float, float] | None:
    """Expected validation loss at a step, and half the width of the band. None before the reference's first.

    Between two evaluations of the reference, it is the training loss's curve plus the difference between the two.
    """
    at, n = reference.evaluated, reference.n
    if step < at[0]:
        return None
    mean, variance = reference.validation.mean(0), _smooth_variance(reference.validation)
    variance = variance * (1 + 1 / n) + LEAST_SD["validation"] ** 2
    exact = np.flatnonzero(at == step)
    if exact.size:
        return float(mean[exact[0]]), limit_of(reference) * math.sqrt(variance[exact[0]])
    difference = mean - _smooth_curve(reference, at)
    x, knots = math.log(step), np.log(at)
    after = int(np.searchsorted(at, step))
    apart = abs(difference[min(after, len(at) - 1)] - difference[after - 1]) / 4
    single = reference.loss.noise[block_of(reference, np.array([step]))[0]] ** 2
    more = 2 * single / (n * max(0.2 * step, 1)) + apart**2
    expected = float(_smooth_curve(reference, np.array([step]))[0] + np.interp(x, knots, difference))
    return expected, limit_of(reference) * math.sqrt(np.interp(x, knots, variance) + more)


def training_band(reference: Reference, steps: np.ndarray, name: str = LOSS) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest single values [_] at `steps`, of the training loss or the gradient norm."""
    series = reference.norm if name == NORM else reference.loss
    block = block_of(reference, steps)
    off = series.runs.mean(0)[block]
    sd = block_sd(reference, series, np.ones(len(reference.blocks), int))[block]
    middle, within = curve(reference, series, steps) + off, limit_of(reference) * sd
    return (np.exp(middle - within), np.exp(middle + within)) if name == NORM else (middle - within, middle + within)


def limit_of(reference: Reference) -> float:
    """Standard deviations beyond which a number is outside: the two-sided quantile over all of them together."""
    tests = 2 * len(reference.blocks) + len(reference.evaluated)
    return student(1 - ALPHA / tests / 2, 2 * (reference.n - 1))


def student(p: float, freedom: int) -> float:
    """The p-quantile of Student's t, by Cornish and Fisher's expansion: within 2 % from 8 degrees of freedom on."""
    z, v = statistics.NormalDist().inv_cdf(p), float(freedom)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def first_band(reference: Reference) -> tuple[float, float]:
    """The loss of step 1, before any update, and half the width of its band: nothing that came before moves it, so its
    own variance is taken, and is far smaller than that of the steps behind it."""
    n, first = reference.n, reference.loss.runs[:, 0]
    sd = max(float(first.std(ddof=1)), FIRST_SD) * math.sqrt(1 + 1 / n)
    return float(reference.loss.mean[0] + first.mean()), student(1 - FIRST_ALPHA / 2, n - 1) * sd


def _smooth_variance(runs: np.ndarray) -> np.ndarray:
    """The variance between runs [n, B] of each column, or that of its neighbourhood, if it is larger -> [B].

    Few runs tell little of a variance. The neighbourhood's is a geometric mean, which one column does not rule; ln of
    a variance from n runs is 1/(n - 1) too low in the mean.
    """
    n, B = runs.shape
    own = np.maximum(runs.var(0, ddof=1), 1e-12)
    near = [np.log(own[max(b - NEIGHBOURS, 0) : b + NEIGHBOURS + 1]).mean() for b in range(B)]
    return np.maximum(own, np.exp(np.array(near) + 1 / (n - 1)))


def _smooth_curve(reference: Reference, steps: np.ndarray) -> np.ndarray:
    """The training loss's mean curve without its last ripples: the mean over the knots 10 % around each step."""
    around = np.log(np.maximum(steps, 1))[:, None] + np.linspace(-0.1, 0.1, 9)
    return np.interp(around, reference.knots, reference.loss.mean).mean(1)
