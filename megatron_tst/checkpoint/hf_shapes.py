"""Sizes of the models that exist on both sides, and what only Megatron has."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_tst.checkpoint.argument_names import check_present
from megatron_tst.checkpoint.hf_expert_flags import (
    ExpertArchitecture,
    expert_architecture,
    expert_extras,
    expert_rules,
    has_sigmoid,
    shared_size,
    unsupported_router,
)
from megatron_tst.checkpoint.hf_rope import YARN_ARGUMENTS, is_yarn, unsupported_rope_arguments
from megatron_tst.common.errors import UsageError

Architecture = (
    Literal["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"] | ExpertArchitecture
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that Llama, Qwen2, Qwen3 or Qwen3-MoE describes.

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
        qkv_bias: whether the projections to queries, keys and values have biases.
        dense_layers: numbers of the layers without experts in a model that has some.
        dense_ffn: inner size of the MLP of these layers.
        shared_ffn: inner size of all shared experts of a layer together; 0 without.
        sigmoid_router: whether scores are sigmoids, with a bias for the choice.
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
    qkv_bias: bool = False
    dense_layers: tuple[int, ...] = ()
    dense_ffn: int = 0
    shared_ffn: int = 0
    sigmoid_router: bool = False

    @property
    def shared_gate(self) -> bool:
        """Whether a sigmoid scales the shared expert: where there is one, but not in GLM-4."""
        return self.shared_ffn > 0 and not self.sigmoid_router

    @property
    def architecture(self) -> Architecture:
        """The class of transformers that computes the same function."""
        if self.experts:
            return expert_architecture(self.sigmoid_router, self.shared_ffn)
        if self.qkv_bias:
            return "Qwen2ForCausalLM"
        return "Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"


def shape_from_arguments(args: Namespace, vocabulary: int) -> ModelShape:
    """The sizes of the model that Megatron's arguments describe.

    Args:
        args: training arguments of the checkpoint.
        vocabulary: size of the tokenizer.

    Raises:
        UsageError: the arguments describe a model that transformers has no class for, one of them
            is absent, or the tokenizer has more entries than the model has rows.
    """
    has_experts = _has_experts(args)
    check_present(args, _required(args, has_experts))
    unsupported = list(_unsupported(args, has_experts))
    if unsupported:
        raise UsageError(
            f"the checkpoint was trained with {', '.join(unsupported)}: none of Llama, Qwen2, "
            "Qwen3, Qwen2-MoE, Qwen3-MoE and GLM-4 MoE has such a thing, so that it cannot be "
            "exported."
        )
    if vocabulary > args.padded_vocab_size:
        raise UsageError(
            f"--tokenizer has {vocabulary} entries but the checkpoint has {args.padded_vocab_size} "
            "embedding rows: pass the tokenizer that the model was trained with."
        )
    pattern = _pattern(args)
    ffn = args.ffn_hidden_size
    if has_experts:
        # Megatron's own default.
        ffn = getattr(args, "moe_ffn_hidden_size", None) or ffn
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
        qkv_bias=getattr(args, "add_qkv_bias", False),
        dense_layers=_dense_layers(args) if has_experts else (),
        dense_ffn=args.ffn_hidden_size if has_experts else 0,
        shared_ffn=shared_size(args) if has_experts else 0,
        sigmoid_router=has_experts and has_sigmoid(args),
    )


def layer_pattern(shape: ModelShape) -> str:
    """The ``--hybrid-layer-pattern`` of a model: attention, and an MLP or experts, a layer."""
    is_dense = [not shape.experts or layer in shape.dense_layers for layer in range(shape.layers)]
    return "".join("*-" if dense else "*E" for dense in is_dense)


def _pattern(args: Namespace) -> str:
    """Layers of a HybridModel, empty for a GPTModel.

    Without the marks between pipeline stages and the layers of multi-token prediction.
    """
    pattern: str = getattr(args, "hybrid_layer_pattern", None) or ""
    return pattern.partition("/")[0].replace("|", "")


def _has_experts(args: Namespace) -> bool:
    pattern = _pattern(args)
    return "E" in pattern if pattern else bool(getattr(args, "num_experts", None))


def _dense_layers(args: Namespace) -> tuple[int, ...]:
    """Layers without experts, counted from 0; a layer of a HybridModel is attention and MLP."""
    if pattern := _pattern(args):
        return tuple(layer for layer, kind in enumerate(pattern[1::2]) if kind == "-")
    frequency = getattr(args, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        return tuple(layer for layer in range(args.num_layers) if layer % frequency)
    return tuple(layer for layer, has_experts in enumerate(frequency) if not has_experts)


def _required(args: Namespace, has_experts: bool) -> Iterator[str]:
    """Arguments that a model cannot be described without."""
    yield from _REQUIRED
    if not _pattern(args):
        yield "num_layers"
    if getattr(args, "group_query_attention", False):
        yield "num_query_groups"
    if has_experts:
        yield from ("num_experts", "moe_router_topk", "moe_aux_loss_coeff")
    if is_yarn(args):
        yield from YARN_ARGUMENTS


def _unsupported(args: Namespace, has_experts: bool) -> Iterator[str]:
    """Flags, with their values, that no class of transformers has a setting for."""
    rules = _SETTINGS + (expert_rules(args) if has_experts else ())
    expressible = expert_extras(args) if has_experts else ()
    for flag, name, *allowed in rules:
        # A checkpoint of another release may lack an argument.
        value = getattr(args, name, allowed[0])
        if value not in allowed and name not in expressible:
            yield flag if isinstance(value, bool) else f"{flag} {value}"
    has_bias, has_norm = (getattr(args, n, False) for n in ("add_qkv_bias", "qk_layernorm"))
    if has_bias and has_norm and not has_experts:
        yield "--add-qkv-bias with --qk-layernorm"
    if has_bias and has_experts and "add_qkv_bias" not in expressible:
        yield "--add-qkv-bias with these experts"
    pattern = _pattern(args)
    yield from unsupported_rope_arguments(args, bool(pattern))
    if len(pattern) % 2 or set(pattern[::2]) - {"*"} or set(pattern[1::2]) - {"-", "E"}:
        yield f"--hybrid-layer-pattern {args.hybrid_layer_pattern} (not of *- and *E)"
    spec = getattr(args, "spec", None)
    # Stock launch scripts of HybridModel name Megatron's own specification.
    own = ("megatron.core.models.hybrid.", "megatron.core.models.mamba.")
    if spec is not None and not (pattern and spec[0].startswith(own)):
        yield f"--spec {' '.join(spec)}"
    if has_experts:
        size = getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size
        yield from unsupported_router(args, _dense_layers(args), size)


_REQUIRED = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention"),
    *("kv_channels", "padded_vocab_size", "untie_embeddings_and_output_weights"),
    *("max_position_embeddings", "layernorm_epsilon", "rotary_base", "init_method_std"),
)
# Flag as the message has it, name of the argument, values that can be expressed.
_SETTINGS: tuple[tuple[Any, ...], ...] = (
    ("--normalization", "normalization", "RMSNorm"),
    ("an MLP without --swiglu", "swiglu", True),
    ("biases (no --disable-bias-linear)", "add_bias_linear", False),
    ("--multi-latent-attention", "multi_latent_attention", False),
    ("--position-embedding-type", "position_embedding_type", "rope", "yarn"),
    ("--rotary-percent", "rotary_percent", 1.0),
    ("--rotary-interleaved", "rotary_interleaved", False),
    ("--no-rope-freq", "no_rope_freq", None),
    ("--qk-l2-norm", "qk_l2_norm", False),
    ("--apply-layernorm-1p", "layernorm_zero_centered_gamma", False),
    (
        "--apply-residual-connection-post-layernorm",
        "apply_residual_connection_post_layernorm",
        False,
    ),
    ("--attention-output-gate", "attention_output_gate", False),
    ("--softmax-type", "softmax_type", "vanilla"),
    ("--softmax-scale", "softmax_scale", None),
    ("--window-size", "window_size", None),
    ("--experimental-attention-variant", "experimental_attention_variant", None),
    ("--linear-attention-freq", "linear_attention_freq", None),
    ("--activation-func-clamp-value", "activation_func_clamp_value", None),
    ("--glu-linear-offset", "glu_linear_offset", 0.0),
    ("--use-mup", "use_mup", False),
    ("--heterogeneous-layers-config-path", "heterogeneous_layers_config_path", None),
)
