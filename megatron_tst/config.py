"""The superposition settings that the user asked for, validated; imports no torch, no Megatron."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import exp
from typing import Any, Literal, get_args

Variant = Literal["full", "input-only", "output-only"]
TargetWeighting = Literal["uniform", "power-law", "exponential", "first-token"]
Objective = Literal["mce", "mce-sum", "bce", "hinge"]
ResetAtSwitch = Literal["none", "embeddings", "optimizer"]
DocumentBoundary = Literal["cross", "align"]
LossImplementation = Literal["auto", "torch", "triton", "linear"]
CheckpointVerification = Literal["sample", "full", "off"]

POWER_LAW_FROM_BAG_SIZE = 8
"""Bag size from which power-law weights trained better than uniform ones (arXiv 2605.06546)."""


def _require_choice(flag: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{flag} is {value!r}: choose one of {', '.join(choices)}.")


@dataclass(frozen=True)
class SuperpositionConfig:
    """Settings of a Token Superposition run.

    Attributes:
        bag_size: tokens folded into one latent position (s). 1 turns superposition off.
        step_ratio: fraction of all optimizer steps in phase 1 (r). Exclusive with ``steps``.
        steps: number of optimizer steps in phase 1. Exclusive with ``step_ratio``.
        variant: which side is superposed: bags in and out, bags in only, or bags out only.
        target_weighting: weight of the i-th token of a target bag; ``None`` resolves to the
            published choice: uniform below a bag size of 8, power law from 8 on.
        power_law_exponent: p in ``w_i = i ** -p``.
        objective: the multi-label loss of phase 1.
        reset_at_switch: state thrown away at the switch (ablations).
        document_boundary: whether bags run on from one document into the next (as published), or
            each document begins a bag of its own.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """

    bag_size: int = 1
    step_ratio: float | None = None
    steps: int | None = None
    variant: Variant = "full"
    target_weighting: TargetWeighting | None = None
    power_law_exponent: float = 1.0
    objective: Objective = "mce"
    reset_at_switch: ResetAtSwitch = "none"
    document_boundary: DocumentBoundary = "cross"

    def __post_init__(self) -> None:
        if self.bag_size < 1:
            raise ValueError(
                f"--tst-bag-size is {self.bag_size}: "
                "use 1 to turn superposition off, or 2 and more."
            )
        _require_choice("--tst-variant", self.variant, get_args(Variant))
        _require_choice("--tst-objective", self.objective, get_args(Objective))
        _require_choice("--tst-reset-at-switch", self.reset_at_switch, get_args(ResetAtSwitch))
        _require_choice(
            "--tst-document-boundary", self.document_boundary, get_args(DocumentBoundary)
        )
        if self.target_weighting is None:
            law: TargetWeighting = (
                "power-law" if self._default_weighting_is_power_law else "uniform"
            )
            object.__setattr__(self, "target_weighting", law)
        _require_choice("--tst-target-weighting", self.target_weighting, get_args(TargetWeighting))
        self._validate_phase_length()
        self._validate_weights()

    @property
    def _default_weighting_is_power_law(self) -> bool:
        # bce and hinge are defined on the set of targets and take no weights.
        weighted_objective = self.objective in ("mce", "mce-sum")
        return self.bag_size >= POWER_LAW_FROM_BAG_SIZE and weighted_objective

    def _validate_phase_length(self) -> None:
        if self.step_ratio is not None and self.steps is not None:
            raise ValueError(
                f"--tst-step-ratio {self.step_ratio} and --tst-steps {self.steps} both set the "
                "length of phase 1: pass one of them."
            )
        if self.step_ratio is not None and not 0.0 < self.step_ratio < 1.0:
            raise ValueError(
                f"--tst-step-ratio is {self.step_ratio}: it must lie strictly between 0 and 1 "
                "(published best: 0.2 to 0.4); use --tst-bag-size 1 for a run without phase 1."
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(
                f"--tst-steps is {self.steps}: phase 1 needs at least one step; "
                "use --tst-bag-size 1 for a run without phase 1."
            )
        if self.enabled and self.step_ratio is None and self.steps is None:
            raise ValueError(
                f"--tst-bag-size is {self.bag_size} but phase 1 has no length: "
                "pass --tst-step-ratio (for example 0.3) or --tst-steps."
            )

    def _validate_weights(self) -> None:
        # A NaN exponent fails this comparison too.
        if not abs(self.power_law_exponent) <= 10.0:
            raise ValueError(
                f"--tst-power-law-exponent is {self.power_law_exponent}: "
                "use a finite number between -10 and 10 (1.0 as published)."
            )
        if self.objective in ("bce", "hinge") and self.target_weighting != "uniform":
            raise ValueError(
                f"--tst-target-weighting {self.target_weighting} has no meaning with "
                f"--tst-objective {self.objective}, whose targets are a set: use uniform."
            )

    @property
    def enabled(self) -> bool:
        """Whether the run has a superposition phase."""
        return self.bag_size > 1

    @property
    def superposes_input(self) -> bool:
        """Whether phase 1 reads bags of tokens."""
        return self.enabled and self.variant != "output-only"

    @property
    def superposes_output(self) -> bool:
        """Whether phase 1 predicts bags of tokens."""
        return self.enabled and self.variant != "input-only"

    @property
    def aligns_documents(self) -> bool:
        """Whether no bag of phase 1 holds tokens of two documents."""
        return self.enabled and self.document_boundary == "align"

    def target_weights(self) -> tuple[float, ...]:
        """Weights ``w_1 .. w_s`` of the tokens of a target bag, scaled to sum to one.

        Laws: uniform ``1``, power-law ``i ** -p``, exponential ``exp(-i)``, first-token
        ``1, 0, ..`` (arXiv 2605.06546, weighting ablation).
        """
        offsets = range(1, self.bag_size + 1)
        laws = {
            "uniform": lambda i: 1.0,
            "power-law": lambda i: float(i) ** -self.power_law_exponent,
            "exponential": lambda i: exp(-i),
            "first-token": lambda i: 1.0 if i == 1 else 0.0,
        }
        assert self.target_weighting is not None
        raw = [laws[self.target_weighting](i) for i in offsets]
        total = sum(raw)
        return tuple(weight / total for weight in raw)

    def resolved(self, switch_step: int) -> SuperpositionConfig:
        """The same settings with the length of phase 1 as a step count (none without phase 1)."""
        return replace(self, step_ratio=None, steps=switch_step if self.enabled else None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the log and the checkpoint."""
        return asdict(self)
