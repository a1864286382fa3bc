"""Sizes of the models that exist on both sides, and what only Megatron has."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Architecture = Literal["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"]
_Rule = tuple[str, Callable[[Namespace], bool]]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that Llama, Qwen3 or Qwen3-MoE describes.

    Attributes:
        layers: number of decoder layers, each of attention and an MLP or experts.
        hidden: hidden size (h).
        ffn: inner size of the MLP, or of one expert.
        heads: query heads.
        kv_heads: key and value heads; equal to ``heads`` without grouped queries.
        head_dim: size of a head.
        vocabulary: rows of the embedding that belong to tokens (V).
        padded_vocabulary: rows that Megatron stores.
        tied: whether the output layer is the embedding.
        qk_norm: whether queries and keys are normalised, each head on its own.
        experts: experts of a layer; 0 for a dense model.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    padded_vocabulary: int
    tied: bool
    qk_norm: bool = False
    experts: int = 0

    @property
    def architecture(self) -> Architecture:
        """The class of transformers that computes the same function."""
        if self.experts:
            return "Qwen3MoeForCausalLM"
        return "Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"


def shape_from_arguments(args: Namespace, vocabulary: int) -> ModelShape:
    """The sizes of the model that Megatron's arguments describe.

    Args:
        args: training arguments of the checkpoint.
        vocabulary: size of the tokenizer.

    Raises:
        ValueError: the arguments describe a model that transformers has no class for, or the
            tokenizer has more entries than the model has rows.
    """
    has_experts = _has_experts(args)
    rules = _UNSUPPORTED + (_UNSUPPORTED_EXPERTS if has_experts else ())
    unsupported = [description for description, applies in rules if applies(args)]
    if unsupported:
        raise ValueError(
            f"the checkpoint was trained with {', '.join(unsupported)}: neither Llama, Qwen3 nor "
            "Qwen3-MoE has such a thing, so that it cannot be exported."
        )
    if vocabulary > args.padded_vocab_size:
        raise ValueError(
            f"--tokenizer has {vocabulary} entries but the checkpoint has {args.padded_vocab_size} "
            "embedding rows: pass the tokenizer that the model was trained with."
        )
    pattern = _pattern(args)
    ffn = args.ffn_hidden_size
    if has_experts:
        # Megatron's own default.
        ffn = args.moe_ffn_hidden_size or ffn
    return ModelShape(
        layers=pattern.count("*") if pattern else args.num_layers,
        hidden=args.hidden_size,
        ffn=ffn,
        heads=args.num_attention_heads,
        kv_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocabulary=vocabulary,
        padded_vocabulary=args.padded_vocab_size,
        tied=not args.untie_embeddings_and_output_weights,
        qk_norm=getattr(args, "qk_layernorm", False),
        experts=args.num_experts if has_experts else 0,
    )


def _pattern(args: Namespace) -> str:
    """Layers of a HybridModel without the marks between pipeline stages; empty for a GPTModel."""
    return (getattr(args, "hybrid_layer_pattern", None) or "").replace("|", "")


def _has_experts(args: Namespace) -> bool:
    pattern = _pattern(args)
    return "E" in pattern if pattern else bool(getattr(args, "num_experts", None))


def _is_foreign_pattern(args: Namespace) -> bool:
    pattern = _pattern(args)
    return pattern not in {block * (len(pattern) // 2) for block in ("*-", "*E")}


def _is_foreign_spec(args: Namespace) -> bool:
    spec = getattr(args, "spec", None)
    # Stock launch scripts of HybridModel name Megatron's own specification.
    return spec is not None and not (
        _pattern(args)
        and spec[0].startswith(("megatron.core.models.hybrid.", "megatron.core.models.mamba."))
    )


def _is(name: str, *allowed: object) -> Callable[[Namespace], bool]:
    """Whether an argument that the checkpoint has is none of the allowed values."""
    return lambda args: getattr(args, name, allowed[0]) not in allowed


_UNSUPPORTED: tuple[_Rule, ...] = (
    ("--normalization other than RMSNorm", _is("normalization", "RMSNorm")),
    ("an MLP without --swiglu", _is("swiglu", True)),
    ("biases (no --disable-bias-linear)", _is("add_bias_linear", False)),
    ("--add-qkv-bias", _is("add_qkv_bias", False)),
    ("--multi-latent-attention", _is("multi_latent_attention", False)),
    ("--position-embedding-type other than rope", _is("position_embedding_type", "rope")),
    ("--rotary-percent other than 1", _is("rotary_percent", 1.0)),
    ("--rotary-interleaved", _is("rotary_interleaved", False)),
    ("--rotary-seq-len-interpolation-factor", _is("rotary_seq_len_interpolation_factor", None)),
    ("--use-rope-scaling", _is("use_rope_scaling", False)),
    ("--no-rope-freq", _is("no_rope_freq", None)),
    ("--qk-l2-norm", _is("qk_l2_norm", False)),
    ("--apply-layernorm-1p", _is("layernorm_zero_centered_gamma", False)),
    (
        "--apply-residual-connection-post-layernorm",
        _is("apply_residual_connection_post_layernorm", False),
    ),
    ("--attention-output-gate", _is("attention_output_gate", False)),
    ("--softmax-type other than vanilla", _is("softmax_type", "vanilla")),
    ("--softmax-scale", _is("softmax_scale", None)),
    ("--window-size", _is("window_size", None)),
    ("--experimental-attention-variant", _is("experimental_attention_variant", None)),
    ("--linear-attention-freq", _is("linear_attention_freq", None)),
    ("--activation-func-clamp-value", _is("activation_func_clamp_value", None)),
    ("--glu-linear-offset", _is("glu_linear_offset", 0.0)),
    ("--use-mup", _is("use_mup", False)),
    ("--mtp-num-layers", _is("mtp_num_layers", None, 0)),
    (
        "a --hybrid-layer-pattern that is not *- or *E over and over",
        _is_foreign_pattern,
    ),
    ("--heterogeneous-layers-config", _is("heterogeneous_layers_config_path", None)),
    ("--spec", _is_foreign_spec),
)

_UNSUPPORTED_EXPERTS: tuple[_Rule, ...] = (
    ("--num-experts without --qk-layernorm", _is("qk_layernorm", True)),
    ("--moe-layer-freq other than 1", _is("moe_layer_freq", 1)),
    (
        "--moe-shared-expert-intermediate-size",
        _is("moe_shared_expert_intermediate_size", None, 0),
    ),
    ("--moe-router-pre-softmax", _is("moe_router_pre_softmax", False)),
    (
        "--moe-router-score-function other than softmax",
        _is("moe_router_score_function", "softmax"),
    ),
    ("--moe-router-enable-expert-bias", _is("moe_router_enable_expert_bias", False)),
    ("--moe-router-topk-scaling-factor", _is("moe_router_topk_scaling_factor", None, 1.0)),
    ("--moe-router-num-groups", _is("moe_router_num_groups", None)),
    ("--moe-router-group-topk", _is("moe_router_group_topk", None)),
    (
        "--moe-router-load-balancing-type sinkhorn",
        lambda args: "sinkhorn" in getattr(args, "moe_router_load_balancing_type", ""),
    ),
    ("--moe-router-force-load-balancing", _is("moe_router_force_load_balancing", False)),
    ("--moe-expert-capacity-factor", _is("moe_expert_capacity_factor", None)),
    ("--moe-apply-probs-on-input", _is("moe_apply_probs_on_input", False)),
    ("--moe-latent-size", _is("moe_latent_size", None)),
    # It changes the order of the rows of gate and up.
    ("--moe-mlp-glu-interleave-size", _is("moe_mlp_glu_interleave_size", None)),
)
