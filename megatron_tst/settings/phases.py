"""The phases of a run: from which step on it reads and predicts bags of which size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from megatron_tst.settings.variants import FULL, Variant

Bags = tuple[tuple[int, int], ...]
"""Bag size and steps of each phase with bags."""


@dataclass(frozen=True)
class Phase:
    """Steps that all read and predict alike, up to the first step of the next phase.

    Attributes:
        first_step: zero-based index of its first optimizer step.
        first_sample: index of the first sample of that step, in the run or in one of its corpora.
        bag_size: tokens that share a latent position (s); 1 for ordinary next-token training.
        variant: which side the bags are on.
        aligns_documents: whether no bag holds tokens of two documents.
    """

    first_step: int
    first_sample: int
    bag_size: int = 1
    variant: Variant = FULL
    aligns_documents: bool = False

    @property
    def is_superposed(self) -> bool:
        """Whether it has bags."""
        return self.bag_size > 1

    @property
    def name(self) -> str:
        """For the log."""
        return "superposition" if self.is_superposed else "recovery"

    @property
    def reads_bags(self) -> bool:
        """Whether its tokens are [b, l, s]; [b, l] otherwise."""
        return self.is_superposed and self.variant.reads_bags

    @property
    def predicts_bags(self) -> bool:
        """Whether its labels are [b, l, s]; [b, l] otherwise."""
        return self.is_superposed and self.variant.predicts_bags

    @property
    def tokens_per_position(self) -> int:
        """Data tokens read for a latent position."""
        return self.bag_size if self.reads_bags else 1

    @property
    def look_ahead(self) -> int:
        """Data tokens behind a sample that serve as its targets only."""
        return self.bag_size

    @property
    def document_multiple(self) -> int:
        """Places of a document are a multiple of this."""
        return self.tokens_per_position if self.aligns_documents else 1

    def from_sample(self, first_sample: int) -> Phase:
        """The same phase from another sample on."""
        return replace(self, first_sample=first_sample)

    def text_order(self) -> dict[str, Any]:
        """All that the order of the text depends on, as plain values."""
        return {
            "first_sample": self.first_sample,
            "tokens_per_position": self.tokens_per_position,
            "look_ahead": self.look_ahead,
            "document_multiple": self.document_multiple,
        }

    def record(self) -> dict[str, int]:
        """Where it begins and its bag size, for ``tst_run.json`` and checkpoints."""
        return {name: getattr(self, name) for name in ("first_step", "first_sample", "bag_size")}


def lay_out(
    bags: Iterable[tuple[int, int]],
    variant: Variant = FULL,
    aligns_documents: bool = False,
    samples_at: Callable[[int], int] = int,
) -> tuple[Phase, ...]:
    """Phases with bags, one behind the other from step 0 on, and behind them one without.

    Args:
        bags: bag size and steps of each.
        variant: of all of them.
        aligns_documents: whether no bag holds tokens of two documents.
        samples_at: samples of so many steps; one a step by default.
    """
    phases, step = [], 0
    for size, steps in bags:
        phases.append(Phase(step, samples_at(step), size, variant, aligns_documents))
        step += steps
    return (*phases, Phase(step, samples_at(step)))


def bags_of(phases: Sequence[Phase]) -> Bags:
    """The inverse of :func:`lay_out`."""
    return tuple(
        (one.bag_size, after.first_step - one.first_step) for one, after in pairwise(phases)
    )


def is_superposed(settings: Mapping[str, Any] | None) -> bool:
    """Whether a run has bags by its recorded settings; those of another program have no record."""
    return int((settings or {}).get("bag_size", 1)) > 1


def recorded_phases(record: Mapping[str, Any] | None) -> tuple[Phase, ...]:
    """Phases as ``tst_settings`` of a checkpoint has them: their bag sizes and where they begin.

    Without a list, as earlier versions wrote it, there is one switch at most.
    """
    if record is None or not is_superposed(record):
        return lay_out(())
    if "phases" in record:
        return tuple(Phase(**phase) for phase in record["phases"])
    plain = Phase(record["switch_step"], record["switch_sample"])
    return Phase(0, 0, record["bag_size"]), plain


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Phase of the optimizer step with this zero-based index."""
    return [phase for phase in phases if phase.first_step <= step][-1]


def phase_name(phases: Sequence[Phase], step: int) -> str:
    """The phase of a step, in a sentence."""
    return f"phase {1 + phases.index(phase_at(phases, step))}"


def bags_name(phases: Sequence[Phase]) -> str:
    """All phases but the last, in a sentence."""
    return "phase 1" if len(phases) < 3 else f"phases 1 to {len(phases) - 1}"


def plain_name(phases: Sequence[Phase]) -> str:
    """The last phase, beside :func:`bags_name`."""
    return f"phase {max(len(phases), 2)}"


def switches_name(phases: Sequence[Phase]) -> str:
    """Where phases end, in a sentence."""
    *steps, last = (phase.first_step for phase in phases[1:] or phases)
    if not steps:
        return f"switch at step {last}"
    return f"switches at steps {', '.join(map(str, steps))} and {last}"


def phase_of_sample(phases: Sequence[Phase], sample: int) -> int:
    """Index of the phase that a sample belongs to."""
    return sum(phase.first_sample <= sample for phase in phases) - 1
