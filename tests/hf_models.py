"""Small random models of every kind that can be imported, in Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from benchmarks.synthetic_checkpoint import save_tokenizer

VOCABULARY, TOKENIZER_SIZE, CONTEXT = 250, 240, 24
"""Models such as Qwen3 have more rows than their tokenizer has entries."""
KINDS = (
    *("llama", "llama-mha-tied", "llama-old", "qwen3-tied", "qwen3moe", "qwen3moe-old"),
    *("qwen3moe-fused-raw", "qwen3moe-dense-tied"),
    *("qwen2moe-bias", "glm4moe-dense-bias", "glm4moe-groups-qknorm"),
    *(
        "mistral",
        "qwen2-llama3",
        "qwen2-old-tied",
        "llama-linear",
        "llama-old-llama3",
        "qwen3-yarn",
    ),
)
"""``mha`` stands for as many key heads as query heads, ``old`` for what transformers 4 writes, in
bfloat16 and in several files, ``fused`` for the experts of a layer in one tensor, also in
bfloat16, ``raw`` for
probabilities of experts that do not add up to one, ``dense`` for layers without experts,
``bias`` for biases of queries, keys and values, ``groups`` for experts of a part of the groups."""
_SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 6,
        "beta_fast": 16.0,
        "beta_slow": 0.5,
        "truncate": False,
    },
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.002,
}

_GLM_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 0,
}


def save_model(folder: Path, kind: str) -> Path:
    """Saves a model of one of ``KINDS`` and a tokenizer."""
    words = kind.split("-")
    settings = _SETTINGS | {"tie_word_embeddings": "tied" in words}
    if "mha" in words:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if "old" in words:
        # The size of a head is then not in the file.
        settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    for word in words:
        settings["rope_parameters"] = settings["rope_parameters"] | _ROPE.get(word, {})
    torch.manual_seed(KINDS.index(kind))
    model: Any
    match words[0]:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**settings))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**settings, sliding_window=None))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**settings))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**settings))
        case "qwen3moe":
            experts = _EXPERTS | {"norm_topk_prob": "raw" not in words}
            experts["mlp_only_layers"] = [1, 2] if "dense" in words else []
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, **experts))
        case "qwen2moe":
            shared = {"shared_expert_intermediate_size": 56, "norm_topk_prob": False}
            experts = _EXPERTS | shared
            settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
            model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings, **experts))
        case "glm4moe":
            experts = _GLM_EXPERTS | {
                "first_k_dense_replace": 2 if "dense" in words else 0,
                "attention_bias": "bias" in words,
                "use_qk_norm": "qknorm" in words,
                "n_group": 4 if "groups" in words else 1,
                "topk_group": 2 if "groups" in words else 1,
            }
            model = Glm4MoeForCausalLM(Glm4MoeConfig(**settings, **experts))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.3, 0.3)
    for name, parameter in model.named_parameters():
        # Norms start at one, where exchanging them would not show.
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        # And biases at zero.
        if name.endswith("_proj.bias"):
            parameter.data.uniform_(-0.5, 0.5)
    if "fused" in words:
        model.to(torch.bfloat16)
    if "old" in words:
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
        _write_old_config(folder / "config.json")
    else:
        model.save_pretrained(folder)
    if "fused" in words:
        # By the names and in the layout that the model has in memory.
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return save_tokenizer(folder, TOKENIZER_SIZE)


def _write_old_config(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("head_dim", None)
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config))
