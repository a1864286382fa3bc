"""From the ``config.json`` of a Hugging Face model to Megatron's arguments."""

from __future__ import annotations

import copy
import json
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_tst.checkpoint.hf_expert_arguments import (
    expert_arguments,
    expert_sizes,
    is_mixture,
    unsupported_experts,
)
from megatron_tst.checkpoint.hf_rope import rope_arguments, unsupported_rope
from megatron_tst.checkpoint.hf_shapes import ModelShape, layer_pattern
from megatron_tst.common.command_parser import RaisingParser
from megatron_tst.common.errors import UsageError

_ANYTHING_ELSE = "Megatron computes something else, so that it cannot be imported"
# Settings that Megatron's model of the same weights has no argument for, and the values that can
# be expressed.
_SETTINGS: tuple[tuple[Any, ...], ...] = (
    ("hidden_act", "silu"),
    ("attention_bias", False),
    ("mlp_bias", False),
    ("use_sliding_window", False),
    ("quantization_config", None),
)


# What keeps other much used architectures out.
_MLA = "multi-head latent attention, which no class here has"
_LACKING = {
    "DeepseekV3ForCausalLM": _MLA,
    "KimiK25ForConditionalGeneration": _MLA,
    "GlmMoeDsaForCausalLM": _MLA,
    "Gemma3ForCausalLM": "norms around each half of a layer, local layers",
    "Gemma3ForConditionalGeneration": "images, norms around each half of a layer, local layers",
    "GptOssForCausalLM": "attention sinks, local layers, biases of experts",
    "Olmo3ForCausalLM": "norms behind each half of a layer, local layers",
    "SmolLM3ForCausalLM": "layers without RoPE",
    "Llama4ForConditionalGeneration": "images, layers without RoPE, chunked attention",
    "Qwen3NextForCausalLM": "linear attention",
    "Phi3ForCausalLM": "queries, keys and values in one weight",
    "NemotronHForCausalLM": "Mamba layers",
}


def read_config(content: Mapping[str, Any], named: str) -> Any:
    """The settings of a model as transformers understands them, with its defaults.

    Args:
        content: of ``config.json``, as transformers 4 or 5 writes it.
        named: the folder, for messages.

    Returns:
        The settings of the class that ``architectures`` names.

    Raises:
        UsageError: another architecture, or settings that transformers refuses or that Megatron
            cannot express.
    """
    # Here, because the import takes seconds.
    from transformers import (
        Glm4MoeConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen2MoeConfig,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    classes = {
        "LlamaForCausalLM": LlamaConfig,
        # Of Mistral's models those that see all positions: they compute what Llama does.
        "MistralForCausalLM": MistralConfig,
        "Qwen2ForCausalLM": Qwen2Config,
        "Qwen3ForCausalLM": Qwen3Config,
        "Qwen2MoeForCausalLM": Qwen2MoeConfig,
        "Qwen3MoeForCausalLM": Qwen3MoeConfig,
        "Glm4MoeForCausalLM": Glm4MoeConfig,
    }
    found = content.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UsageError(
            f"{named}: config.json has architectures {json.dumps(found)}: write a list with the "
            'name of its class, such as ["LlamaForCausalLM"].'
        )
    if len(found) != 1 or found[0] not in classes:
        lacking = "".join(f" ({_LACKING[name]})" for name in found if name in _LACKING)
        raise UsageError(
            f"{named} is of architecture {', '.join(found) or '(none in config.json)'}{lacking}: "
            f"what can be imported is {', '.join(classes)}."
        )
    try:
        config: Any = classes[found[0]].from_dict(copy.deepcopy(dict(content)))
        unsupported = list(_unsupported(config))
    # transformers and its checks raise all kinds over bad values.
    except Exception as error:
        raise UsageError(
            f"{named}: config.json is refused by transformers ({' '.join(str(error).split())})."
        ) from error
    if unsupported:
        raise UsageError(f"{named} has {', '.join(unsupported)}: {_ANYTHING_ELSE}.")
    _check_heads(config, named)
    return config


def _check_heads(config: Any, named: str) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    # None stands for as many as there are query heads.
    if heads < 1 or (kv_heads is not None and (kv_heads < 1 or heads % kv_heads)):
        raise UsageError(
            f"{named}: config.json has num_attention_heads {heads} and num_key_value_heads "
            f"{kv_heads}, and each key head is of the same number of query heads: copy it again."
        )


def _unsupported(config: Any) -> Iterator[str]:
    is_glm = config.architectures[0] == "Glm4MoeForCausalLM"
    for name, *allowed in _SETTINGS:
        if is_glm and name == "attention_bias":
            # Of queries, keys and values only, unlike in the other classes.
            continue
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            yield f"{name} {value}"
    if config.architectures[0] == "MistralForCausalLM" and config.sliding_window is not None:
        yield f"sliding_window {config.sliding_window}"
    rope = config.rope_parameters
    if not is_glm and rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor {rope['partial_rotary_factor']}"
    yield from unsupported_rope(rope)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        yield f"layer_types {', '.join(sorted(kinds))}"
    if is_mixture(config):
        yield from unsupported_experts(config)


def shape_from_config(config: Any, vocabulary_multiple: int) -> ModelShape:
    """The sizes of a model.

    Args:
        config: as :func:`read_config` gives it.
        vocabulary_multiple: the vocabulary is padded to a multiple of it.
    """
    architecture = config.architectures[0]
    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.moe_intermediate_size if is_mixture(config) else config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        # What the models of transformers do; not every class of settings has it.
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        padded_vocabulary=-(-config.vocab_size // vocabulary_multiple) * vocabulary_multiple,
        tied=config.tie_word_embeddings,
        # GLM-4 has a setting for it.
        qk_norm=getattr(config, "use_qk_norm", architecture.startswith("Qwen3")),
        qkv_bias=_has_qkv_bias(config),
        **(expert_sizes(config) if is_mixture(config) else {}),
    )


def megatron_arguments(config: Any, shape: ModelShape, hybrid: bool) -> list[list[str]]:
    """Every argument of Megatron that the model needs, each with its value if it has one.

    Args:
        config: as :func:`read_config` gives it.
        shape: its sizes.
        hybrid: whether Megatron's model is a ``HybridModel``.
    """
    values: dict[str, Any] = {
        "num-layers": None if hybrid else shape.layers,
        "hybrid-layer-pattern": layer_pattern(shape) if hybrid else None,
        "hidden-size": shape.hidden,
        "ffn-hidden-size": config.intermediate_size,
        "num-attention-heads": shape.heads,
        "group-query-attention": shape.kv_heads != shape.heads,
        "num-query-groups": shape.kv_heads if shape.kv_heads != shape.heads else None,
        "kv-channels": shape.head_dim,
        "qk-layernorm": shape.qk_norm,
        "max-position-embeddings": config.max_position_embeddings,
        **rope_arguments(config.rope_parameters),
        "rotary-percent": _rotary_percent(config),
        "normalization": "RMSNorm",
        "norm-epsilon": config.rms_norm_eps,
        "swiglu": True,
        "disable-bias-linear": True,
        "add-qkv-bias": shape.qkv_bias,
        "attention-dropout": config.attention_dropout,
        "hidden-dropout": 0.0,
        "init-method-std": config.initializer_range,
        "untie-embeddings-and-output-weights": not shape.tied,
        # Not left to Megatron, which would pad the size of the tokenizer.
        "padded-vocab-size": shape.padded_vocabulary,
    }
    if shape.experts:
        values |= expert_arguments(config, shape)
    if hybrid:
        # The pattern says it.
        values.pop("moe-layer-freq", None)
    return [
        [f"--{name}"] if value is True else [f"--{name}", str(value)]
        for name, value in values.items()
        if value is not None and value is not False
    ]


def _has_qkv_bias(config: Any) -> bool:
    match config.architectures[0]:
        case "Qwen2ForCausalLM":
            return True
        case "Glm4MoeForCausalLM":
            return bool(config.attention_bias)
        case "Qwen2MoeForCausalLM":
            return bool(config.qkv_bias)
    return False


def _rotary_percent(config: Any) -> float | None:
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return None if factor == 1.0 else factor


def parse_arguments(arguments: Sequence[str]) -> Namespace:
    """Parses arguments with Megatron's own parser: the rest are its defaults.

    Raises:
        UsageError: as argparse words it.
    """
    # Here, because importing Megatron takes seconds. It warns of GPU libraries not needed here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.arguments import add_megatron_arguments

        parser = add_megatron_arguments(RaisingParser(allow_abbrev=False))
    parsed: Namespace = parser.parse_args(list(arguments))
    return parsed
