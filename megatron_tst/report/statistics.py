"""Means over seeds and their 95% intervals (Student's t)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import atan, cos, exp, log, pi, sin, sqrt


@dataclass(frozen=True)
class Estimate:
    """A mean and what is known about it.

    Attributes:
        mean: of the values; of their logarithms, taken back, for a ratio.
        low: lower end of the 95% interval; None for one value.
        high: upper end.
        standard_error: of the mean, None for one value and for a ratio.
        n: number of values.
    """

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None
    n: int

    def excludes(self, value: float) -> bool:
        """Whether the interval leaves out ``value``; an estimate without one leaves out nothing."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high

    @property
    def half_width(self) -> float | None:
        """Half of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


FEWEST_SEEDS = 3
"""With fewer nothing is decided: the interval of two seeds is 13 standard errors wide."""


def is_decided(gap: Estimate) -> bool:
    """Whether a gap has enough seeds, and an interval that leaves out zero."""
    return gap.n >= FEWEST_SEEDS and gap.excludes(0.0)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% t-interval of at least one value."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return Estimate(mean, None, None, None, 1)
    error = sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    reach = t_quantile(n - 1) * error
    return Estimate(mean, mean - reach, mean + reach, error, n)


def estimate_ratio(ratios: Sequence[float]) -> Estimate:
    """Geometric mean of positive ratios, with the interval of their logarithms."""
    found = estimate([log(ratio) for ratio in ratios])
    low, high = (None if end is None else exp(end) for end in (found.low, found.high))
    return Estimate(exp(found.mean), low, high, None, found.n)


@cache
def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """The t that ``confidence`` of Student's distribution lies within, on both sides of zero.

    By bisection, which a mean over a few seeds can afford.
    """
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if t_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """Probability that T lies within ``t`` of zero, for whole degrees of freedom: finite sums.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = atan(t / sqrt(degrees))
    is_odd = degrees % 2 == 1
    term = cos(angle) if is_odd else 1.0
    total = 0.0
    for k in range(degrees // 2):
        total += term
        step = 2 * k + 2 if is_odd else 2 * k + 1
        term *= cos(angle) ** 2 * step / (step + 1)
    return 2 / pi * (angle + sin(angle) * total) if is_odd else sin(angle) * total
