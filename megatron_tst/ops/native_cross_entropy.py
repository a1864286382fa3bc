"""The multi-hot cross-entropy by the kernels for one CPU core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tst.ops.collectives import group_size
from megatron_tst.ops.kernels.launch import Implementation
from megatron_tst.ops.native import compiled_kernels, kernels
from megatron_tst.ops.targets import bag_coefficients


def uses_native(
    implementation: Implementation, logits: Tensor, tp_group: ProcessGroup | None
) -> bool:
    """Whether a loss takes these kernels: ``auto``, on a CPU, with the whole vocabulary here."""
    if implementation != "auto" or logits.device.type != "cpu" or group_size(tp_group) > 1:
        return False
    compiled = kernels()
    return compiled is not None and compiled.serves(logits)


class NativeMultiHotCrossEntropy(torch.autograd.Function):
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
        logits = logits.contiguous()
        shares, live = bag_coefficients(targets, target_weights, ignore_index, torch.float32)
        valid = targets != ignore_index
        columns = targets.masked_fill(~valid, 0)
        loss, log_sum_exp = compiled_kernels().multi_hot_loss(logits, columns, shares)
        ctx.save_for_backward(logits, columns, shares, live, log_sum_exp)
        ctx.reuse_logits = reuse_logits
        loss.masked_fill_(~live, 0)
        if not by_offset:
            return loss, None
        target_logits = logits.gather(-1, columns).float()
        offset_losses = (log_sum_exp.unsqueeze(-1) - target_logits).masked_fill_(~valid, 0)
        ctx.mark_non_differentiable(offset_losses)
        return loss, offset_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the logits, [n, v]."""
        logits, columns, shares, live, log_sum_exp = ctx.saved_tensors
        out = logits if ctx.reuse_logits else torch.empty_like(logits)
        scale = grad_output.masked_fill(~live, 0)
        grad = compiled_kernels().multi_hot_gradient(
            logits, columns, shares, log_sum_exp, scale, out
        )
        if ctx.reuse_logits:
            # Has autograd refuse to use them again, as it would by itself for a torch operator.
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None, None, None
