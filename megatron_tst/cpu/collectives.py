"""Collectives that gloo is slow at or does not have.

Megatron also reduces over and broadcasts to groups of one process; on a GPU such a call costs
microseconds, with gloo a tenth of a millisecond, some ten times a step. And it gathers the tokens
of experts, of which each rank has another number; gloo wants equal numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    """Replaces ``all_reduce``, ``broadcast`` and ``all_gather`` of ``torch.distributed``."""
    dist.all_reduce = _without_groups_of_one(dist.all_reduce)
    dist.broadcast = _without_groups_of_one(dist.broadcast)
    _gather_any_sizes()


def _without_groups_of_one(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a collective that leaves its tensor as it is in a group of one process."""

    @functools.wraps(collective)
    def wrapper(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        group = args[1] if len(args) > 1 else kwargs.get("group")
        if dist.is_initialized() and dist.get_world_size(group) == 1:
            is_async = args[2] if len(args) > 2 else kwargs.get("async_op", False)
            return _Done() if is_async else None
        return collective(tensor, *args, **kwargs)

    return wrapper


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
