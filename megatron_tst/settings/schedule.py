"""When a run switches from bags to tokens, and how much text it has read: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.phases import Bags, Phase, lay_out, phase_at, phase_of_sample
from megatron_tst.settings.setting_fields import SettingError
from megatron_tst.settings.size_schedule import lay_out_sizes
from megatron_tst.settings.variants import VARIANTS


@dataclass(frozen=True)
class SuperpositionSchedule:
    """The phases of a run.

    Attributes:
        config: superposition settings; those with several bag sizes become ``bags``, and keep the
            largest size and the steps of all.
        total_steps: optimizer steps of the whole run (N).
        batch_sizes: sequences a step.
        sequence_length: latent positions a sequence (l), the same in all phases.
        text_share: share of the places in bags that hold text; below 1 where documents are
            aligned, whose last bags are filled up with padding.
        bags: where there are several phases with bags, the bag size and the steps of each. The
            settings then have the largest bag size, and the steps of all of them.

    Raises:
        UsageError: the switch falls on step 0 or on the last step, or bags do not go with the
            settings.
    """

    config: SuperpositionConfig
    total_steps: int
    batch_sizes: BatchSizes
    sequence_length: int
    text_share: float = 1.0
    bags: Bags = ()

    def __post_init__(self) -> None:
        if self.config.schedule is not None:
            self._take_sizes(self.config.schedule)
        if self.bags:
            self._check_bags()
        if not self.config.enabled:
            return
        name = "step_ratio" if self.config.steps is None else "steps"
        values = {"length": getattr(self.config, name), "total": self.total_steps}
        if self._length_of_bags < 1:
            raise SettingError(
                f"{{{name}:{{length}}}} of {{total}} steps puts the switch at step 0: "
                "raise it, lengthen the run, or use {bag_size:1}.",
                **values,
            )
        if self._length_of_bags >= self.total_steps:
            raise SettingError(
                f"{{{name}:{{length}}}} of {{total}} steps leaves no step for phase 2, which turns "
                "the weights into an ordinary model: lower it or lengthen the run.",
                **values,
            )

    def _take_sizes(self, text: str) -> None:
        bags = lay_out_sizes(text, self.total_steps)
        length = sum(steps for _, steps in bags)
        if length >= self.total_steps:
            raise SettingError(
                "{schedule:{text}} of {total} steps leaves no step for the last phase, which turns "
                "the weights into an ordinary model: lower it or lengthen the run.",
                text=text,
                total=self.total_steps,
            )
        object.__setattr__(self, "config", self.config.resolved(length))
        object.__setattr__(self, "bags", bags if len(bags) > 1 else ())

    def _check_bags(self) -> None:
        sizes, steps = zip(*self.bags, strict=True)
        largest, length = self.config.bag_size, self._length_of_bags
        if min(sizes) < 2 or min(steps) < 1 or (max(sizes), sum(steps)) != (largest, length):
            raise UsageError(
                f"bags are {self.bags}: pass bag sizes of 2 and more, the largest {largest}, and "
                f"{length} steps in all, 1 or more for each, as the settings have it."
            )

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """In the order of their steps; the first begins at step 0."""
        config, length = self.config, self._length_of_bags
        bags = self.bags or (((config.bag_size, length),) if length else ())
        variant = VARIANTS[config.variant]
        return lay_out(bags, variant, config.aligns_documents, self.batch_sizes.samples_at)

    @property
    def _length_of_bags(self) -> int:
        if not self.config.enabled:
            return 0
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.step_ratio is not None
        return round(self.config.step_ratio * self.total_steps)

    @property
    def switch_step(self) -> int:
        """First step of the last phase; 0 when superposition is off."""
        return self.phases[-1].first_step

    def phase_at(self, step: int) -> Phase:
        """Phase of the optimizer step with this zero-based index."""
        return phase_at(self.phases, step)

    def phase_of_sample(self, sample: int) -> Phase:
        """Phase of the sample with this zero-based index."""
        return self.phases[phase_of_sample(self.phases, sample)]

    def begins_phase(self, step: int) -> bool:
        """Whether a phase ends before the step with this index."""
        return any(phase.first_step == step for phase in self.phases[1:])

    def bag_size_at(self, step: int) -> int:
        """Tokens that share a latent position, on the side that the variant superposes."""
        return self.phase_at(step).bag_size

    def equivalent_tokens(self, step: int) -> int:
        """Latent positions processed by the first ``step`` steps; FLOPs are proportional to it."""
        return self.batch_sizes.samples_at(step) * self.sequence_length

    def positions_by_phase(self, step: int) -> list[tuple[Phase, int]]:
        """Each phase with its latent positions among the first ``step`` steps."""
        ends = [phase.first_step for phase in self.phases[1:]] + [step]
        return [
            (
                phase,
                max(
                    self.equivalent_tokens(min(end, step))
                    - self.equivalent_tokens(min(phase.first_step, step)),
                    0,
                ),
            )
            for phase, end in zip(self.phases, ends, strict=True)
        ]

    def data_tokens(self, step: int) -> int:
        """Tokens of text read by the first ``step`` steps."""
        total = 0
        for phase, positions in self.positions_by_phase(step):
            places = positions * phase.tokens_per_position
            # Exact without padding, however many tokens there are.
            is_full = not phase.is_superposed or self.text_share == 1.0
            total += places if is_full else round(places * self.text_share)
        return total
