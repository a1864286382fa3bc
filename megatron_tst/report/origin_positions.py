"""Where in a sequence, and in a bag, predictions gain. Gaps are positive where an arm is ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_tst.common.text_table import Table
from megatron_tst.report.origin_seeds import (
    Section,
    first_runs,
    gap_cell,
    loss_cell,
    mean,
    most_seeds,
    paired,
)
from megatron_tst.report.origins import POSITION, POSITION_TOKENS, Arm, Trace


def by_position(arms: Sequence[Arm]) -> Section | None:
    """Gaps by how many tokens a prediction sees, in powers of two."""
    length = _length(arms)
    if not length:
        return None
    bins = position_bins(length, 1)
    names = [f"{low}" if low == high else f"{low} to {high}" for low, high in bins]
    masks = [np.isin(np.arange(1, length + 1), range(low, high + 1)) for low, high in bins]
    note = "Loss on the text at the last step, by the number of tokens that a prediction sees."
    return Section("By position", note, _of_positions(arms, "tokens seen", names, masks))


def position_bins(length: int, per_octave: int) -> list[tuple[int, int]]:
    """First and last position of bins that grow with the position."""
    powers = (round(2 ** (k / per_octave)) for k in range(length.bit_length() * per_octave))
    ends = sorted({length, *(end for end in powers if end < length)})
    return [(low + 1, high) for low, high in zip([0, *ends[:-1]], ends, strict=True)]


def by_offset(arms: Sequence[Arm]) -> Section | None:
    """Gaps by the place in the bag that a predicted token would have had."""
    length, size = _length(arms), max(trace.bag_size for trace in first_runs(arms))
    if not length or size < 2:
        return None
    # A prediction that sees n tokens is of the token n + 1, which counted from 1 is n % size + 1.
    seen = np.arange(1, length + 1)
    masks = [seen % size == offset for offset in range(size)]
    names = [f"{offset + 1} of {size}" for offset in range(size)]
    note = (
        f"The same by the place that the predicted token would have in bags of {size} which begin "
        "with the sequence."
    )
    return Section("By offset", note, _of_positions(arms, "place in the bag", names, masks))


def position_losses(trace: Trace) -> tuple[np.ndarray, np.ndarray] | None:
    """Losses and tokens by position at the last step, [n] each; None where they lack."""
    losses = trace.places(POSITION, trace.total_steps)
    if not losses:
        return None
    tokens = trace.places(POSITION_TOKENS, trace.total_steps)
    places = sorted(losses, key=int)
    return np.array([losses[p] for p in places]), np.array([tokens[p] for p in places])


def _length(arms: Sequence[Arm]) -> int:
    found = (position_losses(trace) for arm in arms for trace in arm.runs.values())
    return max((len(each[0]) for each in found if each is not None), default=0)


def _of_positions(
    arms: Sequence[Arm], head: str, names: Sequence[str], masks: Sequence[np.ndarray]
) -> Table:
    baseline, others = arms[0], arms[1:]

    def loss_in(mask: np.ndarray) -> Callable[[Trace], float | None]:
        def loss(trace: Trace) -> float | None:
            found = position_losses(trace)
            return None if found is None else float(np.average(found[0], weights=found[1] * mask))

        return loss

    whole, of = np.ones(len(masks[0]), dtype=bool), most_seeds(arms)
    rows = [
        [
            name,
            loss_cell(mean(baseline, loss_in(mask)), of),
            *(gap_cell(paired(arm, baseline, loss_in(mask)), of, 4) for arm in others),
        ]
        for name, mask in [*zip(names, masks, strict=True), ("all", whole)]
    ]
    header = [head, f"loss of {baseline.name}", *(f"{arm.name} ahead by" for arm in others)]
    return Table(header, rows)
