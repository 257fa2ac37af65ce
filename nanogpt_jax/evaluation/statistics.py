"""Means with standard errors, and differences of two models on the same text or items.

Sums are exactly rounded (`math.fsum`), so that no figure depends on their order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST = 32  # stretches of a text: long ones avoid bias, many give precision (Schmeiser 1982), here 13 %


def number_format(value: float, decimals: int) -> str:
    """How a figure and its error are printed: with `decimals` below 100, else with at most 6 significant digits.

    A loss of 700 nats is a perplexity of 1e304, which has 305 digits.
    """
    return f".{decimals}f" if abs(value) < 100 else ".6g"


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, or None if there are fewer than two values."""

    value: float
    error: float | None

    def scaled(self, by: float) -> "Estimate":
        return Estimate(self.value * by, None if self.error is None else self.error * abs(by))

    @property
    def errors(self) -> float:
        """The distance of the value from 0, in standard errors."""
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
    """The starts of the stretches from which a text's error is estimated, whole windows each: [n] int64, at most MOST.

    Losses of neighbouring tokens are correlated, and so are those of neighbouring short windows, because a hard page
    makes many of them hard. Treating short windows as independent would underestimate the error, threefold on the
    default run.
    """
    windows = -(-n_tokens // block_size)
    return np.arange(0, n_tokens, block_size * -(-windows // MOST))


def sums_between(nats: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The sum of nats [N] from each start to the next: [n] float64."""
    return np.array([math.fsum(part.tolist()) for part in np.split(nats, starts[1:])])
