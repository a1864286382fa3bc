"""Gaps, ratios and amounts as people read them."""

from __future__ import annotations

from math import exp

from megatron_tst.common.units import MINUS, PLUS_MINUS, TIMES, duration, quantity
from megatron_tst.report.runs import Budget
from megatron_tst.report.statistics import Estimate


def amount(budget: Budget, value: float) -> str:
    """An amount spent, with its unit."""
    return duration(value) if budget == "seconds" else f"{quantity(value)} {budget}"


def signed(value: float) -> str:
    """A gap in nats with its sign."""
    return f"{value:+.3f}".replace("-", MINUS)


def perplexity_change(gap: float) -> str:
    """What a gap in nats (positive where TST is ahead) does to the perplexity."""
    ratio = exp(-gap)
    if ratio > 2:
        return f"{ratio:.3g}{TIMES} the"
    return f"{abs(ratio - 1):.1%} {'lower' if ratio < 1 else 'higher'}"


def gap_text(found: Estimate, digits: int = 3) -> str:
    """A gap with what seeds say about it: +0.100 +/- 0.020 nats (3 seeds)."""
    mean = f"{found.mean:+.{digits}f}".replace("-", MINUS)
    if found.half_width is None:
        return mean
    return f"{mean} {PLUS_MINUS} {found.half_width:.{digits}f}"


def ratio_text(found: Estimate) -> str:
    """A ratio with its interval."""
    mean = f"{found.mean:.2f}{TIMES}"
    if found.low is None or found.high is None:
        return mean
    return f"{mean} ({found.low:.2f} to {found.high:.2f})"


def loss_text(found: Estimate, digits: int = 4) -> str:
    """A mean loss with half its interval."""
    if found.half_width is None:
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} {PLUS_MINUS} {found.half_width:.{digits}f}"


def seeds(count: int) -> str:
    """A number of seeds."""
    return "1 seed" if count == 1 else f"{count} seeds"
