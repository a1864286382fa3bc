"""The phases of a run: from which step on it reads and predicts bags of which size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_tst.settings.variants import VARIANTS, Variant


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
    variant: Variant = VARIANTS["full"]
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


def phase_of_sample(phases: Sequence[Phase], sample: int) -> int:
    """Index of the phase that a sample belongs to."""
    return sum(phase.first_sample <= sample for phase in phases) - 1
