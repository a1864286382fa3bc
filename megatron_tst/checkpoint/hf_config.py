"""The ``config.json`` of an exported model."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_tst.checkpoint.hf_expert_flags import router_groups
from megatron_tst.checkpoint.hf_rope import rope_parameters
from megatron_tst.checkpoint.hf_shapes import ModelShape

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Glm4MoeForCausalLM": "glm4_moe",
}


def huggingface_config(
    shape: ModelShape, args: Namespace, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The content of ``config.json``, for transformers 4 and 5.

    Args:
        shape: sizes of the model.
        args: training arguments of the checkpoint.
        dtype: of the weights, as torch names it.
        bos_id: token at the beginning of a text, if there is one.
        eos_id: token at the end of a text, if there is one.
    """
    rope = rope_parameters(args)
    config: dict[str, Any] = {
        "architectures": [shape.architecture],
        "model_type": _MODEL_TYPES[shape.architecture],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": args.layernorm_epsilon,
        # Releases before 5 read the plain value and rope_scaling only.
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": shape.tied,
        "attention_dropout": 0.0,
        "initializer_range": args.init_method_std,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        # Releases before 4.56 read the second name only.
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    # Qwen2 has biases of queries, keys and values, and no setting for them.
    if not shape.qkv_bias:
        config["attention_bias"] = False
    if shape.architecture == "LlamaForCausalLM":
        config["mlp_bias"] = False
    else:
        config["use_sliding_window"] = False
    return config | (_expert_settings(shape, args) if shape.experts else {})


def _expert_settings(shape: ModelShape, args: Namespace) -> dict[str, Any]:
    if shape.sigmoid_router:
        return _glm_settings(shape, args)
    settings = {
        # The inner size of layers without experts, if there are any.
        "intermediate_size": args.ffn_hidden_size,
        "moe_intermediate_size": shape.ffn,
        # Releases before 5 read the first name, later ones write the second.
        "num_experts": shape.experts,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": args.moe_router_topk,
        # By default Megatron takes the softmax of the chosen logits, which adds up to one.
        "norm_topk_prob": not getattr(args, "moe_router_pre_softmax", False),
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(shape.dense_layers),
        "output_router_logits": False,
        "router_aux_loss_coef": _first(args.moe_aux_loss_coeff),
    }
    if shape.shared_ffn:
        settings |= {
            "shared_expert_intermediate_size": shape.shared_ffn,
            "qkv_bias": shape.qkv_bias,
        }
    return settings


def _glm_settings(shape: ModelShape, args: Namespace) -> dict[str, Any]:
    groups, of_token = router_groups(args)
    factor = getattr(args, "rotary_percent", 1.0)
    return {
        "attention_bias": shape.qkv_bias,
        "use_qk_norm": shape.qk_norm,
        "partial_rotary_factor": factor,
        "rope_parameters": rope_parameters(args) | {"partial_rotary_factor": factor},
        "intermediate_size": args.ffn_hidden_size,
        "moe_intermediate_size": shape.ffn,
        "n_routed_experts": shape.experts,
        "n_shared_experts": shape.shared_ffn // shape.ffn,
        "num_experts_per_tok": args.moe_router_topk,
        "first_k_dense_replace": len(shape.dense_layers),
        # Megatron divides by the sum where there is one.
        "norm_topk_prob": args.moe_router_topk > 1,
        # Megatron does not scale by 0.
        "routed_scaling_factor": getattr(args, "moe_router_topk_scaling_factor", None) or 1.0,
        "n_group": groups,
        "topk_group": of_token,
        "num_nextn_predict_layers": 0,
    }


def _first(value: float | list[float]) -> float:
    """Megatron takes one coefficient for each of its balancing losses."""
    return float(value[0] if isinstance(value, list) else value)
