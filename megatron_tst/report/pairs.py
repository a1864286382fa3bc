"""Reads two runs of one seed against each other: at equal FLOPs, loss, data and time.

A gap is the baseline's loss minus that of TST: positive where TST is ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from megatron_tst.report.describing import in_last_phase
from megatron_tst.report.events import FloatArray
from megatron_tst.report.readings import Reached, is_dense, loss_after, loss_at, loss_reached
from megatron_tst.report.results import RunResult
from megatron_tst.report.runs import Budget

Arm = Literal["baseline", "TST"]
ARMS: tuple[Arm, Arm] = ("baseline", "TST")
# Logged training losses averaged on each side of the switch.
_AROUND_SWITCH = 3


@dataclass(frozen=True)
class EqualBudget:
    """Validation losses of both arms after spending the same.

    Attributes:
        budget: what is equal.
        amount: how much both arms had spent; the smaller of their totals.
        baseline_loss: nats a token; None if the arm was not evaluated near ``amount``.
        tst_loss: likewise.
        tst_in_superposition: whether TST still read bags at that point.
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
        baseline: what the baseline spent; None if not reached within the run.
        tst: likewise.
    """

    budget: Budget
    target_of: Arm
    target_loss: float
    baseline: Reached | None
    tst: Reached | None

    def reached_by(self, arm: Arm) -> Reached | None:
        """What this arm spent; None if it never reached the target."""
        return self.baseline if arm == "baseline" else self.tst

    def cost_of(self, arm: Arm) -> float | None:
        """The same as a number; None too if the arm was evaluated too seldom to tell."""
        reached = self.reached_by(arm)
        return None if reached is None else reached.at

    @property
    def speed_up(self) -> float | None:
        """Baseline cost over TST cost; above 1 where TST is cheaper."""
        baseline, tst = map(self.cost_of, ARMS)
        return None if baseline is None or tst is None else baseline / tst


@dataclass(frozen=True)
class Switch:
    """What happens at the switch from bags to tokens.

    Attributes:
        jump: rise of the training loss, nats; a change of quantity, not of the model. None if one
            side was not logged.
        crossing: steps after the switch until the validation loss is at or under the baseline's of
            the same step, and stays there; None if that does not happen within the run, or cannot
            be told. A touch that is lost again is none.
        is_read: whether both validation curves can be read at one step behind the switch.
    """

    jump: float | None
    crossing: Reached | None
    is_read: bool


@dataclass(frozen=True, eq=False)
class Pair:
    """A baseline and a TST run of one seed."""

    baseline: RunResult
    tst: RunResult

    @property
    def gap(self) -> float | None:
        """Final loss of the baseline minus that of TST, nats a token.

        Where one was stopped before, both are read there; None if the other was not evaluated near.
        """
        return self.equal_budget("equivalent tokens").gap

    def equal_budget(self, budget: Budget) -> EqualBudget:
        """Both validation curves where the cheaper run ends."""
        spent = [run.spent(budget) for run in (self.baseline, self.tst)]
        amount = float(min(spent[0][-1], spent[1][-1]))
        return EqualBudget(
            budget=budget,
            amount=amount,
            baseline_loss=loss_at(self.baseline, budget, amount),
            tst_loss=loss_at(self.tst, budget, amount),
            # What has done exactly its last step of bags is no ordinary model yet.
            tst_in_superposition=amount <= self.spent_at_switches(budget)[-1],
        )

    def spent_at_switches(self, budget: Budget) -> list[float]:
        """What TST had spent at each switch, at the mean pace of the phase before it."""
        spent, steps, found = self.tst.spent(budget), self.tst.steps, [0.0]
        for begin, end in pairwise(phase.first_step for phase in self.tst.phases):
            before = found[-1]
            # The last validation of the phase; without one the first behind it.
            last = max(int(np.searchsorted(steps, end, side="right")) - 1, 0)
            if steps[last] <= begin:
                last = min(last + 1, len(steps) - 1)
            if steps[last] <= begin:
                # It was stopped before: the pace of all that it did.
                begin, before = 0, 0.0
            new = (spent[last] - before) * (end - begin) / (steps[last] - begin)
            found.append(float(before + new))
        return found[1:]

    def equal_loss(self, budget: Budget, target_of: Arm) -> EqualLoss:
        """Both validation curves where they first reach the final loss of one arm."""
        target = (self.baseline if target_of == "baseline" else self.tst).final_loss
        reached = [
            loss_reached(run, run.spent(budget), target) for run in (self.baseline, self.tst)
        ]
        return EqualLoss(budget, target_of, target, *reached)

    def speed_up_off_curve(self, budget: Budget) -> float | None:
        """How much sooner TST reached the final loss of whichever arm ended higher."""
        ended_higher: Arm = "TST"
        if self.baseline.final_loss >= self.tst.final_loss:
            ended_higher = "baseline"
        return self.equal_loss(budget, ended_higher).speed_up

    def switch(self) -> Switch:
        """The jump of the training loss and the crossing of the validation curves."""
        return Switch(self._jump(), self._crossing(), bool(self._excess()[0].size))

    def _jump(self) -> float | None:
        is_after = in_last_phase(self.tst.phases, self.tst.training_steps)
        before, after = self.tst.training_loss[~is_after], self.tst.training_loss[is_after]
        if not (before.size and after.size):
            return None
        return float(after[:_AROUND_SWITCH].mean() - before[-_AROUND_SWITCH:].mean())

    def _crossing(self) -> Reached | None:
        switch = float(self.tst.switch_step)
        steps, excess = self._excess()
        above = np.flatnonzero(excess > 0)
        behind = int(above[-1]) + 1 if above.size else 0
        if behind == len(steps):
            return None
        low, at = switch, steps[behind]
        if behind:
            low, before, after = steps[behind - 1], excess[behind - 1], excess[behind]
            at = low + before / (before - after) * (at - low)
        runs = (self.baseline, self.tst)
        around = [self._validations_around(run, low, steps[behind]) for run in runs]
        is_told = all(is_dense(run, *ends) for run, ends in zip(runs, around, strict=True))
        begins, ends = zip(*around, strict=True)
        return Reached(
            float(at - switch) if is_told else None, min(begins) - switch, max(ends) - switch
        )

    def _excess(self) -> tuple[FloatArray, FloatArray]:
        """Steps behind the switch at which both curves can be read, ascending; TST's loss minus
        the baseline's there, nats a token."""
        ordinary = self.tst.steps[in_last_phase(self.tst.phases, self.tst.steps)]
        steps = np.union1d(self.baseline.steps, ordinary)
        # Before its first validation as an ordinary model TST's curve is that of bags.
        steps = steps[steps >= ordinary[0]] if ordinary.size else steps[:0]
        found = [
            (step, tst - baseline)
            for step in map(int, steps)
            if (tst := loss_after(self.tst, step)) is not None
            and (baseline := loss_after(self.baseline, step)) is not None
        ]
        return np.array([step for step, _ in found], float), np.array([gap for _, gap in found])

    def _validations_around(self, run: RunResult, low: float, high: float) -> tuple[float, float]:
        """The validations of a run that enclose two steps, none before the switch."""
        before, after = run.steps[run.steps <= low], run.steps[run.steps >= high]
        since = max(float(before[-1]), float(self.tst.switch_step)) if before.size else low
        return since, float(after[0])
