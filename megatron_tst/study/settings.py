"""What one run of a study is asked to do, and its Megatron command line; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from megatron_tst.common.errors import UsageError
from megatron_tst.report.describing import superposition_settings
from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.config import SETTINGS, SuperpositionConfig
from megatron_tst.settings.schedule import SuperpositionSchedule

Scalar = str | int | float | bool


@dataclass(frozen=True)
class RunSettings:
    """Settings in which the runs of a study may differ.

    Attributes:
        model: name of a model of the study.
        total_steps: optimizer steps.
        learning_rate: peak of the schedule.
        seed: of weights and of the order of the text.
        bag_size: of phase 1; 1 for a baseline.
        changed: other settings of :class:`megatron_tst.SuperpositionConfig` that are not at their
            defaults, in the order of its fields.
    """

    model: str
    total_steps: int
    learning_rate: float
    seed: int
    bag_size: int
    changed: tuple[tuple[str, Any], ...]

    @classmethod
    def of(
        cls, model: str, total_steps: int, learning_rate: float, seed: int, **superposition: Any
    ) -> Self:
        """From values of :data:`AXES`.

        Raises:
            UsageError: a superposition setting is of another type, or no choice.
        """
        bag_size = superposition.pop("bag_size", SETTINGS["bag_size"].default)
        changed = []
        for name, known in SETTINGS.items():
            if name in superposition:
                known.check(superposition[name])
                if superposition[name] != known.default:
                    changed.append((name, superposition[name]))
        return cls(model, total_steps, learning_rate, seed, bag_size, tuple(changed))

    @property
    def is_baseline(self) -> bool:
        """Whether it has no superposition."""
        return self.bag_size == 1 and not {"schedule", "bag_sizes"} & dict(self.changed).keys()

    @property
    def control(self) -> RunSettings:
        """The baseline of its length, with a complete decay of its own."""
        return replace(self, bag_size=1, changed=())

    @property
    def superposition(self) -> SuperpositionConfig:
        """Its superposition settings.

        Raises:
            UsageError: naming the setting, its value and the remedy.
        """
        return SuperpositionConfig(bag_size=self.bag_size, **dict(self.changed))

    def check(self) -> None:
        """Raises a UsageError if the run could not be started or would ignore a setting."""
        if self.total_steps < 1:
            raise UsageError(f"total_steps is {self.total_steps}: use 1 or more.")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate is {self.learning_rate}: use a number above 0.")
        self.reported()
        if self.is_baseline and self.changed:
            raise UsageError(
                f"bag_size is 1, and so {', '.join(dict(self.changed))} would be ignored: set "
                "bag_size, or leave them out of a baseline."
            )

    def reported(self) -> dict[str, Any]:
        """What a report tells the run by, which other values of the axes can come to as well.

        Raises:
            UsageError: its superposition cannot be.
        """
        batch = BatchSizes.constant(1)
        schedule = SuperpositionSchedule(self.superposition, self.total_steps, batch, 1)
        own = {name: getattr(self, name) for name in _OWN_AXES}
        return {**own, **superposition_settings(schedule)}

    @property
    def name(self) -> str:
        """Name of the run's folder: every setting that is not its default; numbers of six digits.

        A study has no two runs of one name.
        """
        parts = [self.model, f"{self.total_steps}steps", f"lr{self.learning_rate:g}"]
        changed = dict(self.changed)
        if self.is_baseline:
            parts.append("baseline")
        else:
            parts += self._phase_names(changed)
        parts += [f"p{v:g}" if k == "power_law_exponent" else str(v) for k, v in changed.items()]
        return "-".join([*parts, f"seed{self.seed}"])

    def _phase_names(self, changed: dict[str, Any]) -> list[str]:
        if "schedule" in changed:
            return [
                "s" + changed.pop("schedule").replace(" ", "").replace(":", "r").replace(",", "s")
            ]
        sizes = str(changed.pop("bag_sizes", self.bag_size))
        sizes = sizes.replace(" ", "").replace(":", "w").replace(",", "or")
        return [f"s{sizes}", f"r{changed.pop('step_ratio'):g}"]

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
        if not self.is_baseline:
            for name, value in (("bag_size", self.bag_size), *self.changed):
                arguments += [SETTINGS[name].flag, str(value)]
        return arguments

    def to_dict(self) -> dict[str, Any]:
        """Plain values by axis."""
        own = {name: getattr(self, name) for name in _OWN_AXES}
        defaults = {name: SETTINGS[name].default for name in _SUPERPOSITION_AXES}
        return {**own, **defaults, "bag_size": self.bag_size, **dict(self.changed)}


_OWN_AXES: dict[str, type] = {
    "model": str,
    "total_steps": int,
    "learning_rate": float,
    "seed": int,
}
_SUPERPOSITION_AXES: dict[str, type] = {
    name: known.kind for name, known in SETTINGS.items() if known.is_axis
}
AXES: dict[str, type] = {**_OWN_AXES, **_SUPERPOSITION_AXES}
"""What an arm of a study may set, and the type of its values."""
