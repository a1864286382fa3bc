"""Compares a baseline and a TST run at equal FLOPs, loss, data and time. Arithmetic only.

The validation curves are read off by linear interpolation. A gap is positive where TST is ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_tst.report.runs import Budget, FloatArray, Run

Arm = Literal["baseline", "TST"]
ARMS: tuple[Arm, Arm] = ("baseline", "TST")


@dataclass(frozen=True)
class EqualBudget:
    """Validation losses of both arms after spending the same.

    Attributes:
        budget: what is equal.
        amount: how much both arms had spent; the smaller of their totals.
        baseline_loss: nats a token; None if the arm was first evaluated after ``amount``.
        tst_loss: likewise.
        tst_in_superposition: whether TST was still in phase 1 at that point.
    """

    budget: Budget
    amount: float
    baseline_loss: float | None
    tst_loss: float | None
    tst_in_superposition: bool

    @property
    def gap(self) -> float | None:
        """Baseline loss minus TST loss, nats a token."""
        if self.baseline_loss is None or self.tst_loss is None:
            return None
        return self.baseline_loss - self.tst_loss


@dataclass(frozen=True)
class EqualLoss:
    """What each arm spent until its validation loss first reached a target.

    Attributes:
        budget: what is counted.
        target_of: the arm whose final loss is the target.
        target_loss: nats a token.
        baseline_cost: None if not reached within the run.
        tst_cost: likewise.
    """

    budget: Budget
    target_of: Arm
    target_loss: float
    baseline_cost: float | None
    tst_cost: float | None

    def cost_of(self, arm: Arm) -> float | None:
        """What this arm spent; None if it never reached the target."""
        return self.baseline_cost if arm == "baseline" else self.tst_cost

    @property
    def speed_up(self) -> float | None:
        """Baseline cost over TST cost; above 1 where TST is cheaper."""
        if self.baseline_cost is None or self.tst_cost is None:
            return None
        return self.baseline_cost / self.tst_cost


@dataclass(frozen=True)
class Comparison:
    """Two runs and everything that the report says about them."""

    baseline: Run
    tst: Run
    equal_flops: EqualBudget
    equal_data: EqualBudget
    equal_time: EqualBudget
    equal_loss: tuple[EqualLoss, ...]

    def equal_loss_for(self, target_of: Arm, budget: Budget) -> EqualLoss:
        """The equal-loss reading with this target and unit."""
        return next(e for e in self.equal_loss if e.target_of == target_of and e.budget == budget)


def compare(baseline: Run, tst: Run) -> Comparison:
    """Compares two runs.

    Raises:
        ValueError: the baseline has a superposition phase, or the TST run has none.
    """
    if baseline.schedule.config.enabled:
        raise ValueError(
            f"--baseline {baseline.folder} is a TST run (bag size "
            f"{baseline.schedule.config.bag_size}): swap the folders, or pass an ordinary run."
        )
    if not tst.schedule.config.enabled:
        raise ValueError(
            f"--tst {tst.folder} is a run without superposition (bag size 1): "
            "swap the folders, or pass a run with --tst-bag-size of 2 or more."
        )
    targets: tuple[tuple[Arm, float], ...] = (
        ("baseline", baseline.final_loss),
        ("TST", tst.final_loss),
    )
    budgets: tuple[Budget, ...] = ("equivalent tokens", "seconds")
    return Comparison(
        baseline=baseline,
        tst=tst,
        equal_flops=_equal_budget(baseline, tst, "equivalent tokens"),
        equal_data=_equal_budget(baseline, tst, "data tokens"),
        equal_time=_equal_budget(baseline, tst, "seconds"),
        equal_loss=tuple(
            EqualLoss(
                budget=budget,
                target_of=arm,
                target_loss=loss,
                baseline_cost=_cost_of(baseline, budget, loss),
                tst_cost=_cost_of(tst, budget, loss),
            )
            for arm, loss in targets
            for budget in budgets
        ),
    )


def _equal_budget(baseline: Run, tst: Run, budget: Budget) -> EqualBudget:
    amount = min(run.spent(budget, run.last_step) for run in (baseline, tst))
    return EqualBudget(
        budget=budget,
        amount=amount,
        baseline_loss=value_at(
            baseline.validation_spent(budget), baseline.validation.values, amount
        ),
        tst_loss=value_at(tst.validation_spent(budget), tst.validation.values, amount),
        tst_in_superposition=amount < tst.spent(budget, tst.schedule.switch_step),
    )


def _cost_of(run: Run, budget: Budget, loss: float) -> float | None:
    return first_reached(run.validation_spent(budget), run.validation.values, loss)


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


def settings_side_by_side(comparison: Comparison) -> list[tuple[str, Any, Any]]:
    """Rows (name, value of the baseline, value of TST) of all settings; None where one has none."""
    baseline, tst = (_flat_settings(run.info) for run in (comparison.baseline, comparison.tst))
    names = list(dict.fromkeys([*baseline, *tst]))
    return [(name, baseline.get(name), tst.get(name)) for name in names]


def unexpected_differences(comparison: Comparison) -> list[str]:
    """Names of settings outside of superposition in which the arms differ."""
    return [
        name
        for name, baseline, tst in settings_side_by_side(comparison)
        if baseline != tst and not name.startswith(("superposition.", "tst_", "switch_step"))
    ]


def _flat_settings(info: dict[str, Any]) -> dict[str, Any]:
    run_level = (
        "parameters",
        "total_steps",
        "switch_step",
        "batch_sizes",
        "sequence_length",
        "seed",
    )
    return {
        **{f"superposition.{name}": value for name, value in info["superposition"].items()},
        **{name: info[name] for name in run_level},
        **info["settings"],
    }
