"""How sure a figure is: means with standard errors, and differences of two models on the same text or items.

Sums are exactly rounded (`math.fsum`), so no figure depends on an order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST = 32  # stretches of a text: long ones tell the truth, many tell it exactly (Schmeiser 1982); to 13 % here


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; None where fewer than two values were to be had."""

    value: float
    error: float | None

    def scaled(self, by: float) -> "Estimate":
        return Estimate(self.value * by, None if self.error is None else self.error * abs(by))

    @property
    def errors(self) -> float:
        """How many standard errors the value is away from 0."""
        if self.value == 0 or self.error is None:
            return 0.0
        return abs(self.value) / self.error if self.error else math.inf


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of independent values [n] and its standard error, √(Σ(x - mean)² / (n - 1) / n)."""
    xs = np.asarray(values, np.float64).tolist()
    n, value = len(xs), math.fsum(xs) / len(xs)
    if n < 2:
        return Estimate(value, None)
    return Estimate(value, math.sqrt(math.fsum((x - value) ** 2 for x in xs) / (n - 1)) / math.sqrt(n))


def ratio(sums: np.ndarray, weights: np.ndarray) -> Estimate:
    """Σ sums / Σ weights of n independent stretches of a text, both [n]: nats a token, or nats a byte.

    The error is a ratio's: √(n / (n - 1) · Σ(s - ratio·w)²) / Σw (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    n, total = len(sums), math.fsum(weights.tolist())
    value = math.fsum(sums.tolist()) / total
    if n < 2:
        return Estimate(value, None)
    squares = math.fsum((float(s) - value * float(w)) ** 2 for s, w in zip(sums, weights, strict=True))
    return Estimate(value, math.sqrt(n / (n - 1) * squares) / total)


def stretches(n_tokens: int, block_size: int) -> np.ndarray:
    """Where the stretches of a text begin over which its error is taken, whole windows each: [n] int64, at most MOST.

    Neighbouring tokens resemble each other, and so do neighbouring windows where these are short: a hard page is hard
    for long. Measured on the default run, windows of 64 would give a third of the error that stretches of 4096 give.
    """
    windows = -(-n_tokens // block_size)
    return np.arange(0, n_tokens, block_size * -(-windows // MOST))


def sums_between(nats: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """nats [N] summed from each start to the next: [n] float64."""
    return np.array([math.fsum(part.tolist()) for part in np.split(nats, starts[1:])])
