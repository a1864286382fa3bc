"""The multi-hot cross-entropy in torch operations, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tst.ops.collectives import all_reduce_max_, all_reduce_sum_
from megatron_tst.ops.targets import bag_coefficients, to_local_targets

# Rows are processed in chunks of about this many logits, so that the wide copy of a chunk stays
# in a CPU's second-level cache, or costs a GPU 256 MB instead of a copy of all logits.
_CHUNK_ELEMENTS_CPU = 1 << 18
_CHUNK_ELEMENTS_GPU = 1 << 26


class TorchMultiHotCrossEntropy(torch.autograd.Function):
    """[n, v], [n, s] -> [n]."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        target_weights: Tensor | None,
        tp_group: ProcessGroup | None,
        ignore_index: int,
        reuse_logits: bool,
        by_offset: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the losses [n] and, if asked for, those of each target, [n, s]."""
        # 1. Share of each target, zero on the ranks that do not hold it.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        coefficients, live = bag_coefficients(targets, target_weights, ignore_index, dtype)
        local, inside = to_local_targets(targets, coefficients > 0, logits.shape[-1], tp_group)
        coefficients.masked_fill_(~inside, 0)
        # 2. First all-reduce.
        maximum = _global_maximum(logits, tp_group)
        # 3. Second all-reduce: sum of exponentials and weighted target logit. A masked target may
        # point at a logit of -inf, hence the fill: 0 * -inf is not 0.
        relative = logits.gather(-1, local).to(dtype).sub_(maximum.unsqueeze(-1))
        target_logit = relative.masked_fill_(~inside, 0).mul_(coefficients).sum(-1)
        sums, exponentials = _sum_exponentials(logits, maximum, keep=True)
        statistics = all_reduce_sum_(torch.stack((sums, target_logit)), tp_group)
        ctx.save_for_backward(
            logits, local, coefficients, live, maximum, statistics[0], exponentials
        )
        ctx.reuse_logits = reuse_logits
        log_sum = statistics[0].log()
        loss = (log_sum - statistics[1]).masked_fill_(~live, 0)
        if not by_offset:
            return loss, None
        # Targets without weight have no part in the loss, but one of their own.
        valid = targets != ignore_index
        local, inside = to_local_targets(targets, valid, logits.shape[-1], tp_group)
        relative = logits.gather(-1, local).to(dtype).sub_(maximum.unsqueeze(-1))
        relative = all_reduce_sum_(relative.masked_fill_(~inside, 0), tp_group)
        offset_losses = (log_sum.unsqueeze(-1) - relative).masked_fill_(~valid, 0)
        ctx.mark_non_differentiable(offset_losses)
        return loss, offset_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the logits, [n, v]."""
        logits, local, coefficients, live, maximum, sums, exponentials = ctx.saved_tensors
        # Each chunk is read before it is written.
        grad = logits if ctx.reuse_logits else _contiguous_like(logits)
        scale = grad_output.masked_fill(~live, 0).unsqueeze(-1)
        chunks = _chunks(
            logits, grad, maximum.unsqueeze(-1), sums.unsqueeze(-1), local, -coefficients, scale
        )
        # Where the logits are given away the graph is used once, so these may go as well.
        takes_exponentials = ctx.reuse_logits and exponentials is not None
        scratch = exponentials if takes_exponentials else _scratch(logits, sums.dtype)
        for chunk, out, chunk_max, chunk_sum, columns, negated, chunk_scale in chunks:
            # A narrow gradient is computed in the wide scratch and cast once, at the end.
            wide = out if out.dtype == sums.dtype else scratch[: chunk.shape[0]]
            if exponentials is None:
                wide.copy_(chunk).sub_(chunk_max).exp_().div_(chunk_sum)
            else:
                torch.div(exponentials, chunk_sum, out=wide)
            wide.scatter_add_(-1, columns, negated).mul_(chunk_scale)
            if wide is not out:
                out.copy_(wide)
        return grad, None, None, None, None, None, None


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _rows_per_chunk(logits: Tensor) -> int:
    is_cpu = logits.device.type == "cpu"
    elements = _CHUNK_ELEMENTS_CPU if is_cpu else _CHUNK_ELEMENTS_GPU
    return min(max(1, elements // logits.shape[-1]), max(1, logits.shape[0]))


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching row chunks of [n, ...] tensors, sized by the logits."""
    rows = _rows_per_chunk(logits)
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


def _scratch(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for one chunk in the statistics' dtype."""
    return logits.new_empty(_rows_per_chunk(logits), logits.shape[-1], dtype=dtype)


def _global_maximum(logits: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """Row maximum over the whole vocabulary, in the statistics' dtype: [n, v] -> [n]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return all_reduce_max_(logits.amax(-1).to(dtype), tp_group)


def _sum_exponentials(logits: Tensor, maximum: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """This rank's ``sum_v exp(z_v - max)``: [n, v], [n] -> [n].

    Also returns the exponentials [n, v] if they are to be kept and fit one chunk.
    """
    sums = torch.empty_like(maximum)
    wide = None
    for wide, rows in exponentials(logits, maximum):
        torch.sum(wide, -1, out=sums[rows])
    return sums, wide if keep and wide is not None and len(wide) == len(logits) else None


def exponentials(logits: Tensor, shift: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """``exp(z - shift)`` of some rows at a time, in the dtype of the shift and in one buffer.

    Args:
        logits: [n, v].
        shift: [n].

    Yields:
        [rows, v], to be overwritten at will, and which rows they are.
    """
    scratch = _scratch(logits, shift.dtype)
    for first in range(0, len(logits), len(scratch)):
        rows = slice(first, first + len(scratch))
        chunk = logits[rows]
        yield scratch[: len(chunk)].copy_(chunk).sub_(shift[rows].unsqueeze(-1)).exp_(), rows
