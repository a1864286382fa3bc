"""Recommends how to spend a budget: superposition or not, s, r and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_tst.common.errors import UsageError
from megatron_tst.planning.arms import ROUNDING, Arm, Arms, Comparison, Request, Setting
from megatron_tst.planning.evidence import EQUAL_DATA
from megatron_tst.planning.loss_estimate import SCATTER
from megatron_tst.planning.published import PublishedModel

Limit = Literal["compute-bound", "data-bound"]

MINIMUM_STEPS = 1000
"""Shortest run that is planned: a twentieth of the shortest published one."""

_RATIO_STEP = 0.05


@dataclass(frozen=True)
class Plan:
    """The recommendation.

    Attributes:
        request: what was asked for.
        reference: the published model behind the estimates.
        limit: what limits the run.
        reason: why that is so.
        recommended: the run to make.
        alternatives: other runs with what speaks for them.
        tst: the run with superposition that is compared: the recommended one, or else one that
            the text suffices for.
        with_ample_text: the run with superposition that the budget buys if text is no object.
        comparisons: of ``tst`` at equal FLOPs, equal loss, equal data.
    """

    request: Request
    reference: PublishedModel
    limit: Limit
    reason: str
    recommended: Arm
    alternatives: tuple[tuple[str, Arm], ...]
    tst: Arm
    with_ample_text: Arm
    comparisons: tuple[Comparison, ...]


def make_plan(request: Request) -> Plan:
    """Recommends a run.

    Superposition buys a lower loss with text, so it is recommended only where the text, read once,
    is more than a baseline of the whole budget reads; then with all steps that the budget buys.

    Raises:
        UsageError: budget or text are too small, or a given setting cannot be used.
    """
    return _Planner(request).plan()


@dataclass(frozen=True)
class _Planner:
    request: Request

    @cached_property
    def arms(self) -> Arms:
        return Arms(self.request)

    @cached_property
    def budget_steps(self) -> int:
        """Steps that the budget buys."""
        tokens = self.request.cluster.equivalent_tokens(self.request.gpu_hours)
        steps = math.floor(tokens / self.request.batch_tokens * (1 + ROUNDING))
        if steps < MINIMUM_STEPS:
            raise UsageError(
                f"--gpu-hours {self.request.gpu_hours:.4g} (or --currency) buys {steps} steps of "
                f"{self.request.batch_tokens} tokens: raise the budget to at least "
                f"{self.arms.hours(MINIMUM_STEPS):.4g} GPU-hours ({MINIMUM_STEPS} steps), or lower "
                "--global-batch-size."
            )
        return steps

    @cached_property
    def text_steps(self) -> int:
        """Steps of an ordinary run that reads all the text."""
        steps = math.floor(self.request.readable_tokens / self.request.batch_tokens)
        if steps < MINIMUM_STEPS:
            raise UsageError(
                f"--tokens {self.request.tokens:.4g} lasts for {steps} steps of "
                f"{self.request.batch_tokens} tokens: get data for at least {MINIMUM_STEPS} steps, "
                "raise --max-epochs, or lower --global-batch-size."
            )
        return steps

    def plan(self) -> Plan:
        """The recommendation."""
        fitting = [setting for setting in self.candidates if self._fits(setting)]
        mildest = min(setting.text_factor for setting in self._usual_candidates())
        text_share = self.request.training_tokens / (self.budget_steps * self.request.batch_tokens)
        if text_share < mildest or not fitting:
            return self._data_bound(text_share, mildest)
        chosen = self._best(fitting, self.budget_steps)
        tst = self.arms.superposed(chosen, self.budget_steps)
        baseline = self.arms.baseline(self.budget_steps)
        if tst.loss.value >= baseline.loss.value:
            recommended, reason = baseline, "the setting asked for is not expected to gain"
        else:
            recommended, reason = tst, "superposition turns the tokens left over into a lower loss"
        return self._plan(
            "compute-bound",
            f"the budget trains on {1 / text_share:.0%} of the tokens once: {reason}",
            recommended,
            self._alternatives(fitting, tst),
            tst,
        )

    def _data_bound(self, text_share: float, mildest: float) -> Plan:
        best, steps = self._wanted, min(self.budget_steps, self.text_steps)
        if text_share < mildest:
            reason = (
                f"the tokens, read once, are {text_share:.2f} times what a baseline of this budget "
                f"reads, and the mildest recommended setting reads {mildest:.2f} times as much; "
                f"{EQUAL_DATA}, so bags are not recommended"
            )
        else:
            least = min(setting.text_factor for setting in self.candidates)
            readable = self.request.readable_tokens / self.arms.tokens(self.budget_steps)
            reason = (
                f"the setting asked for reads at least {least:.2f} times the tokens of a baseline, "
                f"and there is {readable:.2f} times as much, with the epochs allowed: lower s or r"
            )
        # The text suffices for this run, so that the comparison could be made.
        tst_steps = min(steps, math.floor(self.text_steps / best.text_factor))
        # The length of phase 1 is rounded to steps, each of which reads a whole bag a position.
        while not self.arms.superposed(best, tst_steps).fits_text:
            tst_steps -= 1
        return self._plan(
            "data-bound",
            reason,
            self.arms.baseline(steps),
            (
                (
                    "output only: no extra tokens, no gain shown",
                    self.arms.output_only(best, steps),
                ),
            ),
            self.arms.superposed(best, tst_steps),
        )

    def _plan(
        self,
        limit: Limit,
        reason: str,
        recommended: Arm,
        alternatives: tuple[tuple[str, Arm], ...],
        tst: Arm,
    ) -> Plan:
        return Plan(
            self.request,
            self.arms.losses.reference,
            limit,
            reason,
            recommended,
            (*alternatives, *self._several()),
            tst,
            self.arms.superposed(self._wanted, self.budget_steps),
            self.arms.comparisons(tst),
        )

    def _several(self) -> list[tuple[str, Arm]]:
        config = self.request.several
        if config is None:
            return []
        arm = self.arms.several_sizes(config, self.budget_steps)
        return [("the sizes asked for", arm)]

    @cached_property
    def _wanted(self) -> Setting:
        """The setting to choose if text is no object."""
        return self._best(self.candidates, self.budget_steps)

    @cached_property
    def candidates(self) -> list[Setting]:
        """Settings to choose from: the given ones, or else those of the published range."""
        ratio = self.request.step_ratio
        if self.request.bag_size is not None:
            self._check_bag_size(self.request.bag_size)
        settings = (
            Setting(
                self.request.bag_size or setting.bag_size,
                setting.step_ratio if ratio is None else ratio,
            )
            for setting in self._usual_candidates()
        )
        return list(dict.fromkeys(settings))

    def _usual_candidates(self) -> list[Setting]:
        reference = self.arms.losses.reference
        largest = reference.bag_sizes[1]
        if reference.has_grid:
            largest = min(table.grid.largest_bag_size for table in self.arms.losses.tables)
        low, high = (round(ratio / _RATIO_STEP) for ratio in reference.step_ratios)
        return [
            Setting(bag_size, round(i * _RATIO_STEP, 2))
            for bag_size in range(2, largest + 1)
            for i in range(low, high + 1)
        ]

    def _check_bag_size(self, bag_size: int) -> None:
        most = 32
        if not 2 <= bag_size <= most:
            raise UsageError(
                f"--tst-bag-size is {bag_size}: pass 2 to {most} (published: up to 16), or leave "
                "it out to have it chosen."
            )

    def _fits(self, setting: Setting) -> bool:
        return self.arms.superposed(setting, self.budget_steps).fits_text

    def _best(self, settings: list[Setting], steps: int) -> Setting:
        """Lowest loss; of equal ones the least text."""
        tokens = self.arms.tokens(steps)
        return min(
            settings,
            key=lambda setting: (
                self.arms.losses.superposed(tokens, *setting).value,
                setting.text_factor,
            ),
        )

    def _alternatives(self, fitting: list[Setting], tst: Arm) -> tuple[tuple[str, Arm], ...]:
        """The setting that reads the least text of those that cannot be told from the best."""
        close = [
            arm
            for arm in (self.arms.superposed(setting, self.budget_steps) for setting in fitting)
            if arm.loss.value < tst.loss.value + SCATTER
            and arm.data_tokens < tst.data_tokens
            # Not where only the recommended setting was trained.
            and set(arm.loss.outside) <= set(tst.loss.outside)
        ]
        if not close:
            return ()
        least = min(close, key=lambda arm: arm.data_tokens)
        return ((f"fewer tokens, a loss within {SCATTER} of the best", least),)
