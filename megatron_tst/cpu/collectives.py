"""Collectives that gloo is slow at or does not have.

Megatron reduces over data-, tensor- and pipeline-parallel groups of one process as well; on a GPU
such a call costs microseconds, with gloo a tenth of a millisecond, some ten times a step. And it
gathers the tokens of experts, of which each rank has another number; gloo wants equal numbers.
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
    """Replaces ``all_reduce`` and ``all_gather`` of ``torch.distributed``."""
    _skip_reductions_over_one()
    _gather_any_sizes()


def _skip_reductions_over_one() -> None:
    all_reduce = dist.all_reduce

    def all_reduce_over_others(
        tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if dist.is_initialized() and dist.get_world_size(group) == 1:
            return _Done() if async_op else None
        return all_reduce(tensor, op, group, async_op)

    dist.all_reduce = all_reduce_over_others


def _gather_any_sizes() -> None:
    all_gather = dist.all_gather

    def all_gather_of_any_sizes(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({received.shape for received in tensor_list}) == 1:
            return all_gather(tensor_list, tensor, group, async_op)
        # One broadcast a rank, as NCCL does it.
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for source, received in enumerate(tensor_list):
            dist.broadcast(received, group=group, group_src=source)
        return _Done() if async_op else None

    dist.all_gather = all_gather_of_any_sizes
