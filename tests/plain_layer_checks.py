"""Layers on the CPU platform against Megatron's plain modules, for each setting of a layer.

Run by ``tests/unit/test_cpu_fused_layer.py``, in a process where the platform is on.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cpu_layers import initialise, inputs, layer_config, rotation

Settings = dict[str, Any]

# Settings of a layer that change what it computes, each with what it needs.
COMPUTED: dict[str, Settings] = {
    "activation_func": {"activation_func": F.gelu},
    "activation_func_clamp_value": {"activation_func_clamp_value": 0.1},
    "add_bias_linear": {"add_bias_linear": True},
    "add_qkv_bias": {"add_qkv_bias": True},
    "attention_output_gate": {"attention_output_gate": True},
    "ffn_hidden_size": {"ffn_hidden_size": 56},
    "gated_linear_unit": {"gated_linear_unit": False},
    "glu_linear_offset": {"glu_linear_offset": 1.0},
    "kv_channels": {"kv_channels": 32},
    "layernorm_epsilon": {"layernorm_epsilon": 0.5},
    "mup_attn_scale_power": {"use_mup": True, "mup_base_hidden_size": 32},
    "no_rope_freq": {"no_rope_freq": 2},
    "normalization": {"normalization": "LayerNorm"},
    "num_query_groups": {"num_query_groups": 4},
    "qk_l2_norm": {"qk_l2_norm": True},
    "qk_layernorm": {"qk_layernorm": True},
    "rotary_interleaved": {"rotary_interleaved": True},
    "softmax_scale": {"softmax_scale": 1.0},
    "softmax_type": {"softmax_type": "learnable"},
    "softmax_type off-by-one": {"softmax_type": "off-by-one"},
    "window_size": {"window_size": (8, 0)},
}
# Others that only compute it in another way.
SAME: dict[str, Settings] = {
    "apply_query_key_layer_scaling": {"apply_query_key_layer_scaling": True},
    "attention_softmax_in_fp32": {"attention_softmax_in_fp32": False},
    "bias_activation_fusion": {"bias_activation_fusion": True},
    "mlp_chunks_for_training": {"mlp_chunks_for_training": 2},
    "recompute_modules": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm", "mlp"],
    },
    "window_attn_skip_freq": {"window_size": (8, 0), "window_attn_skip_freq": 1},
}
_MOE: Settings = {"num_moe_experts": 4, "moe_router_load_balancing_type": "none"}
EXPERTS: dict[str, Settings] = {
    "activation_func_clamp_value": {"activation_func_clamp_value": 0.1},
    "glu_linear_offset": {"glu_linear_offset": 1.0},
    "moe_expert_capacity_factor": {
        "moe_expert_capacity_factor": 0.5,
        "moe_token_dispatcher_type": "alltoall",
    },
    "moe_ffn_hidden_size": {"moe_ffn_hidden_size": 56},
    "moe_router_pre_softmax": {"moe_router_pre_softmax": True},
    "moe_router_score_function": {"moe_router_score_function": "sigmoid"},
    "moe_router_topk": {"moe_router_topk": 3},
    "moe_router_topk_scaling_factor": {
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "moe_shared_expert_gate": {
        "moe_shared_expert_intermediate_size": 56,
        "moe_shared_expert_gate": True,
    },
    "moe_shared_expert_intermediate_size": {"moe_shared_expert_intermediate_size": 56},
}
LATENT: dict[str, Settings] = {
    "usual": {},
    "kv_lora_rank": {"kv_lora_rank": 24},
    "mscale_all_dim": {"rotary_scaling_factor": 40.0, "mscale_all_dim": 1.0},
    "q_lora_rank": {"q_lora_rank": None},
    "qk_head_dim": {"qk_head_dim": 24},
    "qk_layernorm": {"qk_layernorm": True},
    "qk_pos_emb_head_dim": {"qk_pos_emb_head_dim": 4},
    "recompute_modules": {
        "recompute_granularity": "selective",
        "recompute_modules": ["layernorm", "mla_up_proj"],
    },
    "rope_type": {"rope_type": "rope"},
    "v_head_dim": {"v_head_dim": 8},
}


def main() -> None:
    """Runs the check that the command line names."""
    initialise()
    globals()[sys.argv[1]]()


@contextmanager
def plain_modules() -> Iterator[None]:
    """What the platform replaces in a layer is Megatron's own, or torch's."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.models import backends
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import mlp, torch_norm, transformer_layer
    from megatron.core.transformer.moe import shared_experts

    own: Any = fused_bias_swiglu
    rotary = "_apply_rotary_pos_emb_bshd"
    layer = transformer_layer.TransformerLayer
    replaced: list[tuple[Any, str, Any]] = [
        (backends.LocalSpecProvider, "core_attention", lambda self: _plain_attention()),
        (torch_norm.WrappedTorchNorm, "__new__", _plain_norm),
        (mlp, "bias_swiglu_impl", own.bias_swiglu_impl),
        (mlp, "weighted_bias_swiglu_impl", own.weighted_bias_swiglu_impl),
        (shared_experts, "bias_swiglu_impl", own.bias_swiglu_impl),
        (rope_utils, rotary, getattr(rope_utils, rotary).__wrapped__),
        *((o, n, getattr(o, n).__wrapped__) for o, n in ((mlp.MLP, "forward"),)),
        *(
            (layer, n, getattr(layer, n).__wrapped__)
            for n in ("_forward_attention", "_forward_mlp")
        ),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        yield


def _plain_norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:
    return {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[config.normalization](
        hidden_size, eps=eps
    )


def _plain_attention() -> type:
    """Megatron's unfused attention, which takes any width of queries and keys, but only by hand."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Attention(DotProductAttention):
        def __init__(
            self, config: Any, *args: Any, k_channels: Any = None, v_channels: Any = None, **kw: Any
        ) -> None:
            if v_channels is not None:
                config = copy.copy(config)
                config.kv_channels = v_channels
            super().__init__(config, *args, **kw)

    return Attention


def build(settings: Settings, dtype: torch.dtype = torch.float32) -> Any:
    """A layer as Megatron's builder of models specifies it."""
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.training.models.gpt import _te_or_local_layer_spec

    is_latent = settings.get("multi_latent_attention")
    usual = {"num_layers": 2, "transformer_impl": "local", "bias_activation_fusion": False}
    config_class = MLATransformerConfig if is_latent else None
    config = layer_config(config_class, **{**usual, **settings})
    model: Any = SimpleNamespace(transformer=config, use_transformer_engine_op_fuser=False)
    torch.manual_seed(3)
    return build_module(_te_or_local_layer_spec(model, 0), config=config, layer_number=2).to(dtype)


def weights_of(layer: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: 1 + torch.randn(p.shape, generator=generator) / (10 if p.dim() == 1 else 1)
        if p.dim() == 1
        else torch.randn(p.shape, generator=generator) / 4
        for name, p in layer.named_parameters()
    }


def results(layer: Any, weights: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """The output of a layer with these weights, and all gradients."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(weights[name])
    x, grad = inputs()
    leaf = x.requires_grad_()
    is_latent = settings.get("multi_latent_attention")
    angles = None if is_latent else rotation(size=settings.get("kv_channels", 16))
    output, _ = layer(hidden_states=leaf, attention_mask=None, rotary_pos_emb=angles)
    output.backward(grad)
    assert leaf.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": leaf.grad, **gradients}


def compared(settings: Settings) -> Tensor:
    """Requires what plain modules compute, and returns the output."""
    ours = build(settings)
    weights = weights_of(ours)
    found = results(ours, weights, settings)
    with plain_modules():
        expected = results(build(settings), weights, settings)
    assert found.keys() == expected.keys(), settings
    for name, tensor in expected.items():
        # Sums in float32 in another order, through the two halves of a layer.
        limit = 3e-5 * float(tensor.abs().max()) + 1e-7
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=limit, msg=f"{settings} {name}"
        )
    return found["output"]


def check_settings_of_a_layer() -> None:
    usual = compared({})
    for name, settings in COMPUTED.items():
        assert not torch.allclose(compared(settings), usual, atol=1e-3), name
    for settings in SAME.values():
        torch.testing.assert_close(compared(settings), usual, rtol=1e-4, atol=1e-4)


def check_settings_of_experts() -> None:
    usual = compared(_MOE)
    for name, settings in EXPERTS.items():
        assert not torch.allclose(compared(_MOE | settings), usual, atol=1e-3), name


def check_settings_of_latent_attention() -> None:
    shape = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8}
    shared = {"multi_latent_attention": True, "num_query_groups": None, "v_head_dim": 16}
    for settings in LATENT.values():
        compared({**shape, **shared, "rotary_scaling_factor": 1.0, **settings})


def check_residuals_in_float32() -> None:
    choices: list[Settings] = [{}, {"normalization": "LayerNorm"}, {"qk_layernorm": True}]
    for settings in choices:
        wide = {"bf16": True, "params_dtype": torch.bfloat16, "fp32_residual_connection": True}
        layer, exact = build(wide | settings, torch.bfloat16), build(settings)
        weights = {name: w.bfloat16().float() / 2 for name, w in weights_of(layer).items()}
        found, expected = (results(module, weights, settings) for module in (layer, exact))
        x, grad = inputs()
        for name, residual in (("output", x), ("x", grad)):
            assert found[name].dtype == torch.float32
            # What the layer adds is of 8 digits, and what it adds it to is not rounded.
            added = float((expected[name] - residual).norm())
            assert float((found[name] - expected[name]).norm()) < 0.02 * added, (settings, name)
