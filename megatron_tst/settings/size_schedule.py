"""Several bag sizes in a run as users write them: ``8:0.05,4:0.1,2:0.15``."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import accumulate, pairwise

from megatron_tst.settings.phases import Bags
from megatron_tst.settings.setting_fields import SettingError

_PART = re.compile(r"(\d+):(\d+|\d*\.\d+)", re.ASCII)

Sizes = tuple[tuple[int, int | Fraction], ...]
"""Bag size of each phase, and its steps or its share of all."""


def parse_sizes(text: str) -> Sizes:
    """Bag sizes in their order, with whole steps (``8:500``) or exact shares (``8:0.05``).

    Raises:
        SettingError: the text has another form, or says what no run can do.
    """
    parts = [_PART.fullmatch(part.strip()) for part in text.split(",")]
    if None in parts:
        raise _refusal(text, "write bag size:share of the steps, or bag size:steps, with commas")
    pairs = [(int(part[1]), part[2]) for part in parts if part]
    sizes = [size for size, _ in pairs]
    if min(sizes) < 2:
        raise _refusal(text, "bag sizes are 2 or more, and the steps behind the last are plain")
    for size, following in pairwise(sizes):
        if size == following:
            raise _refusal(text, f"bag size {size} follows itself, write one entry of both lengths")
    if len({"." in length for _, length in pairs}) > 1:
        raise _refusal(text, "it mixes shares with whole steps, use one of them")
    lengths = [Fraction(length) for _, length in pairs]
    if min(lengths) == 0:
        raise _refusal(text, "each bag size needs a share or a count of steps above 0")
    if "." not in pairs[0][1]:
        return tuple(zip(sizes, map(int, lengths), strict=True))
    if sum(lengths) >= 1:
        raise _refusal(
            text,
            f"its shares add up to {float(sum(lengths)):g}, keep them below 1: the rest is plain",
        )
    return tuple(zip(sizes, lengths, strict=True))


def _refusal(text: str, remedy: str) -> SettingError:
    return SettingError(
        "{schedule} is {text!r}: {remedy} (for example 8:0.05,4:0.1,2:0.15).",
        text=text,
        remedy=remedy,
    )


def lay_out_sizes(text: str, total_steps: int) -> Bags:
    """Bag size and steps of each phase; the ends of shares are rounded, so that no step is lost.

    Raises:
        SettingError: the text is no schedule, or a bag size gets no step.
    """
    sizes = parse_sizes(text)
    steps = [
        length * total_steps if isinstance(length, Fraction) else length for _, length in sizes
    ]
    ends = [round(end) for end in accumulate(steps, initial=Fraction(0))]
    bags = tuple(
        (size, after - before)
        for (size, _), (before, after) in zip(sizes, pairwise(ends), strict=True)
    )
    for size, count in bags:
        if count < 1:
            raise SettingError(
                "{schedule:{text}} of {total} steps gives bags of {size} no step: raise their "
                "share, or lengthen the run.",
                text=text,
                total=total_steps,
                size=size,
            )
    return bags
