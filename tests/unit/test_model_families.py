"""What the import says of the model families that are used most, by their published settings."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_tst.checkpoint.hf_arguments import (
    megatron_arguments,
    read_config,
    shape_from_config,
)
from megatron_tst.common.errors import UsageError

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
LLAMA_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Family, settings as in its config.json, and arguments of Megatron that are among the result's.
IMPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "Llama 3": (
        {"architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0},
        "--rotary-base 500000",
    ),
    "Llama 3.1, 3.3": (
        {
            "architectures": ["LlamaForCausalLM"],
            "rope_theta": 500000.0,
            "rope_scaling": {**LLAMA_ROPE, "factor": 8.0},
        },
        "--use-rope-scaling --rope-scaling-factor 8.0",
    ),
    "Llama 3.2": (
        {
            "architectures": ["LlamaForCausalLM"],
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "rope_scaling": {**LLAMA_ROPE, "factor": 32.0},
        },
        "--use-rope-scaling --rope-scaling-factor 32.0",
    ),
    "Mistral 7B v0.3, Nemo, Small": (
        {
            "architectures": ["MistralForCausalLM"],
            "rope_theta": 1e6,
            "sliding_window": None,
            "head_dim": 128,
        },
        "--kv-channels 128",
    ),
    "Qwen2.5": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "rope_theta": 1e6,
            "use_sliding_window": False,
            "sliding_window": 131072,
            "max_window_layers": 4,
        },
        "--add-qkv-bias",
    ),
    "Qwen3": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "rope_theta": 1e6,
            "head_dim": 128,
            "attention_bias": False,
        },
        "--qk-layernorm",
    ),
    "Qwen3-MoE": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "rope_theta": 1e6,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            **EXPERTS,
        },
        "--num-experts 8",
    ),
    "GLM-4.5": (
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        "--moe-router-score-function sigmoid",
    ),
    "SmolLM2, Granite-like Llamas": (
        {"architectures": ["LlamaForCausalLM"], "rope_theta": 100000, "tie_word_embeddings": True},
        "--rotary-base 100000",
    ),
}
REFUSED = {
    "DeepSeek-V3": (["DeepseekV3ForCausalLM"], "multi-head latent attention"),
    "Kimi K2.5": (["KimiK25ForConditionalGeneration"], "multi-head latent attention"),
    "GLM-5": (["GlmMoeDsaForCausalLM"], "multi-head latent attention"),
    "Gemma 3": (["Gemma3ForCausalLM"], "norms around each half of a layer"),
    "gpt-oss": (["GptOssForCausalLM"], "attention sinks"),
    "OLMo 3": (["Olmo3ForCausalLM"], "norms behind each half of a layer"),
    "SmolLM3": (["SmolLM3ForCausalLM"], "layers without RoPE"),
}


@pytest.mark.parametrize("hybrid", [True, False], ids=["HybridModel", "GPTModel"])
@pytest.mark.parametrize("family", IMPORTED)
def test_families_that_are_imported(family: str, hybrid: bool) -> None:
    content, expected = IMPORTED[family]
    config = read_config({**SIZES, "max_position_embeddings": 131072, **content}, family)
    arguments = megatron_arguments(config, shape_from_config(config, 1), hybrid)
    assert f" {expected} " in " " + " ".join(" ".join(one) for one in arguments) + " "


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_refused_say_what_is_lacking(family: str) -> None:
    architectures, lacking = REFUSED[family]
    with pytest.raises(UsageError, match=f"{architectures[0]} \\(.*{lacking}") as error:
        read_config({**SIZES, "architectures": architectures}, family)
    assert "\n" not in str(error.value)


def test_a_mistral_with_a_window_is_refused() -> None:
    content = {**SIZES, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    with pytest.raises(UsageError, match="sliding_window 4096"):
        read_config(content, "Mistral 7B v0.1, Ministral 8B")
