"""Normalisation for the CPU: torch's forward, also under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm

from megatron_tst.common.errors import UsageError
from megatron_tst.ops.native import compiled_kernels, kernels


class RMSNorm(nn.RMSNorm):
    """torch's, with a gradient of its own: on a CPU torch puts it together from many operations."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h] of the same dtype."""
        compiled = kernels()
        is_served = compiled is not None and compiled.serves(x, self.weight)
        function = CompiledRMSNorm if is_served else RMSNormFunction
        result: Tensor = function.apply(x, self.weight, self.eps)
        return result


class CompiledRMSNorm(torch.autograd.Function):
    """``x / rms(x) * weight`` by the kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., h], [h] -> [..., h]."""
        compiled = compiled_kernels()
        x = x.contiguous()
        y, inverse = compiled.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """[..., h] -> [..., h] and [h]."""
        compiled = compiled_kernels()
        x, weight, inverse = ctx.saved_tensors
        grads = compiled.rms_norm_gradient(grad.contiguous(), x, weight, inverse, residual=None)
        return *grads, None


class RMSNormFunction(torch.autograd.Function):
    """``x / rms(x) * weight`` with the bits of ``torch.rms_norm``.

    With n = x / rms(x) the gradient of x is ``(g * weight - n * mean(g * weight * n)) / rms(x)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., h], [h] -> [..., h] in the dtype of ``x``, computed in at least float32."""
        wide = x.to(_wide(x))
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight.to(wide.dtype)).to(x.dtype).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """[..., h] -> [..., h] and [h]."""
        x, weight, inverse = ctx.saved_tensors
        hidden, wide = x.shape[-1], _wide(x)
        inverse = inverse.reshape(-1, 1)
        grad = grad.reshape(-1, hidden).to(wide)
        normalised = x.reshape(-1, hidden).to(wide) * inverse
        product = grad * normalised
        grad_weight = product.sum(0).to(weight.dtype)
        weight = weight.to(wide)
        # Not a product with a vector: the bits of a row would depend on the number of rows.
        along = product.mul_(weight).mean(-1, keepdim=True)
        grad_x = torch.mul(grad, weight, out=product).addcmul_(normalised, along, value=-1)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.mul(grad_x, inverse, out=result.view(-1, hidden))
        return result, grad_weight, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class NarrowingLayerNorm(nn.LayerNorm):
    """Of an input that may be wider than the weight, whose dtype the result has.

    ``--fp32-residual-connection`` gives norms float32 and expects, as from Transformer Engine's,
    what the layer after them takes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h] in the dtype of the weight, computed in that of ``x``."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return y.to(self.weight.dtype)


class NarrowingRMSNorm(RMSNorm):
    """As ``NarrowingLayerNorm``."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h] in the dtype of the weight, computed in at least float32."""
        return super().forward(x).to(self.weight.dtype)


_NORMS: dict[str, type[nn.LayerNorm | RMSNorm]] = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": RMSNorm,
}
_NARROWING_NORMS: dict[str, type[nn.LayerNorm | RMSNorm]] = {
    "LayerNorm": NarrowingLayerNorm,
    "RMSNorm": NarrowingRMSNorm,
}


def build_norm(
    cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: Any
) -> nn.Module:
    """Builds a norm over the last dimension, in place of ``WrappedTorchNorm.__new__``.

    Upstream's refuses sequence parallelism, under which a rank holds a slice of the positions and
    thus a part of the gradient of the weight. Megatron adds the parts up, one all-reduce a step,
    for every parameter that is marked as here.

    Raises:
        UsageError: a kind of norm that torch does not have.
    """
    refused = {
        "--normalization": config.normalization not in _NORMS,
        "--apply-layernorm-1p": config.layernorm_zero_centered_gamma,
        "--memory-efficient-layer-norm": config.memory_efficient_layer_norm,
    }
    for flag, is_set in refused.items():
        if is_set:
            raise UsageError(
                f"{flag} asks for a norm that the CPU platform does not compute: use "
                f"--normalization {' or '.join(_NORMS)} alone, or run on a GPU."
            )
    norms = _NARROWING_NORMS if config.fp32_residual_connection else _NORMS
    norm = norms[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
