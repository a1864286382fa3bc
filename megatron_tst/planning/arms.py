"""The runs that a plan chooses between and compares, with what they cost and are worth."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_tst.common.splits import training_share
from megatron_tst.planning.accounting import Cluster, ModelSize
from megatron_tst.planning.loss_estimate import (
    LARGEST_STEP_RATIO,
    Estimate,
    LossModel,
    loss_model,
)
from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.config import LossImplementation, SuperpositionConfig
from megatron_tst.settings.losses import losses_of_run
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.settings.setting_fields import SettingError
from megatron_tst.settings.variants import FULL, OUTPUT_ONLY

ROUNDING = 1e-9
"""Relative; a budget that buys a published number of steps must not lose one of them."""

# Longest run looked at for an equal loss, in runs of the budget.
_LONGEST = 1000


class Setting(NamedTuple):
    """A bag size and the share of the steps in phase 1.

    What is published, and so what is planned, has two phases: bags of one size, then tokens.
    """

    bag_size: int
    step_ratio: float

    @property
    def text_factor(self) -> float:
        """Data tokens for each equivalent token, over both phases."""
        return 1 + self.step_ratio * (self.bag_size - 1)


@dataclass(frozen=True)
class Request:
    """What there is to spend.

    Attributes:
        size: the model.
        cluster: its GPUs.
        gpu_hours: budget.
        tokens: of text, all different, before it is split.
        max_epochs: how many times the text may be read.
        global_batch_size: sequences a step.
        sequence_length: latent positions a sequence.
        bag_size: to be used; None to have it chosen.
        step_ratio: likewise.
        several: settings with several bag sizes, to be set beside the recommendation.
        loss_impl: what computes the losses of the runs.
        split: ``--split`` of the runs, the share of training first.
    """

    size: ModelSize
    cluster: Cluster
    gpu_hours: float
    tokens: float
    max_epochs: float
    global_batch_size: int
    sequence_length: int
    bag_size: int | None = None
    step_ratio: float | None = None
    several: SuperpositionConfig | None = None
    loss_impl: LossImplementation = "auto"
    split: str = "1,0,0"

    @property
    def losses(self) -> dict[str, str]:
        """What computes the loss of bags and that of single targets, in all runs."""
        command_line = Namespace(
            tst_bag_size=self.bag_size or 2,
            tst_schedule=None,
            tst_bag_sizes=None,
            tst_loss_impl=self.loss_impl,
            cross_entropy_loss_fusion=False,
        )
        return losses_of_run(command_line, has_gpu=True, has_triton=True)

    @property
    def batch_tokens(self) -> int:
        """Equivalent tokens a step."""
        return self.global_batch_size * self.sequence_length

    @property
    def training_tokens(self) -> float:
        """Tokens of the train split, to which a run keeps."""
        return self.tokens * training_share(self.split)

    @property
    def readable_tokens(self) -> float:
        """Tokens that may be read, repeats included."""
        return self.training_tokens * self.max_epochs


@dataclass(frozen=True)
class Arm:
    """A run that could be made.

    Attributes:
        schedule: its phases.
        gpu_hours: what it takes.
        days: on all GPUs.
        cost: None without a price.
        epochs: how many times it reads the text.
        fits_text: whether it reads no more than is allowed.
        loss: final next-token loss.
    """

    schedule: SuperpositionSchedule
    gpu_hours: float
    days: float
    cost: float | None
    epochs: float
    fits_text: bool
    loss: Estimate

    @property
    def steps(self) -> int:
        """Optimizer steps of both phases."""
        return self.schedule.total_steps

    @property
    def phase_steps(self) -> tuple[int, int]:
        """Steps of phase 1, none in a baseline, and of phase 2."""
        return self.schedule.switch_step, self.steps - self.schedule.switch_step

    @property
    def step_ratio(self) -> float:
        """Share of the steps with bags, as asked for or as the steps make it; 0 in a baseline."""
        return self.schedule.config.step_ratio or self.schedule.switch_step / self.steps

    @property
    def equivalent_tokens(self) -> int:
        """Latent positions of the whole run."""
        return self.schedule.equivalent_tokens(self.steps)

    @property
    def data_tokens(self) -> int:
        """Text read in the whole run."""
        return self.schedule.data_tokens(self.steps)


class Comparison(NamedTuple):
    """A baseline and a TST run that have something in common; None for one that cannot be made."""

    name: str
    baseline: Arm | None
    tst: Arm | None


@dataclass(frozen=True)
class Arms:
    """Makes the runs of one request."""

    request: Request

    @cached_property
    def losses(self) -> LossModel:
        """Estimates for the model."""
        return loss_model(self.request.size)

    def baseline(self, steps: int) -> Arm:
        """An ordinary run."""
        config = SuperpositionConfig(loss_impl=self.request.loss_impl)
        return self._arm(config, steps, self.losses.baseline(self.tokens(steps)))

    def superposed(
        self,
        setting: Setting,
        steps: int,
        variant: str = FULL.name,
        loss: Estimate | None = None,
    ) -> Arm:
        """A run with superposition; its loss is estimated unless given."""
        config = SuperpositionConfig(
            bag_size=setting.bag_size,
            step_ratio=setting.step_ratio,
            variant=variant,
            loss_impl=self.request.loss_impl,
        )
        loss = loss or self.losses.superposed(self.tokens(steps), *setting)
        return self._arm(config, steps, loss)

    def output_only(self, setting: Setting, steps: int) -> Arm:
        """A run that superposes the output only.

        Published without numbers as better than the baseline; in our runs it is worse. So the
        estimate is the baseline's loss, and as far above it as bags on both sides may be below.
        """
        tokens = self.tokens(steps)
        full, none = self.losses.superposed(tokens, *setting), self.losses.baseline(tokens)
        low = min(full.low, none.low)
        estimate = Estimate(
            value=none.value,
            low=low,
            high=max(full.high, 2 * none.value - low),
            outside=(
                "no loss of output-only superposition is published, and whether it gains is open: "
                "anywhere in the range",
            ),
        )
        return self.superposed(setting, steps, OUTPUT_ONLY.name, estimate)

    def several_sizes(self, config: SuperpositionConfig, steps: int) -> Arm:
        """A run with several bag sizes, of which nothing is published."""
        tokens, none = self.tokens(steps), self.losses.baseline(self.tokens(steps))
        schedule = self._schedule(config, steps)
        lengths: Counter[int] = Counter()
        for phase, positions in schedule.positions_by_phase(steps):
            if phase.is_superposed:
                lengths[phase.bag_size] += positions
        ratio = schedule.switch_step / steps
        if ratio > LARGEST_STEP_RATIO:
            name = "schedule" if config.schedule else "bag_sizes"
            raise SettingError(
                f"{{{name}}} has bags in {ratio:.3g} of the steps: losses are published up to "
                "{most} (best: 0.2 to 0.4); use at most that.",
                most=LARGEST_STEP_RATIO,
            )
        each = {size: self.losses.superposed(tokens, size, ratio) for size in lengths}
        mean = sum(each[size].value * count for size, count in lengths.items())
        estimate = Estimate(
            value=mean / lengths.total(),
            low=min(found.low for found in each.values()),
            high=max(none.high, *(found.high for found in each.values())),
            outside=(
                "no loss of a run with several bag sizes is published: from that of its best size "
                "alone to the baseline's",
            ),
        )
        return self._arm(config, steps, estimate)

    def comparisons(self, tst: Arm) -> tuple[Comparison, ...]:
        """The run with superposition against baselines of equal FLOPs, loss and data."""
        setting = Setting(tst.schedule.config.bag_size, tst.step_ratio)
        baseline = self.baseline(tst.steps)
        enough = self._steps_to(tst.loss.value, None, tst.steps)
        fewer = self._steps_to(baseline.loss.value, setting, tst.steps)
        same_data = tst.data_tokens // self.request.batch_tokens
        return (
            Comparison("equal FLOPs", baseline, tst),
            Comparison(
                "equal loss: that of TST", None if enough is None else self.baseline(enough), tst
            ),
            Comparison(
                "equal loss: that of the baseline",
                baseline,
                None if fewer is None else self.superposed(setting, fewer),
            ),
            Comparison("equal data", self.baseline(same_data), tst),
        )

    def _steps_to(self, loss: float, setting: Setting | None, around: int) -> int | None:
        """Fewest steps to a loss; None if they are not within reach."""

        def too_high(steps: int) -> bool:
            tokens = self.tokens(steps)
            reached = (
                self.losses.baseline(tokens)
                if setting is None
                else self.losses.superposed(tokens, *setting)
            )
            # A run reaches its own loss in its own steps, whatever the rounding.
            return reached.value > loss + 1e-12

        low, high = 0, around * _LONGEST
        if too_high(high):
            return None
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if too_high(middle) else (low, middle)
        return high

    def _schedule(self, config: SuperpositionConfig, steps: int) -> SuperpositionSchedule:
        return SuperpositionSchedule(
            config,
            total_steps=steps,
            batch_sizes=BatchSizes.constant(self.request.global_batch_size),
            sequence_length=self.request.sequence_length,
        )

    def _arm(self, config: SuperpositionConfig, steps: int, loss: Estimate) -> Arm:
        schedule = self._schedule(config, steps)
        cluster, hours = self.request.cluster, self.hours(steps)
        text = schedule.data_tokens(steps)
        return Arm(
            schedule=schedule,
            gpu_hours=hours,
            days=hours / cluster.gpus / 24,
            cost=cluster.cost(hours),
            epochs=text / self.request.training_tokens,
            fits_text=text <= self.request.readable_tokens * (1 + ROUNDING),
            loss=loss,
        )

    def tokens(self, steps: int) -> int:
        """Equivalent tokens of steps."""
        return steps * self.request.batch_tokens

    def hours(self, steps: int) -> float:
        """GPU-hours of steps."""
        return self.request.cluster.gpu_hours(self.tokens(steps))
