"""Megatron's GPT model in Hugging Face's Llama terms: configuration, weight names, weight layouts.

Both rotate the two halves of a head, and both store a linear layer as [out, in], so that weights
are split and renamed, never permuted.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.", "encoder.", "adapter.")
_LAYER = "decoder.layers."
_EMBEDDING = "embedding.word_embeddings.weight"
_FINAL_NORM = "decoder.final_layernorm.weight"
_OUTPUT = "output_layer.weight"

_Rule = tuple[str, Callable[[Namespace], bool]]


def _is(name: str, *allowed: object) -> Callable[[Namespace], bool]:
    """Whether an argument that the checkpoint has is none of the allowed values."""
    return lambda args: getattr(args, name, allowed[0]) not in allowed


_UNSUPPORTED: tuple[_Rule, ...] = (
    ("--normalization other than RMSNorm", _is("normalization", "RMSNorm")),
    ("an MLP without --swiglu", _is("swiglu", True)),
    ("biases (no --disable-bias-linear)", _is("add_bias_linear", False)),
    ("--add-qkv-bias", _is("add_qkv_bias", False)),
    ("--num-experts", _is("num_experts", None)),
    ("--multi-latent-attention", _is("multi_latent_attention", False)),
    ("--position-embedding-type other than rope", _is("position_embedding_type", "rope")),
    ("--rotary-percent other than 1", _is("rotary_percent", 1.0)),
    ("--rotary-interleaved", _is("rotary_interleaved", False)),
    ("--rotary-seq-len-interpolation-factor", _is("rotary_seq_len_interpolation_factor", None)),
    ("--use-rope-scaling", _is("use_rope_scaling", False)),
    ("--no-rope-freq", _is("no_rope_freq", None)),
    ("--qk-layernorm", _is("qk_layernorm", False)),
    ("--qk-l2-norm", _is("qk_l2_norm", False)),
    ("--apply-layernorm-1p", _is("layernorm_zero_centered_gamma", False)),
    (
        "--apply-residual-connection-post-layernorm",
        _is("apply_residual_connection_post_layernorm", False),
    ),
    ("--attention-output-gate", _is("attention_output_gate", False)),
    ("--softmax-type other than vanilla", _is("softmax_type", "vanilla")),
    ("--window-size", _is("window_size", None)),
    ("--experimental-attention-variant", _is("experimental_attention_variant", None)),
    ("--linear-attention-freq", _is("linear_attention_freq", None)),
    ("--activation-func-clamp-value", _is("activation_func_clamp_value", None)),
    ("--glu-linear-offset", _is("glu_linear_offset", 0.0)),
    ("--use-mup", _is("use_mup", False)),
    ("--mtp-num-layers", _is("mtp_num_layers", None, 0)),
    ("--hybrid-layer-pattern", _is("hybrid_layer_pattern", None)),
    ("--heterogeneous-layers-config", _is("heterogeneous_layers_config_path", None)),
    ("--spec", _is("spec", None)),
)


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a dense Llama-shaped model.

    Attributes:
        layers: number of decoder layers.
        hidden: hidden size (h).
        ffn: inner size of the MLP.
        heads: query heads.
        kv_heads: key and value heads; equal to ``heads`` without grouped queries.
        head_dim: size of a head.
        vocabulary: rows of the embedding that belong to tokens (V).
        padded_vocabulary: rows that Megatron stores.
        tied: whether the output layer is the embedding.
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

    def megatron_shapes(self) -> dict[str, tuple[int, ...]]:
        """Key and shape of every weight in a torch_dist checkpoint, which stacks the layers.

        The same for the local and the Transformer Engine specification.
        """
        layers, hidden, query = self.layers, self.hidden, self.heads * self.head_dim
        qkv = query + 2 * self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            _EMBEDDING: (self.padded_vocabulary, hidden),
            f"{_LAYER}self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
            f"{_LAYER}self_attention.linear_qkv.weight": (layers, qkv, hidden),
            f"{_LAYER}self_attention.linear_proj.weight": (layers, hidden, query),
            f"{_LAYER}mlp.linear_fc1.layer_norm_weight": (layers, hidden),
            f"{_LAYER}mlp.linear_fc1.weight": (layers, 2 * self.ffn, hidden),
            f"{_LAYER}mlp.linear_fc2.weight": (layers, hidden, self.ffn),
            _FINAL_NORM: (hidden,),
        }
        return shapes if self.tied else {**shapes, _OUTPUT: (self.padded_vocabulary, hidden)}


def llama_shape(args: Namespace, vocabulary: int) -> LlamaShape:
    """The sizes of the model that Megatron's arguments describe.

    Args:
        args: training arguments of the checkpoint.
        vocabulary: size of the tokenizer.

    Raises:
        ValueError: the arguments describe a model that Llama cannot express, or the tokenizer has
            more entries than the model has rows.
    """
    unsupported = [description for description, applies in _UNSUPPORTED if applies(args)]
    if unsupported:
        raise ValueError(
            f"the checkpoint was trained with {', '.join(unsupported)}: the Llama architecture has "
            "no such thing, so that it cannot be exported."
        )
    if vocabulary > args.padded_vocab_size:
        raise ValueError(
            f"--tokenizer has {vocabulary} entries but the checkpoint has {args.padded_vocab_size} "
            "embedding rows: pass the tokenizer that the model was trained with."
        )
    grouped = args.group_query_attention
    return LlamaShape(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        kv_heads=args.num_query_groups if grouped else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocabulary=vocabulary,
        padded_vocabulary=args.padded_vocab_size,
        tied=not args.untie_embeddings_and_output_weights,
    )


def llama_config(
    shape: LlamaShape, args: Namespace, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The content of ``config.json``, for transformers 4 and 5."""
    theta = float(args.rotary_base)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        # Releases before 5 read the plain value only.
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": args.init_method_std,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        # Releases before 4.56 read the second name only.
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def check_stored_shapes(shape: LlamaShape, stored: dict[str, tuple[int, ...]]) -> None:
    """Compares the tensors of a checkpoint with the ones that the model consists of.

    Args:
        shape: sizes of the model.
        stored: shape of every tensor of the checkpoint by key, optimizer state included.

    Raises:
        ValueError: naming a weight that is missing, not known, or of another shape.
    """
    expected = shape.megatron_shapes()
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        raise ValueError(f"the checkpoint has no {', '.join(missing)}: it is no dense GPT model.")
    unknown = sorted(
        key for key in stored if key.startswith(_MODEL_PREFIXES) and key not in expected
    )
    if unknown:
        raise ValueError(
            f"the checkpoint has {', '.join(unknown)}, which the Llama architecture has no place "
            "for: it cannot be exported without changing the model."
        )
    for key, size in expected.items():
        if tuple(stored[key]) != size:
            raise ValueError(
                f"{key} has shape {list(stored[key])} in the checkpoint and its training arguments "
                f"give {list(size)}: the folder mixes two models."
            )


def to_llama(shape: LlamaShape, key: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face weights that one Megatron weight holds.

    Args:
        shape: sizes of the model.
        key: key of the weight in a torch_dist checkpoint.
        weight: the whole tensor, with the shape that ``LlamaShape.megatron_shapes`` gives.

    Yields:
        Names and views of ``weight``; no copy is made where the layout allows it.
    """
    if key == _EMBEDDING:
        yield "model.embed_tokens.weight", weight[: shape.vocabulary]
    elif key == _OUTPUT:
        yield "lm_head.weight", weight[: shape.vocabulary]
    elif key == _FINAL_NORM:
        yield "model.norm.weight", weight
    else:
        for layer, layer_weight in enumerate(weight.unbind(0)):
            for name, part in _LAYER_PARTS[key.removeprefix(_LAYER)](shape, layer_weight).items():
                yield f"model.layers.{layer}.{name}.weight", part


def _renamed(name: str) -> Callable[[LlamaShape, Tensor], dict[str, Tensor]]:
    return lambda shape, weight: {name: weight}


def _split_qkv(shape: LlamaShape, weight: Tensor) -> dict[str, Tensor]:
    """Takes apart [G(q+2)d, h]: for each group q query heads, a key head and a value head."""
    queries = shape.heads // shape.kv_heads
    groups = weight.view(shape.kv_heads, queries + 2, shape.head_dim, shape.hidden)
    parts = {
        "q_proj": groups[:, :queries],
        "k_proj": groups[:, queries],
        "v_proj": groups[:, queries + 1],
    }
    return {f"self_attn.{name}": part.reshape(-1, shape.hidden) for name, part in parts.items()}


def _split_gate_and_up(shape: LlamaShape, weight: Tensor) -> dict[str, Tensor]:
    gate, up = weight.chunk(2, dim=0)
    return {"mlp.gate_proj": gate, "mlp.up_proj": up}


_LAYER_PARTS: dict[str, Callable[[LlamaShape, Tensor], dict[str, Tensor]]] = {
    "self_attention.linear_qkv.layer_norm_weight": _renamed("input_layernorm"),
    "self_attention.linear_qkv.weight": _split_qkv,
    "self_attention.linear_proj.weight": _renamed("self_attn.o_proj"),
    "mlp.linear_fc1.layer_norm_weight": _renamed("post_attention_layernorm"),
    "mlp.linear_fc1.weight": _split_gate_and_up,
    "mlp.linear_fc2.weight": _renamed("mlp.down_proj"),
}
