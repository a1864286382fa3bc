"""The weight map between Megatron and Hugging Face, without any checkpoint."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_tst.checkpoint.hf_config import huggingface_config
from megatron_tst.checkpoint.hf_mapping import (
    KeyLayout,
    MegatronSlice,
    check_stored_shapes,
    find_layout,
    stored_shapes,
    weight_slices,
)
from megatron_tst.checkpoint.hf_shapes import ModelShape, shape_from_arguments
from megatron_tst.common.errors import UsageError

GQA = ModelShape(
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
MOE = replace(GQA, qk_norm=True, experts=3, ffn=8, dense_ffn=20)
MIXED = replace(MOE, dense_layers=(1,))
SHARED = replace(MOE, qk_norm=False, shared_ffn=6, qkv_bias=True)
SIGMOID = replace(SHARED, shared_ffn=16, sigmoid_router=True, dense_layers=(0,))
SHAPES = {
    "GQA": GQA,
    "MHA": replace(GQA, kv_heads=6),
    "MQA": replace(GQA, kv_heads=1),
    "tied": replace(GQA, tied=True),
    "QK-norm": replace(GQA, qk_norm=True),
    "experts": MOE,
    "tied experts": replace(MOE, tied=True),
    "dense layers": replace(MOE, dense_layers=(0,)),
    "shared": SHARED,
    "sigmoid": SIGMOID,
}
LAYOUTS = {
    "stacked": KeyLayout(),
    "Transformer Engine": KeyLayout(fused_norm=False),
    "numbered": KeyLayout(stacked=False),
    "hybrid": KeyLayout(hybrid=True, stacked=False, fused_norm=False),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


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


def expert_arguments(**changes: Any) -> Namespace:
    """Megatron's arguments of a model with the shape ``MOE``."""
    values = {
        "num_experts": 3,
        "moe_ffn_hidden_size": 8,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": 0.01,
        "moe_router_load_balancing_type": "aux_loss",
        "qk_layernorm": True,
    }
    return arguments(**values | changes)


def shared_arguments(**changes: Any) -> Namespace:
    """Megatron's arguments of a model with the shape ``SHARED``."""
    values = {
        "qk_layernorm": False,
        "add_qkv_bias": True,
        "moe_shared_expert_intermediate_size": 6,
        "moe_shared_expert_gate": True,
    }
    return expert_arguments(**values | changes)


def sigmoid_arguments(**changes: Any) -> Namespace:
    """Megatron's arguments of a model with the shape ``SIGMOID``."""
    values = {
        "rotary_percent": 0.5,
        "moe_layer_freq": [0, 1],
        "moe_shared_expert_intermediate_size": 16,
        "moe_shared_expert_gate": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
    }
    return shared_arguments(**values | changes)


def random_slice(part: MegatronSlice) -> torch.Tensor:
    return torch.randn(part.size, generator=torch.Generator().manual_seed(0))


def find(shape: ModelShape, key: str) -> MegatronSlice:
    """The first slice of a tensor."""
    return next(part for part in weight_slices(shape, KeyLayout()) if part.key == key)


@each_shape
@each_layout
def test_names_and_shapes_are_those_of_transformers(shape: ModelShape, layout: KeyLayout) -> None:
    args = arguments()
    if shape.experts:
        args = sigmoid_arguments() if shape.sigmoid_router else expert_arguments()
    config = huggingface_config(shape, args, "float32", bos_id=None, eos_id=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert type(model).__name__ == shape.architecture
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    bias = "e_score_correction_bias"
    expected |= {n: tuple(b.shape) for n, b in model.named_buffers() if n.endswith(bias)}
    found: dict[str, tuple[int, ...]] = {}
    for part in weight_slices(shape, layout):
        assert not found.keys() & set(part.names)
        found |= part.sizes()
    # transformers holds the experts of a layer in one tensor and saves each of them.
    for name in [name for name in expected if ".experts." in name]:
        prefix, fused = name.rsplit(".", 1)
        experts, rows, columns = expected.pop(name)
        for expert in range(experts):
            for kind in ("gate", "up") if fused == "gate_up_proj" else ("down",):
                height = rows // 2 if kind != "down" else rows
                expected[f"{prefix}.{expert}.{kind}_proj.weight"] = (height, columns)
    assert found == expected


@each_shape
def test_no_element_is_lost_or_used_twice(shape: ModelShape) -> None:
    for part in weight_slices(shape, KeyLayout()):
        weight = random_slice(part)
        if weight.shape[0] == shape.padded_vocabulary:
            weight[shape.vocabulary :] = 0
        split = torch.cat([each.flatten() for each in part.split(weight).values()])
        split = torch.cat([split, torch.zeros(weight.numel() - split.numel())])
        assert torch.equal(split.sort().values, weight.flatten().sort().values)


@given(
    kv_heads=st.integers(1, 4),
    queries=st.integers(1, 4),
    head_dim=st.sampled_from([1, 2, 6]),
    hidden=st.integers(1, 9),
    ffn=st.integers(1, 9),
    experts=st.integers(0, 3),
    padding=st.integers(0, 5),
    tied=st.booleans(),
    qk_norm=st.booleans(),
)
def test_there_and_back_changes_no_bit(
    kv_heads: int, queries: int, padding: int, experts: int, qk_norm: bool, **sizes: Any
) -> None:
    shape = ModelShape(
        layers=2,
        heads=kv_heads * queries,
        kv_heads=kv_heads,
        vocabulary=7,
        padded_vocabulary=7 + padding,
        experts=experts,
        qk_norm=qk_norm,
        **sizes,
    )
    for part in weight_slices(shape, KeyLayout()):
        weight = random_slice(part).bfloat16()
        if part.size[0] == shape.padded_vocabulary:
            weight[shape.vocabulary :] = 0
        split = part.split(weight)
        assert torch.equal(part.join(list(split.values())), weight)
        there = {name: torch.randn(each.shape).bfloat16() for name, each in split.items()}
        back = part.split(part.join(list(there.values())))
        assert all(torch.equal(back[name], there[name]) for name in there)


@each_layout
def test_slices_cover_the_stored_tensors(layout: KeyLayout) -> None:
    slices = weight_slices(MOE, layout)
    sizes = stored_shapes(slices)
    covered = {key: torch.zeros(size) for key, size in sizes.items()}
    for part in slices:
        covered[part.key][part.index] += torch.ones(part.size)
    assert all(bool((count == 1).all()) for count in covered.values())
    assert find_layout(sizes.keys()) == layout


def test_the_keys_of_a_hybrid_model() -> None:
    sizes = stored_shapes(weight_slices(replace(MOE, layers=1), LAYOUTS["hybrid"]))
    assert sizes == {
        "embedding.word_embeddings.weight": (16, 12),
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (12,),
        "decoder.layers.0.self_attention.linear_qkv.weight": (40, 12),
        "decoder.layers.0.self_attention.linear_proj.weight": (12, 24),
        "decoder.layers.0.self_attention.q_layernorm.weight": (4,),
        "decoder.layers.0.self_attention.k_layernorm.weight": (4,),
        "decoder.layers.1.pre_mlp_layernorm.weight": (12,),
        "decoder.layers.1.mlp.router.weight": (3, 12),
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight": (3, 16, 12),
        "decoder.layers.1.mlp.experts.experts.linear_fc2.weight": (3, 12, 8),
        "decoder.final_norm.weight": (12,),
        "output_layer.weight": (16, 12),
    }


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_qkv_rows_go_to_their_heads(kv_heads: int) -> None:
    """Every row is marked with (kind, head), laid out in groups as Megatron does."""
    shape = replace(GQA, kv_heads=kv_heads)
    queries = shape.heads // kv_heads
    rows: list[float] = []
    for group in range(kv_heads):
        marks = [100 + group * queries + q for q in range(queries)] + [200 + group, 300 + group]
        rows += [float(mark) for mark in marks for _ in range(shape.head_dim)]
    weight = torch.tensor(rows)[:, None].expand(-1, shape.hidden).contiguous()
    found = find(shape, "decoder.layers.self_attention.linear_qkv.weight").split(weight)
    for name, first, heads in (("q", 100, shape.heads), ("k", 200, kv_heads), ("v", 300, kv_heads)):
        part = found[f"model.layers.0.self_attn.{name}_proj.weight"]
        expected = torch.arange(first, first + heads).repeat_interleave(shape.head_dim)
        assert torch.equal(part[:, 0], expected.float())


@pytest.mark.parametrize(
    ("shape", "key", "name"),
    [
        (GQA, "decoder.layers.mlp.linear_fc1.weight", "mlp"),
        (MOE, "decoder.layers.mlp.experts.experts.linear_fc1.weight", "mlp.experts.0"),
    ],
)
def test_the_gate_comes_first(shape: ModelShape, key: str, name: str) -> None:
    weight = torch.arange(2 * shape.ffn).float()[:, None].expand(-1, shape.hidden)
    found = find(shape, key).split(weight)
    assert found[f"model.layers.0.{name}.gate_proj.weight"][0, 0] == 0
    assert found[f"model.layers.0.{name}.up_proj.weight"][0, 0] == shape.ffn


def test_padded_rows_are_left_out_and_come_back_as_zeros() -> None:
    part = find(GQA, "output_layer.weight")
    weight = random_slice(part)
    [(name, trimmed)] = part.split(weight).items()
    assert name == "lm_head.weight"
    assert torch.equal(trimmed, weight[: GQA.vocabulary])
    padded = part.join([trimmed])
    assert torch.equal(padded[: GQA.vocabulary], trimmed)
    assert not padded[GQA.vocabulary :].any()


def test_the_shape_is_read_from_the_arguments() -> None:
    assert shape_from_arguments(arguments(), vocabulary=10) == GQA
    without_groups = arguments(group_query_attention=False, num_query_groups=1)
    assert shape_from_arguments(without_groups, 10).kv_heads == 6
    assert shape_from_arguments(expert_arguments(), 10) == MOE
    # Megatron's default for the size of an expert.
    assert shape_from_arguments(expert_arguments(moe_ffn_hidden_size=None), 10).ffn == 20
    for frequency in (2, [1, 0]):
        assert shape_from_arguments(expert_arguments(moe_layer_freq=frequency), 10) == MIXED
    assert shape_from_arguments(shared_arguments(), 10) == SHARED
    assert shape_from_arguments(sigmoid_arguments(), 10) == SIGMOID


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        *(("*-*-", GQA), ("*-|*-", GQA), ("*E*E", MOE), ("*E|*E", MOE), ("*E*-", MIXED)),
        *(("*-*-/*-", GQA), ("*E|*E/**/**", MOE)),
    ],
)
def test_the_shape_of_a_hybrid_model(pattern: str, shape: ModelShape) -> None:
    spec = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
    args = expert_arguments if shape.experts else arguments
    changes = {"hybrid_layer_pattern": pattern, "num_layers": 4, "spec": spec}
    assert shape_from_arguments(args(**changes), 10) == shape


@pytest.mark.parametrize(
    "pattern",
    ["M-M*", "-*-*", "**--", "*-*", "G-*-", "+-+-"],
)
def test_other_hybrid_models_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=f"--hybrid-layer-pattern {re.escape(pattern)} "):
        shape_from_arguments(arguments(hybrid_layer_pattern=pattern), vocabulary=10)


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("normalization", "LayerNorm", "--normalization"),
        ("swiglu", False, "--swiglu"),
        ("add_bias_linear", True, "--disable-bias-linear"),
        ("multi_latent_attention", True, "--multi-latent-attention"),
        ("position_embedding_type", "learned_absolute", "--position-embedding-type"),
        ("position_embedding_type", "none", "--position-embedding-type"),
        ("rotary_percent", 0.5, "--rotary-percent"),
        ("rotary_interleaved", True, "--rotary-interleaved"),
        ("no_rope_freq", 4, "--no-rope-freq"),
        ("layernorm_zero_centered_gamma", True, "--apply-layernorm-1p"),
        ("softmax_type", "learnable", "--softmax-type"),
        ("window_size", (128, 0), "--window-size"),
        ("use_mup", True, "--use-mup"),
        ("spec", ["my.layers", "spec"], "--spec"),
    ],
)
def test_what_no_class_can_express_is_refused_by_name(
    argument: str, value: object, named: str
) -> None:
    for args in (arguments, expert_arguments):
        with pytest.raises(ValueError, match=named):
            shape_from_arguments(args(**{argument: value}), vocabulary=10)


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("qk_layernorm", False, "--num-experts without --qk-layernorm"),
        ("moe_shared_expert_intermediate_size", 64, "--moe-shared-expert-intermediate-size"),
        ("moe_router_score_function", "sqrtsoftplus", "--moe-router-score-function"),
        ("moe_router_score_function", "sigmoid", "--moe-router-score-function sigmoid with"),
        ("moe_router_enable_expert_bias", True, "--moe-router-enable-expert-bias"),
        ("moe_router_topk_scaling_factor", 2.5, "--moe-router-topk-scaling-factor"),
        ("moe_router_num_groups", 2, "--moe-router-num-groups"),
        ("moe_router_load_balancing_type", "sinkhorn", "sinkhorn"),
        ("moe_router_load_balancing_type", ["sinkhorn"], "sinkhorn"),
        ("moe_router_load_balancing_type", "quantile_balancing", "type quantile_balancing"),
        ("moe_router_force_load_balancing", True, "--moe-router-force-load-balancing"),
        ("moe_router_force_biased", 0.5, "--moe-router-force-biased 0.5"),
        ("moe_expert_capacity_factor", 1.0, "--moe-expert-capacity-factor"),
        ("moe_expert_rank_capacity_factor", 1.5, "--moe-expert-rank-capacity-factor 1.5"),
        ("moe_mlp_glu_interleave_size", 32, "--moe-mlp-glu-interleave-size"),
    ],
)
def test_what_qwen3_moe_cannot_express_is_refused_by_name(
    argument: str, value: object, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        shape_from_arguments(expert_arguments(**{argument: value}), vocabulary=10)
    # The same flag is without effect in a model that has no experts.
    shape_from_arguments(arguments(**{argument: value}), vocabulary=10)


def test_a_capacity_beyond_which_nothing_is_dropped() -> None:
    """With ncclep a run ends over it."""
    args = expert_arguments(
        moe_expert_rank_capacity_factor=1.5, moe_flex_dispatcher_backend="ncclep"
    )
    assert shape_from_arguments(args, 10) == MOE


@pytest.mark.parametrize(
    ("args", "absent"),
    [
        (arguments(), ("layernorm_epsilon", "init_method_std")),
        (arguments(), ("num_layers",)),
        (arguments(), ("num_query_groups",)),
        (expert_arguments(), ("moe_router_topk", "moe_aux_loss_coeff")),
        # What releases before core 0.19 lack, which had other numbers for gpt-oss.
        (arguments(position_embedding_type="yarn"), ("mscale", "yarn_beta_fast")),
    ],
)
def test_an_argument_that_is_absent_is_named(args: Namespace, absent: tuple[str, ...]) -> None:
    for name in absent:
        vars(args).pop(name, None)
    with pytest.raises(UsageError, match=f"have no .*{'.*'.join(absent)}.*: Megatron of another"):
        shape_from_arguments(args, 10)


def test_arguments_that_older_releases_lack() -> None:
    """Experts as large as the MLP (until core 0.8), and a scale of 8 (until core 0.10)."""
    args = expert_arguments(use_rope_scaling=True)
    del args.moe_ffn_hidden_size
    assert shape_from_arguments(args, 10).ffn == 20
    assert huggingface_config(MOE, args, "float32", 0, 1)["rope_scaling"]["factor"] == 8


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qk_layernorm": True}, "--moe-shared-expert-intermediate-size with --qk-layernorm"),
        ({"moe_shared_expert_gate": False}, "without --moe-shared-expert-gate"),
        ({"moe_router_topk_scaling_factor": 2.5}, "--moe-router-topk-scaling-factor 2.5"),
        ({"rotary_percent": 0.5}, "--rotary-percent 0.5"),
    ],
)
def test_what_qwen2_moe_cannot_express(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        shape_from_arguments(shared_arguments(**changes), vocabulary=10)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe_router_enable_expert_bias": False}, "without --moe-router-enable-expert-bias"),
        ({"moe_shared_expert_gate": True}, "sigmoid with --moe-shared-expert-gate"),
        ({"moe_shared_expert_intermediate_size": None}, "intermediate-size 0 .no multiple"),
        ({"moe_shared_expert_intermediate_size": 12}, "intermediate-size 12 .no multiple"),
        ({"moe_layer_freq": [1, 0]}, "layers without experts after one that has some"),
        (
            {"moe_router_num_groups": 3, "moe_router_group_topk": 2},
            "--moe-router-group-topk 2 and --moe-router-topk 2 .not twice",
        ),
    ],
)
def test_what_glm4_moe_cannot_express(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        shape_from_arguments(sigmoid_arguments(**changes), vocabulary=10)


def test_groups_and_bias_of_sigmoid_routers() -> None:
    args = sigmoid_arguments(moe_router_num_groups=3, moe_router_group_topk=1)
    assert shape_from_arguments(args, 10) == SIGMOID
    config = huggingface_config(SIGMOID, args, "bfloat16", None, 1)
    assert (config["n_group"], config["topk_group"]) == (3, 1)
    assert (config["first_k_dense_replace"], config["n_shared_experts"]) == (1, 2)
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert config["routed_scaling_factor"] == 2.5
    # A choice from all groups is none.
    args = sigmoid_arguments(moe_router_num_groups=3, moe_router_group_topk=3)
    config = huggingface_config(SIGMOID, args, "bfloat16", None, 1)
    assert (config["n_group"], config["topk_group"]) == (1, 1)
    kept = [part.key for part in weight_slices(SIGMOID, KeyLayout()) if part.keeps_dtype]
    assert kept == ["decoder.layers.mlp.router.expert_bias"]


def test_all_refusals_come_at_once() -> None:
    args = expert_arguments(use_mup=True, moe_latent_size=2, normalization="LayerNorm")
    with pytest.raises(
        ValueError, match="--normalization LayerNorm, --use-mup, --moe-latent-size 2"
    ):
        shape_from_arguments(args, 10)


def test_stored_tensors_must_be_those_of_the_model() -> None:
    layout = KeyLayout()
    stored = stored_shapes(weight_slices(GQA, layout))
    check_stored_shapes(GQA, layout, {**stored, "optimizer.state.exp_avg.decoder.x": (1,)})
    bias = "decoder.layers.mlp.linear_fc1.bias"
    with pytest.raises(ValueError, match=f"has {bias}, which"):
        check_stored_shapes(GQA, layout, {**stored, bias: (2, 40)})
    incomplete = {key: size for key, size in stored.items() if key != "output_layer.weight"}
    with pytest.raises(ValueError, match=r"has no output_layer\.weight"):
        check_stored_shapes(GQA, layout, incomplete)
    with pytest.raises(ValueError, match=r"shape \[13\] .* give \[12\]"):
        check_stored_shapes(GQA, layout, {**stored, "decoder.final_layernorm.weight": (13,)})


@pytest.mark.parametrize("extra", ["pre_mlp_layernorm.weight", "mlp.experts.experts._extra_state"])
def test_keys_of_both_kinds_of_modules_and_their_state(extra: str) -> None:
    """The norm before the experts may be there under both names; states of modules are skipped."""
    stored = stored_shapes(weight_slices(MOE, KeyLayout())) | {f"decoder.layers.{extra}": (2, 12)}
    check_stored_shapes(MOE, find_layout(stored), stored)


def test_rotary_base_is_written_for_old_and_new_readers() -> None:
    config = huggingface_config(GQA, arguments(), "bfloat16", bos_id=0, eos_id=1)
    assert config["rope_theta"] == 500_000
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500_000}
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_experts_are_described_for_old_and_new_readers() -> None:
    config = huggingface_config(MOE, expert_arguments(), "bfloat16", bos_id=0, eos_id=1)
    assert config["num_experts"] == config["num_local_experts"] == 3
    assert config["num_experts_per_tok"] == 2
    assert config["moe_intermediate_size"] == 8
    # The default of transformers is False, with which the outputs are others.
    assert config["norm_topk_prob"] is True
    raw = expert_arguments(moe_router_pre_softmax=True)
    assert not huggingface_config(MOE, raw, "bfloat16", None, 1)["norm_topk_prob"]
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [])
