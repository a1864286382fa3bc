"""Collectives over one process return at once.

Megatron reduces over data-, tensor- and pipeline-parallel groups of one process as well; on a GPU
such a call costs microseconds, with gloo a tenth of a millisecond, some ten times a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _Done:
    """The handle of an asynchronous collective that has finished."""

    def wait(self, timeout: object = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def install() -> None:
    """Puts the shortcut in front of ``torch.distributed.all_reduce``."""
    all_reduce = dist.all_reduce

    def all_reduce_over_others(
        tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if dist.is_initialized() and dist.get_world_size(group) == 1:
            return _Done() if async_op else None
        return all_reduce(tensor, op, group, async_op)

    dist.all_reduce = all_reduce_over_others
