"""Transformer layers and models of Megatron, for checks of what the CPU platform replaces."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LENGTH, BATCH, VOCABULARY = 37, 2, 96


def initialise() -> None:
    """One rank, and the seeds of Megatron's generators."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(0)


def layer_config(config_class: Any = None, **settings: Any) -> Any:
    """Of a layer like Llama's, with two queries a key; of another class on request."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    usual = {
        "num_layers": 1,
        "hidden_size": 64,
        "ffn_hidden_size": 104,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return (config_class or TransformerConfig)(**{**usual, **settings})


def local_spec(config: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )


def build_layer(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The weights are the same for the same settings, but for their rounding to ``dtype``."""
    from megatron.core.transformer.spec_utils import build_module

    config = layer_config(**settings)
    layer = build_module(local_spec(config), config=config, layer_number=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Scales of norms about 1, as a trained model has them.
            parameter.copy_(1 + noise / 10 if parameter.dim() == 1 else noise / 8)
    return layer.to(dtype)


def build_model(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    from megatron.core.models.gpt import GPTModel

    config = layer_config(**{"num_layers": 2, "params_dtype": dtype, **settings})
    config.bf16 = dtype == torch.bfloat16
    return GPTModel(
        config=config,
        transformer_layer_spec=local_spec(config),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
    ).to(dtype)


def rotation(length: int = LENGTH, size: int = 16) -> Tensor:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    angles: Tensor = RotaryEmbedding(size, 1.0)(length)
    return angles


def inputs(dtype: torch.dtype = torch.float32, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Hidden states and a gradient, [l, b, h]."""
    generator = torch.Generator().manual_seed(7)
    x, grad = torch.randn(2, length, BATCH, 64, generator=generator).to(dtype)
    return x, grad
