"""Reads values off linearly interpolated curves."""

from __future__ import annotations

import numpy as np

from megatron_tst.report.events import FloatArray


def value_at(x: FloatArray, y: FloatArray, at: float) -> float | None:
    """Linear interpolation of a curve; None outside of it.

    Args:
        x: [n], ascending.
        y: [n].
        at: where to read the curve.
    """
    if not x[0] <= at <= x[-1]:
        return None
    return float(np.interp(at, x, y))


def first_reached(x: FloatArray, y: FloatArray, target: float) -> float | None:
    """Where a linearly interpolated curve first comes down to ``target``; None if it never does.

    Args:
        x: [n], ascending.
        y: [n].
        target: value to reach; a curve that starts at or below it reaches it at ``x[0]``.
    """
    below = np.flatnonzero(y <= target)
    if below.size == 0:
        return None
    i = int(below[0])
    if i == 0:
        return float(x[0])
    fraction = (y[i - 1] - target) / (y[i - 1] - y[i])
    return float(x[i - 1] + fraction * (x[i] - x[i - 1]))
