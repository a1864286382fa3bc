"""The halves of a transformer layer as one operation each, where their settings are usual.

Norm, projections, attention or SwiGLU, and the addition to the residual: Megatron's modules run
them as some three hundred operators, forward and backward. Other settings stay with upstream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tst.cpu.fused_attention import attend, attention_gradients
from megatron_tst.cpu.layer_halves import asked_once, attention_half, mlp_half
from megatron_tst.ops.native import compiled_kernels


def fuse_attention(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``TransformerLayer._forward_attention``."""

    @functools.wraps(upstream)
    def forward_attention(
        self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        attention = self.self_attention
        half = asked_once(self, "_fused_attention", attention_half, self.input_layernorm, attention)
        others = {name: value for name, value in kwargs.items() if name != "rotary_pos_emb"}
        is_plain = not args and all(value is None for value in others.values())
        rotary_pos_emb = kwargs.get("rotary_pos_emb")
        if half is None or not is_plain or not half.serves(hidden_states):
            return upstream(self, hidden_states, *args, **kwargs)
        shape = len(hidden_states), 1, 1, attention.hidden_size_per_attention_head
        if not _rotates(rotary_pos_emb, shape):
            return upstream(self, hidden_states, **kwargs)
        cosine, sine = _angles(rotary_pos_emb, hidden_states.dtype)
        half.wait_for_parameters()
        output: Tensor = AttentionHalf.apply(
            hidden_states,
            *half.weights(),
            cosine,
            sine,
            half.norm.eps,
            attention.num_query_groups_per_partition,
            attention.core_attention.softmax_scale,
        )
        return output, None

    return forward_attention


def fuse_mlp(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``TransformerLayer._forward_mlp``."""

    @functools.wraps(upstream)
    def forward_mlp(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        half = asked_once(self, "_fused_mlp", mlp_half, self.pre_mlp_layernorm, self.mlp)
        # An inference context.
        if half is None or any(value is not None for value in args):
            return upstream(self, hidden_states, *args, **kwargs)
        # Other arguments concern experts.
        if kwargs.get("inference_context") is not None or not half.serves(hidden_states):
            return upstream(self, hidden_states, *args, **kwargs)
        half.wait_for_parameters()
        return MLPHalf.apply(hidden_states, *half.weights(), half.norm.eps)

    return forward_mlp


class AttentionHalf(torch.autograd.Function):
    """``x + proj(attention(rotated(qkv(norm(x)))))``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        qkv: Tensor,
        proj: Tensor,
        cosine: Tensor,
        sine: Tensor,
        eps: float,
        groups: int,
        scale: float,
    ) -> Tensor:
        """[l, b, h], [h], [g (r + 2) d, h], [h, g r d], [l, d], [l, d] -> [l, b, h]."""
        compiled = compiled_kernels()
        x = x.contiguous()
        length, batch, _ = x.shape
        normed, inverse = compiled.rms_norm(x, norm, eps)
        query, key, value = compiled.split_heads(normed @ qkv.t(), cosine, sine, groups)
        size, heads = cosine.shape[-1], query.shape[1] // length
        context, kept = attend(compiled, query, key, value, scale)
        by_head = context.view(batch, groups, length, heads, size)
        merged = by_head.permute(2, 0, 1, 3, 4).reshape(length * batch, -1)
        ctx.save_for_backward(
            x, norm, qkv, proj, cosine, sine, inverse, normed, query, key, value, merged, *kept
        )
        ctx.shape, ctx.scale = (length, batch, groups, heads, size), scale
        return _added(x, merged, proj)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the three weights."""
        compiled = compiled_kernels()
        x, norm, qkv, proj, cosine, sine, inverse, normed, *rest = ctx.saved_tensors
        query, key, value, merged, *kept = rest
        length, batch, groups, heads, size = ctx.shape
        grad = grad.contiguous()
        rows = grad.view(-1, grad.shape[-1])
        grad_proj = rows.t() @ merged
        by_position = (rows @ proj).view(length, batch, groups, heads, size)
        grad_context = by_position.permute(1, 2, 0, 3, 4).reshape(query.shape)
        parts = attention_gradients(compiled, query, key, value, kept, grad_context, ctx.scale)
        mixed = compiled.join_head_gradients(*parts, cosine, sine, ctx.shape).flatten(0, 1)
        grad_qkv = mixed.t() @ normed.view_as(rows)
        grad_x, grad_norm = compiled.rms_norm_gradient(mixed @ qkv, x, norm, inverse, rows)
        return grad_x, grad_norm, grad_qkv, grad_proj, None, None, None, None, None


class MLPHalf(torch.autograd.Function):
    """``x + down(swiglu(gate_and_up(norm(x))))``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, gate_and_up: Tensor, down: Tensor, eps: float
    ) -> Tensor:
        """[l, b, h], [h], [2 f, h], [h, f] -> [l, b, h]."""
        compiled = compiled_kernels()
        x = x.contiguous()
        normed, inverse = compiled.rms_norm(x, norm, eps)
        inner = normed.view(-1, x.shape[-1]) @ gate_and_up.t()
        activated = compiled.swiglu(inner)
        ctx.save_for_backward(x, norm, gate_and_up, down, inverse, normed, inner, activated)
        return _added(x, activated, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the three weights."""
        compiled = compiled_kernels()
        x, norm, gate_and_up, down, inverse, normed, inner, activated = ctx.saved_tensors
        grad = grad.contiguous()
        rows = grad.view(-1, grad.shape[-1])
        grad_down = rows.t() @ activated
        grad_inner = compiled.swiglu_gradient(rows @ down, inner)
        grad_first = grad_inner.t() @ normed.view_as(rows)
        grad_x, grad_norm = compiled.rms_norm_gradient(
            grad_inner @ gate_and_up, x, norm, inverse, rows
        )
        return grad_x, grad_norm, grad_first, grad_down, None


def _added(residual: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """``residual + rows @ weight.T``: [l, b, h], [l b, k], [h, k] -> [l, b, h].

    No view of another tensor: pipeline stages free what they have sent.
    """
    result = torch.empty_like(residual)
    hidden = residual.shape[-1]
    torch.addmm(residual.view(-1, hidden), rows, weight.t(), out=result.view(-1, hidden))
    return result


def _rotates(angles: Any, shape: tuple[int, ...]) -> bool:
    """Whether these are constant angles [l, 1, 1, d]: whole heads turn, by no learned embedding."""
    return isinstance(angles, Tensor) and not angles.requires_grad and angles.shape == shape


@functools.lru_cache(maxsize=4)
def _angles(freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [l, d] of angles [l, 1, 1, d]; those of a step serve all of its layers."""
    # A step of training may take what an evaluation in inference mode has computed.
    with torch.inference_mode(False):
        flat = freqs.flatten(1)
        return torch.cos(flat).to(dtype), torch.sin(flat).to(dtype)
