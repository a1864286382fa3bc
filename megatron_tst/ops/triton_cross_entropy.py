"""The multi-hot cross-entropy by Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tst.ops.collectives import all_reduce_sum_, group_size, join_shards
from megatron_tst.ops.targets import bag_coefficients, to_local_targets


class TritonMultiHotCrossEntropy(torch.autograd.Function):
    """[n, v], [n, s] -> [n], with one pass of a Triton kernel each way."""

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
        from megatron_tst.ops.kernels.cross_entropy import shard_statistics

        valid = targets != ignore_index
        coefficients, live = bag_coefficients(targets, target_weights, ignore_index, torch.float32)
        local, inside = to_local_targets(targets, valid, logits.shape[-1], tp_group)
        coefficients.masked_fill_(~inside, 0)
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        statistics = shard_statistics(logits, local, coefficients)
        log_sum_exp, target_logit = join_shards(*statistics, tp_group)
        ctx.save_for_backward(logits, local, coefficients, live, log_sum_exp)
        ctx.reuse_logits = reuse_logits
        loss = (log_sum_exp - target_logit).masked_fill_(~live, 0)
        if not by_offset:
            return loss, None
        target_logits = logits.gather(-1, local).float().masked_fill_(~inside, 0)
        target_logits = all_reduce_sum_(target_logits, tp_group)
        offset_losses = (log_sum_exp.unsqueeze(-1) - target_logits).masked_fill_(~valid, 0)
        ctx.mark_non_differentiable(offset_losses)
        return loss, offset_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the logits, [n, v]."""
        from megatron_tst.ops.kernels.cross_entropy import shard_gradient

        logits, local, coefficients, live, log_sum_exp = ctx.saved_tensors
        scale = grad_output.float().masked_fill(~live, 0)
        out = logits if ctx.reuse_logits else None
        grad = shard_gradient(logits, local, coefficients, log_sum_exp, scale, out)
        return grad, None, None, None, None, None, None


class OneReadMultiHotCrossEntropy(torch.autograd.Function):
    """[n, v], [n, s] -> [n], with the gradient in the place of the logits after the forward.

    For the whole vocabulary on one rank, logits that nobody else reads, and a gradient of the
    losses that is known.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        target_weights: Tensor | None,
        expected_gradient: Tensor,
        ignore_index: int,
        by_offset: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the losses [n] and, if asked for, those of each target, [n, s]."""
        from megatron_tst.ops.kernels.whole_rows import replace_by_gradient

        shares, live = bag_coefficients(targets, target_weights, ignore_index, torch.float32)
        valid = targets != ignore_index
        columns = targets.masked_fill(~valid, 0)
        target_logits = logits.gather(-1, columns).float() if by_offset else None
        expected = expected_gradient.float().reshape(1).expand(len(logits))
        expected = expected.masked_fill(~live, 0)
        statistics = replace_by_gradient(logits, columns, shares, expected)
        # Has autograd refuse a graph in which something else has kept the logits.
        torch.autograd.graph.increment_version(logits)
        log_sum_exp, target_logit = join_shards(*statistics, None)
        ctx.save_for_backward(logits, live, expected)
        loss = (log_sum_exp - target_logit).masked_fill_(~live, 0)
        if target_logits is None:
            return loss, None
        offset_losses = (log_sum_exp.unsqueeze(-1) - target_logits).masked_fill_(~valid, 0)
        ctx.mark_non_differentiable(offset_losses)
        return loss, offset_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the logits, [n, v]."""
        from megatron_tst.ops.kernels.whole_rows import rescale

        gradient, live, expected = ctx.saved_tensors
        rescale(gradient, expected, grad_output.float().masked_fill(~live, 0))
        # It has another scale now, and belongs to who gets it.
        torch.autograd.graph.increment_version(gradient)
        return gradient, None, None, None, None, None


def reads_once(logits: Tensor, tp_group: ProcessGroup | None) -> bool:
    """Whether :class:`OneReadMultiHotCrossEntropy` takes these logits, [n, v], with a gradient."""
    from megatron_tst.ops.kernels.whole_rows import serves

    has_gradient = torch.is_grad_enabled() and logits.requires_grad
    return has_gradient and group_size(tp_group) == 1 and serves(logits)
