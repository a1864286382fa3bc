"""The superposition settings that the user asked for, validated; imports no torch, no Megatron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from math import exp
from typing import Any, Literal

from megatron_tst.settings.setting_fields import Setting, SettingError, said, settings_of
from megatron_tst.settings.size_schedule import parse_sizes
from megatron_tst.settings.step_sizes import StepSizes
from megatron_tst.settings.variants import VARIANTS

ResetAtSwitch = Literal["none", "embeddings", "optimizer"]
DocumentBoundary = Literal["cross", "align"]
LossImplementation = Literal["auto", "torch", "triton", "linear", "host"]
CheckpointVerification = Literal["sample", "full", "off"]

POWER_LAW_FROM_BAG_SIZE = 8
"""Bag size from which power-law weights trained better than uniform ones (arXiv 2605.06546)."""

WEIGHTINGS: dict[str, Callable[[int, float], float]] = {
    "uniform": lambda i, exponent: 1.0,
    "power-law": lambda i, exponent: float(i) ** -exponent,
    "exponential": lambda i, exponent: exp(-i),
    "first-token": lambda i, exponent: 1.0 if i == 1 else 0.0,
}
"""Weight of the i-th token of a bag, counted from 1, by name (arXiv 2605.06546, ablation)."""


@dataclass(frozen=True)
class Objective:
    """A loss of phase 1.

    Attributes:
        takes_weights: whether its targets are weighted; otherwise they are a set.
    """

    takes_weights: bool


OBJECTIVES: dict[str, Objective] = {
    "mce": Objective(takes_weights=True),
    "mce-sum": Objective(takes_weights=True),
    "bce": Objective(takes_weights=False),
    "hinge": Objective(takes_weights=False),
}
"""By name; ``megatron_tst.ops.objectives`` computes them."""


def default_weighting(bag_size: int, objective: str = "mce") -> str:
    """The published choice: uniform below a bag size of 8, power law from 8 on."""
    is_large = bag_size >= POWER_LAW_FROM_BAG_SIZE
    return "power-law" if is_large and OBJECTIVES[objective].takes_weights else "uniform"


@dataclass(frozen=True)
class SuperpositionConfig:
    """Settings of a Token Superposition run.

    Attributes:
        bag_size: tokens folded into one latent position (s). 1 turns superposition off.
        step_ratio: fraction of all optimizer steps in phase 1 (r). Exclusive with ``steps``.
        steps: number of optimizer steps in phase 1. Exclusive with ``step_ratio``.
        schedule: several bag sizes one behind the other, each with its share of all steps or its
            steps, as in ``8:0.05,4:0.1``; instead of ``bag_size`` and a length, and then
            ``bag_size`` is the largest of them.
        bag_sizes: bag sizes of phase 1 of which each step has one, drawn by the seed of the
            schedule, as in ``2,4`` or ``2:0.7,4:0.3``; instead of ``bag_size``, which is then the
            largest of them.
        variant: which side is superposed, a key of ``VARIANTS``: bags in and out, bags in only, or
            bags out only.
        target_weighting: weight of the i-th token of a target bag, a key of ``WEIGHTINGS``;
            ``None`` resolves to the published choice: uniform below a bag size of 8, power law
            from 8 on.
        power_law_exponent: p in ``w_i = i ** -p``.
        objective: the multi-label loss of phase 1, a key of ``OBJECTIVES``.
        reset_at_switch: state thrown away at the switch (ablations).
        document_boundary: whether bags run on from one document into the next (as published), or
            each document begins a bag of its own.
        loss_impl: how the loss, of single targets too, and the embedding of bags are computed.

    Raises:
        UsageError: naming the setting, its value and the remedy.
    """

    bag_size: int = field(
        default=1,
        metadata=said(
            "Tokens folded into one latent position in phase 1; 1 turns superposition off.",
            orders_text=True,
        ),
    )
    step_ratio: float | None = field(
        default=None,
        metadata=said(
            "Fraction of all optimizer steps spent in phase 1 (published best: 0.2 to 0.4)."
        ),
    )
    steps: int | None = field(
        default=None,
        metadata=said("Optimizer steps of phase 1, instead of a ratio.", is_axis=False),
    )
    schedule: str | None = field(
        default=None,
        metadata=said(
            "Several bag sizes, one behind the other, each with its share of all steps or its "
            "steps: 8:0.05,4:0.1,2:0.15; instead of one bag size and its length.",
            is_method=False,
        ),
    )
    bag_sizes: str | None = field(
        default=None,
        metadata=said(
            "Bag sizes of phase 1, one of which is drawn for each step: 2,4 or with weights "
            "2:0.7,4:0.3; instead of one bag size.",
        ),
    )
    variant: str = field(
        default="full",
        metadata=said(
            "Which side is superposed: bags in and out, bags in only, or bags out only.",
            choices=VARIANTS,
            label="{}",
            orders_text=True,
        ),
    )
    target_weighting: str | None = field(
        default=None,
        metadata=said(
            "Weight of the tokens of a target bag; default uniform below a bag size of 8, "
            "power-law from 8 on.",
            choices=WEIGHTINGS,
        ),
    )
    power_law_exponent: float = field(
        default=1.0, metadata=said("p in the power-law weight i^-p of the i-th token.")
    )
    objective: str = field(
        default="mce",
        metadata=said(
            "Phase-1 loss: multi-hot cross-entropy, or an ablation.",
            choices=OBJECTIVES,
            label="{}",
        ),
    )
    reset_at_switch: ResetAtSwitch = field(
        default="none",
        metadata=said("State re-initialised at the switch (ablations).", label="reset of {}"),
    )
    document_boundary: DocumentBoundary = field(
        default="cross",
        metadata=said(
            "Whether bags run on from one document into the next, or each document begins a bag "
            "and fills up its last one with padding, which is masked.",
            label="{}",
            orders_text=True,
        ),
    )
    loss_impl: LossImplementation = field(
        default="auto",
        metadata=said(
            "How the loss of all phases and the embedding of bags are computed: in torch or by "
            "Triton kernels, which auto takes on a GPU; linear: the loss together with the output "
            "layer, without whole logits; host: as auto, and single targets by Megatron's loss, "
            "as auto does on a CPU.",
            is_method=False,
            is_axis=False,
        ),
    )

    def __post_init__(self) -> None:
        for known in SETTINGS.values():
            known.check(getattr(self, known.name))
        if self.schedule is not None:
            self._take_schedule(self.schedule)
        if self.bag_sizes is not None:
            self._take_bag_sizes(self.bag_sizes)
        if self.bag_size < 1:
            raise SettingError(
                "{bag_size} is {value}: use 1 to turn superposition off, or 2 and more.",
                value=self.bag_size,
            )
        if self.target_weighting is None:
            law = default_weighting(self.bag_size, self.objective)
            object.__setattr__(self, "target_weighting", law)
        self._validate_phase_length()
        self._validate_weights()

    def _take_schedule(self, schedule: str) -> None:
        others = ("bag_size", "bag_sizes", "step_ratio", "steps")
        for name, value in ((name, getattr(self, name)) for name in others):
            if value != SETTINGS[name].default:
                raise SettingError(
                    f"{{schedule:{{schedule_value}}}} and {{{name}:{{value}}}} both set bag "
                    "sizes or their steps: pass one of them.",
                    schedule_value=schedule,
                    value=value,
                )
        object.__setattr__(self, "bag_size", max(size for size, _ in parse_sizes(schedule)))

    def _take_bag_sizes(self, text: str) -> None:
        sizes = StepSizes.parse(text)
        largest = max(sizes.sizes)
        if self.bag_size not in (SETTINGS["bag_size"].default, largest):
            raise SettingError(
                "{bag_sizes:{text}} and {bag_size:{value}} both set bag sizes: pass one of them.",
                text=text,
                value=self.bag_size,
            )
        object.__setattr__(self, "bag_size", largest)
        object.__setattr__(self, "bag_sizes", sizes.text)

    def _validate_phase_length(self) -> None:
        values = {"ratio": self.step_ratio, "length": self.steps, "size": self.bag_size}
        if self.step_ratio is not None and self.steps is not None:
            raise SettingError(
                "{step_ratio:{ratio}} and {steps:{length}} both set the length of phase 1: pass "
                "one of them.",
                **values,
            )
        if self.step_ratio is not None and not 0.0 < self.step_ratio < 1.0:
            raise SettingError(
                "{step_ratio} is {ratio}: it must lie strictly between 0 and 1 "
                "(published best: 0.2 to 0.4); use {bag_size:1} for a run without phase 1.",
                **values,
            )
        if self.steps is not None and self.steps < 1:
            raise SettingError(
                "{steps} is {length}: phase 1 needs at least one step; "
                "use {bag_size:1} for a run without phase 1.",
                **values,
            )
        lengths = (self.step_ratio, self.steps, self.schedule)
        if self.enabled and lengths == (None, None, None):
            name = "bag_size" if self.bag_sizes is None else "bag_sizes"
            raise SettingError(
                f"{{{name}}} is {{given}} but phase 1 has no length: "
                "pass {step_ratio} (for example 0.3) or {steps}.",
                given=getattr(self, name),
            )

    def _validate_weights(self) -> None:
        # A NaN exponent fails this comparison too.
        if not abs(self.power_law_exponent) <= 10.0:
            raise SettingError(
                "{power_law_exponent} is {value}: "
                "use a finite number between -10 and 10 (1.0 as published).",
                value=self.power_law_exponent,
            )
        if not OBJECTIVES[self.objective].takes_weights and self.target_weighting != "uniform":
            raise SettingError(
                "{target_weighting:{law}} has no meaning with {objective:{loss}}, whose targets "
                "are a set: use uniform.",
                law=self.target_weighting,
                loss=self.objective,
            )

    @property
    def implementation(self) -> Literal["auto", "torch", "triton"]:
        """Of the operations that have no ``linear`` and no ``host``."""
        if self.loss_impl == "linear" or self.loss_impl == "host":
            return "auto"
        return self.loss_impl

    @property
    def enabled(self) -> bool:
        """Whether the run has a superposition phase."""
        return self.bag_size > 1

    @property
    def superposes_input(self) -> bool:
        """Whether phase 1 reads bags of tokens."""
        return self.enabled and VARIANTS[self.variant].reads_bags

    @property
    def superposes_output(self) -> bool:
        """Whether phase 1 predicts bags of tokens."""
        return self.enabled and VARIANTS[self.variant].predicts_bags

    @property
    def aligns_documents(self) -> bool:
        """Whether no bag of phase 1 holds tokens of two documents."""
        return self.enabled and self.document_boundary == "align"

    def target_weights(self, bag_size: int | None = None) -> tuple[float, ...]:
        """Weights ``w_1 .. w_s`` of the tokens of a target bag, scaled to sum to one.

        Args:
            bag_size: s, where it is not that of the settings.
        """
        assert self.target_weighting is not None
        law = WEIGHTINGS[self.target_weighting]
        raw = [law(i, self.power_law_exponent) for i in range(1, (bag_size or self.bag_size) + 1)]
        total = sum(raw)
        return tuple(weight / total for weight in raw)

    def resolved(self, switch_step: int) -> SuperpositionConfig:
        """The same settings with the length of phase 1 as a step count (none without phase 1)."""
        steps = switch_step if self.enabled else None
        return replace(self, step_ratio=None, schedule=None, steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the log and the checkpoint."""
        return asdict(self)

    def method(self) -> dict[str, Any]:
        """What decides what is trained, by name; not the length of phase 1."""
        names = (name for name, known in SETTINGS.items() if known.is_method)
        return {name: getattr(self, name) for name in names if name not in ("step_ratio", "steps")}


SETTINGS: dict[str, Setting] = settings_of(SuperpositionConfig)
"""By the name of the field."""
