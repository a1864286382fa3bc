"""When a run switches from bags to tokens, and how much text it has read: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_tst.batch_sizes import BatchSizes
from megatron_tst.config import SuperpositionConfig
from megatron_tst.setting_fields import SettingError

Phase = Literal["superposition", "recovery"]


@dataclass(frozen=True)
class SuperpositionSchedule:
    """The two phases of a run.

    Attributes:
        config: superposition settings.
        total_steps: optimizer steps of the whole run (N).
        batch_sizes: sequences a step.
        sequence_length: latent positions a sequence (l), the same in both phases.
        text_share: share of the places in the bags of phase 1 that hold text; below 1 where
            documents are aligned, whose last bags are filled up with padding.

    Raises:
        ValueError: the switch falls on step 0 or on the last step.
    """

    config: SuperpositionConfig
    total_steps: int
    batch_sizes: BatchSizes
    sequence_length: int
    text_share: float = 1.0

    def __post_init__(self) -> None:
        if not self.config.enabled:
            return
        name = "step_ratio" if self.config.steps is None else "steps"
        values = {"length": getattr(self.config, name), "total": self.total_steps}
        if self.switch_step < 1:
            raise SettingError(
                f"{{{name}:{{length}}}} of {{total}} steps puts the switch at step 0: "
                "raise it, lengthen the run, or use {bag_size:1}.",
                **values,
            )
        if self.switch_step >= self.total_steps:
            raise SettingError(
                f"{{{name}:{{length}}}} of {{total}} steps leaves no step for phase 2, which turns "
                "the weights into an ordinary model: lower it or lengthen the run.",
                **values,
            )

    @property
    def switch_step(self) -> int:
        """First step of phase 2; 0 when superposition is off."""
        if not self.config.enabled:
            return 0
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.step_ratio is not None
        return round(self.config.step_ratio * self.total_steps)

    @property
    def switch_sample(self) -> int:
        """Index of the first sample of phase 2."""
        return self.batch_sizes.samples_at(self.switch_step)

    def phase_at(self, step: int) -> Phase:
        """Phase of the optimizer step with this zero-based index."""
        return "superposition" if step < self.switch_step else "recovery"

    def bag_size_at(self, step: int) -> int:
        """Tokens that share a latent position, on the side that the variant superposes."""
        return self.config.bag_size if step < self.switch_step else 1

    def tokens_per_position_at(self, step: int) -> int:
        """Data tokens read for each latent position: s in phase 1 when bags are read, else 1."""
        return self.bag_size_at(step) if self.config.superposes_input else 1

    def equivalent_tokens(self, step: int) -> int:
        """Latent positions processed by the first ``step`` steps; FLOPs are proportional to it."""
        return self.batch_sizes.samples_at(step) * self.sequence_length

    def data_tokens(self, step: int) -> int:
        """Tokens of text read by the first ``step`` steps."""
        in_phase_1 = self.equivalent_tokens(min(step, self.switch_step))
        in_phase_2 = self.equivalent_tokens(step) - in_phase_1
        places = in_phase_1 * self.tokens_per_position_at(0)
        # Exact without padding, however many tokens there are.
        text = places if self.text_share == 1.0 else round(places * self.text_share)
        return text + in_phase_2
