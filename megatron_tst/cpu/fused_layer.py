"""The halves of a transformer layer as one operation each, where their settings are usual.

Norm, projections, attention or SwiGLU, and the addition to the residual: Megatron's modules run
them as some three hundred operators, forward and backward. Other settings stay with upstream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_tst.cpu.attention import FusedCoreAttention
from megatron_tst.cpu.fused_attention import attend, attention_gradients
from megatron_tst.cpu.norm import RMSNorm
from megatron_tst.ops.native import compiled_kernels, kernels


@dataclass(frozen=True)
class _Half:
    """What a half needs from its modules.

    Attributes:
        modules: all modules that it stands for.
        norm: before the first projection.
        first: the first projection, of weight [out, h].
        second: the second one, of weight [h, in].
    """

    modules: tuple[nn.Module, ...]
    norm: RMSNorm
    first: ColumnParallelLinear
    second: RowParallelLinear

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the norm and of both projections."""
        return self.norm.weight, self.first.weight, self.second.weight

    def wait_for_parameters(self) -> None:
        """Does what DDP would do before each module."""
        for module in self.modules:
            for hook in _gathering_hooks(module):
                hook(module)

    def serves(self, hidden_states: Tensor) -> bool:
        """Whether it may take the place of its modules now: nobody listens to one of them."""
        return (
            not any(map(_is_listened_to, self.modules))
            and not torch.nn.modules.module._has_any_global_hook()
            and hidden_states.dtype in (torch.float32, torch.bfloat16)
            and all(weight.dtype == hidden_states.dtype for weight in self.weights())
            and not torch.is_autocast_enabled("cpu")
        )


def fuse_attention(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``TransformerLayer._forward_attention``."""

    @functools.wraps(upstream)
    def forward_attention(
        self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        attention = self.self_attention
        half = _once(self, "_fused_attention", _attention_half, self.input_layernorm, attention)
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
        half = _once(self, "_fused_mlp", _mlp_half, self.pre_mlp_layernorm, self.mlp)
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


def _is_listened_to(module: nn.Module) -> bool:
    """Whether somebody waits for calls of a module, or has replaced its forward.

    DDP, which waits for gathered parameters, does not count.
    """
    return bool(
        module._forward_hooks
        or (
            module._forward_pre_hooks
            and len(_gathering_hooks(module)) < len(module._forward_pre_hooks)
        )
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _gathering_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Hooks of ``--overlap-param-gather``.

    DDP takes them away for the first step after a start and for evaluations. A half that then
    took the place of its modules, and otherwise not, would resume to other bits.
    """
    ddp = DistributedDataParallel.__module__
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if getattr(hook, "__module__", None) == ddp]


def _once(
    layer: Any, name: str, make: Callable[[Any], _Half | None], *parts: nn.Module
) -> _Half | None:
    """What ``make`` says of a layer, asked once, and again where one of its modules is replaced."""
    modules: list[nn.Module] = []
    for part in parts:
        _collect(part, modules)
    asked: tuple[list[nn.Module], _Half | None] | None = layer.__dict__.get(name)
    if asked is None or asked[0] != modules:
        asked = modules, make(layer) if kernels() is not None else None
        # Not a submodule, although it holds some.
        layer.__dict__[name] = asked
    return asked[1]


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    """A module and all below it; ``modules()`` takes three times as long, for their names."""
    found.append(module)
    for child in module._modules.values():
        if child is not None:
            _collect(child, found)


def _attention_half(layer: Any) -> _Half | None:
    attention = layer.self_attention
    if type(attention) is not SelfAttention or not _is_usual(layer):
        return None
    config, core = layer.config, attention.core_attention
    is_usual = (
        type(core) is FusedCoreAttention
        and core.attn_mask_type == AttnMaskType.causal
        and core.dropout == 0
        and _are_absent(attention.q_layernorm, attention.k_layernorm)
        and _are_absent(layer.cross_attention, layer.pre_cross_attn_layernorm)
        and attention.world_size == 1
        and attention._yarn_concentration_factor == 1
        and not layer.recompute_input_layernorm
        and not attention.checkpoint_core_attention
        and not config.no_rope_freq
        and not config.attention_output_gate
        and not config.rotary_interleaved
    )
    if not is_usual:
        return None
    return _half(layer.input_layernorm, attention, attention.linear_qkv, attention.linear_proj)


def _mlp_half(layer: Any) -> _Half | None:
    mlp, config = layer.mlp, layer.config
    is_usual = (
        type(mlp) is MLP
        and _is_usual(layer)
        and config.gated_linear_unit
        and config.activation_func is torch.nn.functional.silu
        and config.activation_func_clamp_value is None
        and not config.glu_linear_offset
        and not config.use_te_activation_func
        and config.mlp_chunks_for_training == 1
        and not layer.recompute_mlp
        and not layer.recompute_pre_mlp_layernorm
    )
    return _half(layer.pre_mlp_layernorm, mlp, mlp.linear_fc1, mlp.linear_fc2) if is_usual else None


def _is_usual(layer: Any) -> bool:
    """Whether a layer keeps to what both halves assume."""
    config = layer.config
    return (
        layer.hidden_dropout == 0
        and config.tensor_model_parallel_size == 1
        and config.context_parallel_size == 1
        and not config.sequence_parallel
        and not config.fp32_residual_connection
        and not config.gradient_accumulation_fusion
        and not config.delay_wgrad_compute
        and not config.fine_grained_activation_offloading
        and not config.test_mode
    )


def _half(norm: nn.Module, module: nn.Module, first: Any, second: Any) -> _Half | None:
    are_usual = (
        type(norm) is RMSNorm
        and type(first) is ColumnParallelLinear
        and type(second) is RowParallelLinear
        and first.bias is None
        and second.bias is None
    )
    if not are_usual:
        return None
    assert isinstance(norm, RMSNorm)
    return _Half((norm, *module.modules()), norm, first, second)


def _are_absent(*modules: Any) -> bool:
    return all(module is None or isinstance(module, IdentityOp) for module in modules)


@functools.lru_cache(maxsize=4)
def _angles(freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [l, d] of angles [l, 1, 1, d]; those of a step serve all of its layers."""
    # A step of training may take what an evaluation in inference mode has computed.
    with torch.inference_mode(False):
        flat = freqs.flatten(1)
        return torch.cos(flat).to(dtype), torch.sin(flat).to(dtype)
