"""Which halves of transformer layers one operation can compute, by their settings."""

from __future__ import annotations

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

from megatron_tst.cpu.attention import FusedCoreAttention
from megatron_tst.cpu.norm import RMSNorm
from megatron_tst.ops.native import kernels


@dataclass(frozen=True)
class Half:
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


def asked_once(
    layer: Any, name: str, make: Callable[[Any], Half | None], *parts: nn.Module
) -> Half | None:
    """What ``make`` says of a layer, asked once, and again where one of its modules is replaced."""
    modules: list[nn.Module] = []
    for part in parts:
        _collect(part, modules)
    asked: tuple[list[nn.Module], Half | None] | None = layer.__dict__.get(name)
    if asked is None or asked[0] != modules:
        asked = modules, make(layer) if kernels() is not None else None
        # Not a submodule, although it holds some.
        layer.__dict__[name] = asked
    return asked[1]


def attention_half(layer: Any) -> Half | None:
    """What the attention of a layer needs; None where its settings are not the usual ones."""
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


def mlp_half(layer: Any) -> Half | None:
    """Likewise of the MLP."""
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


def _half(norm: nn.Module, module: nn.Module, first: Any, second: Any) -> Half | None:
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
    return Half((norm, *module.modules()), norm, first, second)


def _are_absent(*modules: Any) -> bool:
    return all(module is None or isinstance(module, IdentityOp) for module in modules)


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    """A module and all below it; ``modules()`` takes three times as long, for their names."""
    found.append(module)
    for child in module._modules.values():
        if child is not None:
            _collect(child, found)


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
