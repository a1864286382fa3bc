"""What one run of a study is asked to do, and its Megatron command line; imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_tst.batch_sizes import BatchSizes
from megatron_tst.config import (
    DocumentBoundary,
    Objective,
    ResetAtSwitch,
    SuperpositionConfig,
    TargetWeighting,
    Variant,
)
from megatron_tst.schedule import SuperpositionSchedule

Scalar = str | int | float | bool


@dataclass(frozen=True)
class RunSettings:
    """Settings in which the runs of a study may differ.

    Attributes:
        model: name of a model of the study.
        total_steps: optimizer steps.
        learning_rate: peak of the schedule.
        seed: of weights and of the order of the text.
        bag_size: and all below: see :class:`megatron_tst.SuperpositionConfig`.
    """

    model: str
    total_steps: int
    learning_rate: float
    seed: int
    bag_size: int = 1
    step_ratio: float | None = None
    variant: Variant = "full"
    target_weighting: TargetWeighting | None = None
    power_law_exponent: float = 1.0
    objective: Objective = "mce"
    reset_at_switch: ResetAtSwitch = "none"
    document_boundary: DocumentBoundary = "cross"

    @property
    def superposition(self) -> SuperpositionConfig:
        """Its superposition settings.

        Raises:
            ValueError: naming the flag, its value and the remedy.
        """
        names = {field.name for field in fields(SuperpositionConfig)} & set(_FLAGS)
        return SuperpositionConfig(**{name: getattr(self, name) for name in names})

    def check(self) -> None:
        """Raises a ValueError if the run could not be started or would ignore a setting."""
        if self.total_steps < 1:
            raise ValueError(f"total_steps is {self.total_steps}: use 1 or more.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: use a number above 0.")
        SuperpositionSchedule(self.superposition, self.total_steps, BatchSizes.constant(1), 1)
        if self.bag_size == 1 and self._changed():
            raise ValueError(
                f"bag_size is 1, and so {', '.join(self._changed())} would be ignored: set "
                "bag_size, or leave them out of a baseline."
            )

    @property
    def name(self) -> str:
        """Name of the run's folder, unique in a study: every setting that is not its default."""
        parts = [self.model, f"{self.total_steps}steps", f"lr{self.learning_rate:g}"]
        changed = self._changed()
        if self.bag_size == 1:
            parts.append("baseline")
        else:
            parts += [f"s{self.bag_size}", f"r{changed.pop('step_ratio'):g}"]
        parts += [f"p{v:g}" if k == "power_law_exponent" else str(v) for k, v in changed.items()]
        return "-".join([*parts, f"seed{self.seed}"])

    def _changed(self) -> dict[str, Any]:
        """Superposition settings other than the bag size that are not at their defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in _FLAGS
            and field.name != "bag_size"
            and getattr(self, field.name) != field.default
        }

    def arguments(self, warmup_share: float, decay_share: float) -> list[str]:
        """Megatron's arguments for these settings, the model's excepted.

        Args:
            warmup_share: fraction of the steps in which the learning rate rises.
            decay_share: fraction of the steps, at the end, in which it falls.
        """
        arguments = [
            *("--train-iters", str(self.total_steps)),
            *("--lr", repr(self.learning_rate)),
            *("--lr-warmup-iters", str(round(warmup_share * self.total_steps))),
            *("--lr-wsd-decay-iters", str(max(round(decay_share * self.total_steps), 1))),
            # Megatron's seed must be above 0.
            *("--seed", str(self.seed + 1)),
        ]
        if self.bag_size > 1:
            arguments += ["--tst-bag-size", str(self.bag_size)]
            for name, value in self._changed().items():
                arguments += [_FLAGS[name], str(value)]
        return arguments

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


_FLAGS = {
    "bag_size": "--tst-bag-size",
    "step_ratio": "--tst-step-ratio",
    "variant": "--tst-variant",
    "target_weighting": "--tst-target-weighting",
    "power_law_exponent": "--tst-power-law-exponent",
    "objective": "--tst-objective",
    "reset_at_switch": "--tst-reset-at-switch",
    "document_boundary": "--tst-document-boundary",
}
