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


# Functions of a module, since data loaders pickle phases.
def _next_bag(following: Any, s: int) -> Any:
    return following[s - 1 :].view(-1, s)


def _first_of_next_bag(following: Any, s: int) -> Any:
    return following[s - 1 :: s]


def _tokens_behind(following: Any, s: int) -> Any:
    return following.unfold(0, s, 1)


FULL = Variant("full", True, True, _next_bag)
INPUT_ONLY = Variant("input-only", True, False, _first_of_next_bag)
OUTPUT_ONLY = Variant("output-only", False, True, _tokens_behind)

VARIANTS = {variant.name: variant for variant in (FULL, INPUT_ONLY, OUTPUT_ONLY)}
"""By name."""
