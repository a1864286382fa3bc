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
        ctx.save_for_backward(bags, outside, sizes)
        ctx.shard_size = weight.shape[0]
        operands = _tokens_and_divisors(bags, outside, sizes)
        result = compiled_kernels().bag_mean(weight.contiguous(), *operands)
        return result.view(*bags.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """[b, l, h] -> [v, h]."""
        operands = _tokens_and_divisors(*ctx.saved_tensors)
        grad = grad_output.reshape(-1, grad_output.shape[-1]).contiguous()
        result = compiled_kernels().bag_mean_gradient(grad, *operands, ctx.shard_size)
        return result, None, None, None


def _tokens_and_divisors(
    bags: Tensor, outside: Tensor | None, sizes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rows [n, s], -1 for none, and tokens of each bag, [n] or None."""
    tokens = bags if outside is None else bags.masked_fill(outside, -1)
    divisors = None if sizes is None else sizes.flatten().float()
    return tokens.reshape(-1, bags.shape[-1]).contiguous(), divisors
