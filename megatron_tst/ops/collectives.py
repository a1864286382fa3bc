"""The few tensor-parallel collectives of this package, each with its exact gradient.

They take a process group or ``None`` (no tensor parallelism) and allocate on the device of their
input, unlike their namesakes in ``megatron/core/tensor_parallel/mappings.py``, which allocate on
the current CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def group_size(group: ProcessGroup | None) -> int:
    """Number of ranks that share the vocabulary; 1 without a group."""
    return 1 if group is None else group.size()


def group_name(group: ProcessGroup | None) -> str | None:
    """What an operator of ``torch.compile`` takes in place of a group."""
    return None if group is None else group.group_name


def group_of(name: str | None) -> ProcessGroup | None:
    """The group of that name."""
    if name is None:
        return None
    c10d: Any = torch.distributed.distributed_c10d
    return cast(ProcessGroup, c10d._resolve_process_group(name))


def vocabulary_start(shard_size: int, group: ProcessGroup | None) -> int:
    """Global id of the first of this rank's ``shard_size`` contiguous vocabulary rows."""
    return 0 if group is None else group.rank() * shard_size


def all_reduce_max_(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Elementwise maximum over the group, in place, without a gradient."""
    if group_size(group) > 1:
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=group)
    return tensor


def all_reduce_sum_(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the group, in place, without a gradient."""
    if group_size(group) > 1:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def start_all_reduce(tensor: Tensor, group: ProcessGroup | None) -> Callable[[], Tensor]:
    """Starts the sum over the group, in place, without a gradient; what to call for the result."""
    if group_size(group) == 1:
        return lambda: tensor
    work = torch.distributed.all_reduce(tensor, group=group, async_op=True)
    return lambda: _finished(work, tensor)


def start_reduce_scatter(partial: Tensor, group: ProcessGroup | None) -> Callable[[], Tensor]:
    """Starts the sum over the group, split along dimension 0, without a gradient.

    Returns what to call for this rank's slice.
    """
    if group is None or group_size(group) == 1:
        return lambda: partial
    scattered = partial.new_empty(partial.shape[0] // group.size(), *partial.shape[1:])
    work = torch.distributed.reduce_scatter_tensor(
        scattered, partial.contiguous(), group=group, async_op=True
    )
    return lambda: _finished(work, scattered)


def _finished(work: Any, result: Tensor) -> Tensor:
    work.wait()
    return result


def join_shards(
    maximum: Tensor, sums: Tensor, target_logit: Tensor, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """What all vocabulary shards make of their statistics, by two all-reduces.

    Args:
        maximum: [n] of the shard.
        sums: [n] sum of the exponentials of the shard, relative to its maximum.
        target_logit: [n] weighted sum of the logits of the targets in the shard.
        tp_group: ranks that share the vocabulary.

    Returns:
        [n] each: the log-sum-exp and the weighted target logit of the whole vocabulary.
    """
    whole = all_reduce_max_(maximum.clone(), tp_group)
    statistics = torch.stack((sums * (maximum - whole).exp_(), target_logit))
    sums, target_logit = all_reduce_sum_(statistics, tp_group)
    return sums.log().add_(whole), target_logit


def all_gather_from_sequence_parallel(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """The slices of all ranks along dimension 0, without a gradient: [l / tp, ...] -> [l, ...]."""
    if group_size(group) == 1:
        return local
    assert group is not None
    whole = local.new_empty(local.shape[0] * group.size(), *local.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, local.contiguous(), group=group)
    return whole


class _ReduceFromTensorParallel(torch.autograd.Function):
    """Sums in place.

    The copy to sum in is made outside: torch.compile of 2.11 loses the gradient of what a function
    changes after it has made it (https://github.com/pytorch/pytorch/issues/180642).
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: ProcessGroup) -> Tensor:
        ctx.mark_dirty(partial)
        return all_reduce_sum_(partial, group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class _CopyToTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replicated: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return replicated.view_as(replicated)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        partial = grad_output.clone(memory_format=torch.contiguous_format)
        return all_reduce_sum_(partial, ctx.group), None


class _ReduceScatterToSequenceParallel(torch.autograd.Function):
    """Writes into a tensor made outside, for the same reason."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, scattered: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.mark_dirty(scattered)
        torch.distributed.reduce_scatter_tensor(scattered, partial, group=group)
        return scattered

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_from_sequence_parallel(grad_output, ctx.group), None, None


def reduce_from_tensor_parallel(partial: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of the ranks' partial results: one all-reduce forward, none backward.

    Correct where what follows is computed alike on every rank, so that each rank already holds
    the whole gradient of the sum.
    """
    if group_size(group) == 1:
        return partial
    copy = partial.clone(memory_format=torch.contiguous_format)
    return _ReduceFromTensorParallel.apply(copy, group)


def copy_to_tensor_parallel(replicated: Tensor, group: ProcessGroup | None) -> Tensor:
    """A replicated value about to meet rank-local ones: its gradient is summed over the ranks."""
    return replicated if group_size(group) == 1 else _CopyToTensorParallel.apply(replicated, group)


def reduce_scatter_to_sequence_parallel(partial: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of the ranks' partial results, split along dimension 0; backward is an all-gather.

    Args:
        partial: [l, ...] with l divisible by the group size.

    Returns:
        [l / tp, ...], this rank's slice of the sum.
    """
    if group is None or group_size(group) == 1:
        return partial
    scattered = partial.new_empty(partial.shape[0] // group.size(), *partial.shape[1:])
    return _ReduceScatterToSequenceParallel.apply(partial.contiguous(), scattered, group)
