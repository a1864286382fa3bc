"""Reads the validation curve of a run between its validations, where these are close enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_tst.report.compared_settings import decay_share
from megatron_tst.report.curves import first_reached, value_at
from megatron_tst.report.events import FloatArray
from megatron_tst.report.results import RunResult
from megatron_tst.report.runs import Budget

# A curve is read between validations no further apart than this share of the run's length,
_DENSE = 0.1
# and than this share of a decay, in which a straight line would take the place of the whole drop.
_DENSE_IN_DECAY = 0.5
# More than that by a step they may be: a study rounds the distance of its validations up.
_ROUNDING_STEPS = 1
# This close to a validation, as a share of the length, it is read whatever lies between.
_AT_VALIDATION = 0.01


@dataclass(frozen=True)
class Reached:
    """Where a curve comes down to something.

    Attributes:
        at: interpolated; None where the validations around it are too far apart to tell.
        low: the validation before it; the start of what was looked at if there is none.
        high: the first validation behind it.
    """

    at: float | None
    low: float
    high: float


def decay_begin(run: RunResult) -> float | None:
    """The step at which the learning rate begins to fall at the end; None where that is unknown."""
    share = decay_share(run.settings)
    return None if share is None else (run.schedule_share - share) * run.total_steps


def is_dense(run: RunResult, low: float, high: float, length: int | None = None) -> bool:
    """Whether a curve can be read between two neighbouring validations.

    Args:
        run: which was evaluated.
        low: step of the one.
        high: step of the other.
        length: what the distance is measured by, in steps; that of the run by default.
    """
    begin = decay_begin(run)
    share = decay_share(run.settings)
    if begin is not None and share is not None:
        in_decay = high - max(low, begin)
        if in_decay > _DENSE_IN_DECAY * share * run.total_steps + _ROUNDING_STEPS:
            return False
    return high - low <= _DENSE * (length or run.total_steps) + _ROUNDING_STEPS


def loss_at(run: RunResult, budget: Budget, amount: float) -> float | None:
    """Validation loss after spending some amount; None where it was not evaluated near it."""
    spent = run.spent(budget)
    loss = value_at(spent, run.validation_loss, amount)
    if loss is None:
        return None
    step = float(np.interp(amount, spent, run.steps))
    if np.abs(run.steps - step).min() <= _AT_VALIDATION * run.total_steps:
        return loss
    behind = int(np.searchsorted(run.steps, step))
    return loss if is_dense(run, run.steps[behind - 1], run.steps[behind]) else None


def loss_after(run: RunResult, step: int) -> float | None:
    """Validation loss after a step; None where that is neither a validation nor close between two.

    Stricter than :func:`loss_at`: what the sign of a small difference of two curves decides is not
    to be read off a line across a decay, however near to its end.
    """
    behind = int(np.searchsorted(run.steps, step))
    if behind < run.steps.size and run.steps[behind] == step:
        return float(run.validation_loss[behind])
    if not 0 < behind < run.steps.size:
        return None
    if not is_dense(run, run.steps[behind - 1], run.steps[behind]):
        return None
    return float(np.interp(step, run.steps, run.validation_loss))


def loss_reached(
    run: RunResult, spent: FloatArray, target: float, length: int | None = None
) -> Reached | None:
    """Where the validation loss first comes down to a target; None if it never does.

    Args:
        run: which was evaluated.
        spent: at its validations, ascending, [n]; what the answer is in.
        target: nats a token.
        length: see :func:`is_dense`.
    """
    at = first_reached(spent, run.validation_loss, target)
    if at is None:
        return None
    behind = int(np.flatnonzero(run.validation_loss <= target)[0])
    low = (float(run.steps[behind - 1]), float(spent[behind - 1])) if behind else (0.0, 0.0)
    # On a validation nothing is interpolated.
    is_exact = behind > 0 and run.validation_loss[behind] == target
    is_told = is_exact or is_dense(run, low[0], float(run.steps[behind]), length)
    return Reached(at if is_told else None, low[1], float(spent[behind]))
