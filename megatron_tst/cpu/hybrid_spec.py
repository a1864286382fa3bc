"""Layers of Megatron's hybrid model for the CPU.

Upstream builds them from Transformer Engine's modules only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)


class LocalHybridStack(HybridStack):
    """Attention, MLP and mixture-of-experts layers of local modules.

    Args:
        config: of the model.
        submodules: not read; what the layers are follows from the configuration.
        **kwargs: passed to ``HybridStack``.
    """

    def __init__(
        self, config: TransformerConfig, submodules: HybridStackSubmodules, **kwargs: Any
    ) -> None:
        super().__init__(config, _submodules(config), **kwargs)


class LocalMultiTokenLayer(MultiTokenPredictionLayer):
    """A depth of multi-token prediction with such layers.

    Args:
        config: of the model.
        *args: passed to ``MultiTokenPredictionLayer``.
        hybrid_submodules: not read, as above.
        **kwargs: passed to ``MultiTokenPredictionLayer``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        hybrid_submodules: HybridStackSubmodules,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, hybrid_submodules=_submodules(config), **kwargs)


_MULTI_TOKEN_LAYER = ModuleSpec(
    module=LocalMultiTokenLayer,
    submodules=MultiTokenPredictionLayerSubmodules(
        enorm=WrappedTorchNorm,
        hnorm=WrappedTorchNorm,
        layer_norm=WrappedTorchNorm,
        eh_proj=ColumnParallelLinear,
    ),
)
HYBRID_STACK_SPEC = ModuleSpec(
    module=LocalHybridStack,
    submodules=HybridStackSubmodules(
        mtp_block_spec=ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[_MULTI_TOKEN_LAYER]),
        )
    ),
)


def _submodules(config: TransformerConfig) -> HybridStackSubmodules:
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=_attention(config)),
        mla_layer=ModuleSpec(module=TransformerLayer, submodules=_latent_attention(config)),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=_mlp()),
        moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=_experts(config)),
    )


# Norms that Transformer Engine fuses with the linear layer after them are modules of their own here
# and go by the fused names in checkpoints, as in upstream's local GPT layers: a checkpoint does not
# depend on where it was written.


def _attention(config: TransformerConfig) -> TransformerLayerSubmodules:
    # Without a class here Megatron takes that of --qk-l2-norm, which has no weights.
    query_key_norm = WrappedTorchNorm if config.qk_layernorm else None
    return TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=LocalSpecProvider().core_attention(),
                linear_proj=RowParallelLinear,
                q_layernorm=query_key_norm,
                k_layernorm=query_key_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )


def _latent_attention(config: TransformerConfig) -> TransformerLayerSubmodules:
    local = get_gpt_layer_local_submodules(
        multi_latent_attention=True,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    return TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=local.self_attention,
        self_attn_bda=get_bias_dropout_add,
    )


def _mlp() -> TransformerLayerSubmodules:
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=partial(MLP.as_mlp_submodule, submodules=linears),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )


def _experts(config: TransformerConfig) -> TransformerLayerSubmodules:
    return TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts or 1),
        mlp_bda=get_bias_dropout_add,
    )
