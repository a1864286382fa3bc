"""Megatron's cross-entropy on a CPU: by compiled kernels, or in chunks that fit a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tst.ops.native import compiled_kernels, kernels

# The float32 copy of so many logits stays in a second-level cache.
_CHUNK_ELEMENTS = 1 << 18


def in_chunks(upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps ``vocab_parallel_cross_entropy``: without a float32 copy of all logits.

    Upstream passes over that copy seven times, through the memory. One rank takes the kernels,
    where they are; several compute in chunks, to upstream's bits. What one chunk holds is then left
    to upstream, and label smoothing always.
    """

    @functools.wraps(upstream)
    def cross_entropy(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        label_smoothing: float = 0.0,
        tp_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        group = get_tensor_model_parallel_group() if tp_group is None else tp_group
        is_native = group.size() == 1 and _is_native(vocab_parallel_logits)
        is_small = vocab_parallel_logits.numel() <= _CHUNK_ELEMENTS and not is_native
        if label_smoothing > 0 or is_small:
            return upstream(vocab_parallel_logits, target, label_smoothing, tp_group)
        rows = vocab_parallel_logits.reshape(-1, vocab_parallel_logits.shape[-1])
        loss: Tensor
        if is_native:
            loss = NativeCrossEntropy.apply(rows, target.reshape(-1))
        else:
            loss = ChunkedCrossEntropy.apply(rows, target.reshape(-1), group)
        return loss.view(target.shape)

    return cross_entropy


def _is_native(logits: Tensor) -> bool:
    compiled = kernels()
    return compiled is not None and compiled.serves(logits)


class NativeCrossEntropy(torch.autograd.Function):
    """The cross-entropy of one target a row by compiled kernels, one rank."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """[n, v], [n] -> float32 [n]."""
        compiled = compiled_kernels()
        logits = logits.contiguous()
        inside = (target >= 0) & (target < logits.shape[-1])
        columns = target.masked_fill(~inside, 0).unsqueeze(-1)
        # A target outside the vocabulary counts as a logit of the maximum, as upstream.
        shares = inside.float().unsqueeze(-1)
        loss, log_sum_exp = compiled.multi_hot_loss(logits, columns, shares)
        ctx.save_for_backward(logits, columns, shares, log_sum_exp)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[n] -> [n, v] in the dtype of the logits."""
        compiled = compiled_kernels()
        logits, columns, shares, log_sum_exp = ctx.saved_tensors
        operands = (log_sum_exp, grad.contiguous(), torch.empty_like(logits))
        return compiled.multi_hot_gradient(logits, columns, shares, *operands), None


class ChunkedCrossEntropy(torch.autograd.Function):
    """The cross-entropy of one target a row, by upstream's operations, in its order."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This rank's part [n, v] of the vocabulary and global targets [n] -> float32 [n]."""
        maximum = logits.amax(-1).float()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
        column = target - group.rank() * logits.shape[-1]
        inside = (column >= 0) & (column < logits.shape[-1])
        column = column.masked_fill_(~inside, 0).unsqueeze(-1)
        # A target that no rank has counts as a logit of zero, as upstream.
        predicted = logits.gather(-1, column).squeeze(-1).float().sub_(maximum)
        predicted.masked_fill_(~inside, 0)
        sums = torch.empty_like(maximum)
        for rows, exponentials in _exponentials(logits, maximum):
            torch.sum(exponentials, -1, out=sums[rows])
        dist.all_reduce(predicted, group=group)
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(logits, column, inside, maximum, sums)
        return sums.log() - predicted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """[n] -> [n, v] in the dtype of the logits."""
        logits, column, inside, maximum, sums = ctx.saved_tensors
        result = torch.empty_like(logits)
        minus_one = inside.float().neg_().unsqueeze(-1)
        for rows, chunk in _exponentials(logits, maximum):
            chunk.div_(sums[rows].unsqueeze(-1)).scatter_add_(-1, column[rows], minus_one[rows])
            result[rows] = chunk.mul_(grad[rows].unsqueeze(-1))
        return result, None, None


def _exponentials(logits: Tensor, maximum: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time and their ``exp(logits - maximum)``, to be overwritten at will."""
    size = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    buffer = logits.new_empty(size, logits.shape[-1], dtype=torch.float32)
    for first in range(0, len(logits), size):
        rows = slice(first, min(first + size, len(logits)))
        chunk = buffer[: rows.stop - first].copy_(logits[rows])
        yield rows, chunk.sub_(maximum[rows].unsqueeze(-1)).exp_()
