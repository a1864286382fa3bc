"""The mean of the embeddings of bags of tokens by the kernels for one CPU core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tst.ops.kernels.launch import Implementation
from megatron_tst.ops.native import compiled_kernels, kernels


def uses_native(implementation: Implementation, weight: Tensor) -> bool:
    """Whether an embedding takes these kernels: ``auto``, on a CPU."""
    compiled = kernels() if implementation == "auto" and weight.device.type == "cpu" else None
    return compiled is not None and compiled.serves(weight)


class NativeBagMean(torch.autograd.Function):
    """As ``BagMean``, and to its bits: one pass over the rows of a bag each way."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bags: Tensor, outside: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        """As ``BagMean``: [v, h], [b, l, s] -> [b, l, h]."""
        tokens = bags if outside is None else bags.masked_fill(outside, -1)
        tokens = tokens.reshape(-1, bags.shape[-1]).contiguous()
        divisors = None if sizes is None else sizes.flatten().float()
        ctx.save_for_backward(tokens, divisors)
        ctx.shard_size = weight.shape[0]
        result = compiled_kernels().bag_mean(weight.contiguous(), tokens, divisors)
        return result.view(*bags.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """[b, l, h] -> [v, h]."""
        tokens, divisors = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1]).contiguous()
        result = compiled_kernels().bag_mean_gradient(grad, tokens, divisors, ctx.shard_size)
        return result, None, None, None
