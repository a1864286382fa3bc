"""The variants of superposition: which side of a phase is superposed; imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """What a latent position of bags of s tokens reads and predicts.

    Attributes:
        name: for the command line.
        reads_bags: whether it reads the s tokens of a bag, or one token.
        predicts_bags: whether it predicts s tokens, or one.
        fold_targets: arranges what belongs to the tokens that follow those of a sample, [n], as
            labels [l, s] or [l], given s. For tensors; the result may share their memory.
    """

    name: str
    reads_bags: bool
    predicts_bags: bool
    fold_targets: Callable[[Any, int], Any]


VARIANTS = {
    variant.name: variant
    for variant in (
        # The next bag.
        Variant("full", True, True, lambda following, s: following[s - 1 :].view(-1, s)),
        # The first token of the next bag.
        Variant("input-only", True, False, lambda following, s: following[s - 1 :: s]),
        # The s tokens behind each position.
        Variant("output-only", False, True, lambda following, s: following.unfold(0, s, 1)),
    )
}
"""By name."""
