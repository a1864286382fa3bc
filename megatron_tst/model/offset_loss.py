"""Cross-entropy by offset in the bag: how much harder the later tokens of a bag are to predict."""

from __future__ import annotations

import torch
from torch import Tensor


class OffsetLossMeter:
    """Cross-entropy of the i-th token of the target bags, averaged over one optimizer step."""

    def __init__(self) -> None:
        self._sum_and_count: Tensor | None = None

    def add(self, losses: Tensor, targets: Tensor) -> None:
        """Adds a micro-batch: losses of each target and targets, [l, b, s]."""
        valid = targets >= 0
        positions = (0, 1)
        losses = torch.where(valid, losses, torch.zeros_like(losses))
        update = torch.stack([losses.sum(positions), valid.sum(positions).to(losses.dtype)])
        self._sum_and_count = (
            update if self._sum_and_count is None else self._sum_and_count + update
        )

    def reduce(self, group: torch.distributed.ProcessGroup) -> list[float]:
        """Means over all ranks of the data- and context-parallel group; empties the meter.

        One all-reduce of [2, s].
        """
        if self._sum_and_count is None:
            return []
        total, self._sum_and_count = self._sum_and_count, None
        torch.distributed.all_reduce(total, group=group)
        return (total[0] / total[1].clamp(min=1)).tolist()
