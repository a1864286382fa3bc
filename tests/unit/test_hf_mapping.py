"""The weight map between Megatron and Hugging Face, without any checkpoint."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_tst.checkpoint.hf_mapping import (
    LlamaShape,
    check_stored_shapes,
    llama_config,
    llama_shape,
    to_llama,
)

GQA = LlamaShape(
    layers=2,
    hidden=12,
    ffn=20,
    heads=6,
    kv_heads=2,
    head_dim=4,
    vocabulary=10,
    padded_vocabulary=16,
    tied=False,
)
SHAPES = [GQA, replace(GQA, kv_heads=6), replace(GQA, tied=True), replace(GQA, kv_heads=1)]


def arguments(**changes: Any) -> Namespace:
    """Megatron's arguments of a model with the shape ``GQA``."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 12,
        "ffn_hidden_size": 20,
        "num_attention_heads": 6,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 4,
        "padded_vocab_size": 16,
        "untie_embeddings_and_output_weights": True,
        "max_position_embeddings": 32,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 500_000,
        "init_method_std": 0.02,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
    }
    return Namespace(**values | changes)


def megatron_weights(shape: LlamaShape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(size, generator=generator) for key, size in shape.megatron_shapes().items()
    }


def exported(shape: LlamaShape, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: part for key, weight in weights.items() for name, part in to_llama(shape, key, weight)
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_shapes_are_those_of_transformers(shape: LlamaShape) -> None:
    args = arguments(num_query_groups=shape.kv_heads)
    config = LlamaConfig(**llama_config(shape, args, "float32", bos_id=None, eos_id=1))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found = exported(shape, megatron_weights(shape))
    assert {name: tuple(weight.shape) for name, weight in found.items()} == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_no_weight_is_lost_or_written_twice(shape: LlamaShape) -> None:
    weights = megatron_weights(shape)
    for key in weights.keys() & {"embedding.word_embeddings.weight", "output_layer.weight"}:
        weights[key] = weights[key][: shape.vocabulary]
    before = torch.cat([weight.flatten() for weight in weights.values()]).sort().values
    parts = exported(shape, weights).values()
    after = torch.cat([part.flatten() for part in parts]).sort().values
    assert torch.equal(before, after)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_qkv_rows_go_to_their_heads(kv_heads: int) -> None:
    """Every row is marked with (kind, head), laid out in groups as Megatron does."""
    shape = replace(GQA, kv_heads=kv_heads)
    queries = shape.heads // kv_heads
    rows: list[float] = []
    for group in range(kv_heads):
        marks = [100 + group * queries + q for q in range(queries)] + [200 + group, 300 + group]
        rows += [float(mark) for mark in marks for _ in range(shape.head_dim)]
    weight = torch.tensor(rows)[None, :, None].expand(1, -1, shape.hidden)
    key = "decoder.layers.self_attention.linear_qkv.weight"
    found = dict(to_llama(shape, key, weight.contiguous()))
    for name, first, heads in (("q", 100, shape.heads), ("k", 200, kv_heads), ("v", 300, kv_heads)):
        part = found[f"model.layers.0.self_attn.{name}_proj.weight"]
        expected = torch.arange(first, first + heads).repeat_interleave(shape.head_dim)
        assert torch.equal(part[:, 0], expected.float())


def test_the_gate_comes_first() -> None:
    weight = torch.arange(2 * GQA.ffn).float()[None, :, None].expand(1, -1, GQA.hidden)
    found = dict(to_llama(GQA, "decoder.layers.mlp.linear_fc1.weight", weight))
    assert found["model.layers.0.mlp.gate_proj.weight"][0, 0] == 0
    assert found["model.layers.0.mlp.up_proj.weight"][0, 0] == GQA.ffn


def test_padded_rows_are_left_out() -> None:
    weight = megatron_weights(GQA)["output_layer.weight"]
    [(name, part)] = to_llama(GQA, "output_layer.weight", weight)
    assert name == "lm_head.weight"
    assert torch.equal(part, weight[: GQA.vocabulary])


def test_the_shape_is_read_from_the_arguments() -> None:
    assert llama_shape(arguments(), vocabulary=10) == GQA
    without_groups = llama_shape(arguments(group_query_attention=False, num_query_groups=1), 10)
    assert without_groups.kv_heads == 6


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("normalization", "LayerNorm", "--normalization"),
        ("swiglu", False, "--swiglu"),
        ("add_bias_linear", True, "--disable-bias-linear"),
        ("add_qkv_bias", True, "--add-qkv-bias"),
        ("num_experts", 8, "--num-experts"),
        ("multi_latent_attention", True, "--multi-latent-attention"),
        ("position_embedding_type", "learned_absolute", "--position-embedding-type"),
        ("rotary_percent", 0.5, "--rotary-percent"),
        ("rotary_interleaved", True, "--rotary-interleaved"),
        ("use_rope_scaling", True, "--use-rope-scaling"),
        ("no_rope_freq", 4, "--no-rope-freq"),
        ("qk_layernorm", True, "--qk-layernorm"),
        ("layernorm_zero_centered_gamma", True, "--apply-layernorm-1p"),
        ("softmax_type", "learnable", "--softmax-type"),
        ("window_size", (128, 0), "--window-size"),
        ("use_mup", True, "--use-mup"),
        ("mtp_num_layers", 1, "--mtp-num-layers"),
        ("hybrid_layer_pattern", "M-M*", "--hybrid-layer-pattern"),
    ],
)
def test_what_llama_cannot_express_is_refused_by_name(
    argument: str, value: object, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        llama_shape(arguments(**{argument: value}), vocabulary=10)


def test_all_refusals_come_at_once() -> None:
    with pytest.raises(ValueError, match=r"--num-experts, --qk-layernorm"):
        llama_shape(arguments(num_experts=8, qk_layernorm=True), vocabulary=10)


def test_stored_tensors_must_be_those_of_the_model() -> None:
    stored = GQA.megatron_shapes()
    check_stored_shapes(GQA, {**stored, "optimizer.state.exp_avg.decoder.x": (1,)})
    bias = "decoder.layers.mlp.linear_fc1.bias"
    with pytest.raises(ValueError, match=f"has {bias}, which"):
        check_stored_shapes(GQA, {**stored, bias: (2, 40)})
    with pytest.raises(ValueError, match=r"has no output_layer\.weight"):
        check_stored_shapes(GQA, {k: v for k, v in stored.items() if k != "output_layer.weight"})
    with pytest.raises(ValueError, match=r"shape \[13\] .* give \[12\]"):
        check_stored_shapes(GQA, {**stored, "decoder.final_layernorm.weight": (13,)})


def test_rotary_base_is_written_for_old_and_new_readers() -> None:
    config = llama_config(GQA, arguments(), "bfloat16", bos_id=0, eos_id=1)
    assert config["rope_theta"] == 500_000
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500_000}
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
