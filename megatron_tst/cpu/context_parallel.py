"""Attention of a rank's chunks to a sequence that context parallelism has cut up.

Megatron cuts a sequence into 2 * cp chunks and gives rank i the chunks i and 2 * cp - 1 - i, in
that order, so that every rank has the same work under a causal mask (``get_batch_on_this_cp_rank``
in megatron/core/utils.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tst.cpu.causal_attention import CausalAttention


def gather_keys_and_values(
    key: Tensor, value: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sequence in natural order, by one collective each way.

    Args:
        key: [l/cp, b, groups, head_dim], the chunks of this rank.
        value: [l/cp, b, groups, head_dim].
        group: the context-parallel group.

    Returns:
        Both as [l, b, groups, head_dim].
    """
    sizes = [key.shape[-1], value.shape[-1]]
    both = gather_sequence(torch.cat((key, value), dim=-1), group)
    whole_key, whole_value = both.split(sizes, dim=-1)
    return whole_key, whole_value


def attend_from_chunks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, group: dist.ProcessGroup
) -> Tensor:
    """Causal attention of this rank's two chunks of queries to the whole sequence.

    Args:
        query: [b, heads, l/cp, head_dim], the chunks as Megatron lays them out.
        key: [b, heads, l, head_dim] in natural order.
        value: [b, heads, l, head_dim] in natural order.
        scale: factor of the scores.
        group: the context-parallel group.

    Returns:
        [b, heads, l/cp, head_dim].
    """
    contexts = []
    positions = chunks_of_rank(group.rank(), group.size())
    for position, chunk in zip(positions, query.chunk(2, dim=2), strict=True):
        seen = slice(0, (position + 1) * chunk.shape[2])
        contexts.append(CausalAttention.apply(chunk, key[:, :, seen], value[:, :, seen], scale))
    return torch.cat(contexts, dim=2)


def chunks_of_rank(rank: int, cp: int) -> tuple[int, int]:
    """Positions, in chunks, of the two chunks that a rank holds."""
    return rank, 2 * cp - 1 - rank


def gather_sequence(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gathers the chunks of all ranks into the whole sequence, in its natural order.

    Args:
        local: [l/cp, ...], the two chunks of this rank.
        group: the context-parallel group.

    Returns:
        [l, ...], the same on every rank. Its gradient may differ between ranks: that of ``local``
        is their sum, added up in the gradient's dtype.

        Collectives: one all-gather; one reduce-scatter in the backward pass.
    """
    whole: Tensor = _GatherSequence.apply(local, group)
    return whole


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        cp = group.size()
        by_rank = local.new_empty(cp * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(by_rank, local.contiguous(), group=group)
        natural = torch.argsort(_chunks_by_rank(cp))
        return by_rank.unflatten(0, (2 * cp, -1))[natural].flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cp = ctx.group.size()
        by_rank = grad.unflatten(0, (2 * cp, -1))[_chunks_by_rank(cp)].flatten(0, 1)
        grad_local = grad.new_empty(grad.shape[0] // cp, *grad.shape[1:])
        dist.reduce_scatter_tensor(grad_local, by_rank.contiguous(), group=ctx.group)
        return grad_local, None


def _chunks_by_rank(cp: int) -> Tensor:
    return torch.tensor([chunk for rank in range(cp) for chunk in chunks_of_rank(rank, cp)])
