"""Bag sizes drawn for each step, as users write them: ``2,4`` or ``2:0.7,4:0.3``."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate

from megatron_tst.settings.setting_fields import SettingError

_PART = re.compile(r"(\d+)(?::(\d+|\d*\.\d+))?", re.ASCII)
_DIGEST_BYTES = 8


@dataclass(frozen=True)
class StepSizes:
    """A distribution of bag sizes.

    Attributes:
        sizes: ascending.
        weights: of the sizes, as they are written; empty where all are as likely.
    """

    sizes: tuple[int, ...]
    weights: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> StepSizes:
        """Reads what users write, in any order of the sizes.

        Raises:
            SettingError: the text has another form, or says what no run can do.
        """
        parts = [_PART.fullmatch(part.strip()) for part in text.split(",")]
        if None in parts:
            raise _refusal(text, "write bag sizes with commas, or each as bag size:weight")
        pairs = sorted((int(part[1]), part[2]) for part in parts if part)
        sizes, weights = zip(*pairs, strict=True)
        if min(sizes) < 2:
            raise _refusal(text, "bag sizes are 2 or more")
        if len(set(sizes)) < len(sizes):
            raise _refusal(text, "a bag size is there twice, name each once with its weight")
        if len(sizes) < 2:
            raise _refusal(text, "name two sizes or more, and one as {bag_size}")
        given = [weight for weight in weights if weight is not None]
        if given and (len(given) < len(sizes) or not all(map(Fraction, given))):
            raise _refusal(text, "give every bag size a weight above 0, or none of them")
        return cls(sizes, tuple(given))

    @property
    def text(self) -> str:
        """The one way to write it."""
        if not self.weights:
            return ",".join(map(str, self.sizes))
        return ",".join(
            f"{size}:{weight}" for size, weight in zip(self.sizes, self.weights, strict=True)
        )

    def draw(self, seed: int, steps: int) -> Iterator[int]:
        """The bag sizes of the first steps; each depends on the seed and its step alone.

        A hash stands in for a generator: it has no state to be saved, and gives the same on every
        machine and in every version.
        """
        weights = [Fraction(weight) for weight in self.weights] or [Fraction(1)] * len(self.sizes)
        *bounds, total = accumulate(weights)
        values = 1 << (8 * _DIGEST_BYTES)
        limits = [round(bound / total * values) for bound in bounds]
        for step in range(steps):
            digest = blake2b(b"%d %d" % (seed, step), digest_size=_DIGEST_BYTES).digest()
            yield self.sizes[bisect_right(limits, int.from_bytes(digest))]


def _refusal(text: str, remedy: str) -> SettingError:
    return SettingError(
        f"{{bag_sizes}} is {{text!r}}: {remedy} (for example 2,4 or 2:0.7,4:0.3).", text=text
    )
