"""SwiGLU for the CPU, in place of Megatron's fused kernels, which are compiled for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` with fewer passes than autograd's.

    The gate is copied first: torch's ``silu`` takes up to three times as long on a part of the
    columns.
    """

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        """[..., 2 ffn] -> [..., ffn] of the same dtype."""
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = silu(gate.contiguous())
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """[..., ffn] -> [..., 2 ffn]."""
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate.contiguous())
        return torch.cat((grad_gate, grad * activated), dim=-1)


def bias_swiglu(
    gate_and_up: Tensor,
    bias: Tensor | None,
    fp8_input_store: bool = False,
    offload: bool = False,
    clamp_value: float | None = None,
) -> Tensor:
    """In place of ``bias_swiglu_impl``; ``fp8_input_store`` and ``offload`` mean nothing on a CPU.

    ``clamp_value``, which releases behind 0.19.2 pass, bounds the gate from above and the other
    half on both sides.
    """
    if bias is not None:
        gate_and_up = gate_and_up + bias
    if clamp_value:
        gate, up = gate_and_up.chunk(2, dim=-1)
        clamped = (gate.clamp(max=clamp_value), up.clamp(-clamp_value, clamp_value))
        gate_and_up = torch.cat(clamped, dim=-1)
    result: Tensor = SwiGLU.apply(gate_and_up)
    return result


def weighted_swiglu(
    gate_and_up: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    fp8_input_store: bool = False,
    clamp_value: float | None = None,
) -> Tensor:
    """In place of ``weighted_bias_swiglu_impl``: the result times ``weights`` [..., 1]."""
    result = bias_swiglu(gate_and_up, bias, clamp_value=clamp_value)
    return (result * weights).to(gate_and_up.dtype)
