"""Bytes that a transformer layer keeps for its backward: a formula, an estimate.

Counted are the tensors that autograd keeps with fused attention, norms and SwiGLU: inputs of
norms, inputs of matrix products, queries, keys, values and output of attention, and input of the
activation function. Biases, masks and statistics of rows are left out, and experts are taken to
get the same number of tokens each.
"""

from __future__ import annotations

import argparse

from megatron_tst.preflight.recomputation import dropped_tensors, recomputed_modules

_BF16, _FP32 = 2.0, 4.0
# E4M3 with a scale of a byte for each 32 values; other recipes have one scale a tensor.
_MXFP8 = 1 + 1 / 32


def fp8_bytes(args: argparse.Namespace) -> float:
    """Bytes of an FP8 value with its share of scales."""
    return _MXFP8 if args.fp8_recipe == "mxfp8" else 1.0


def layer_bytes(
    args: argparse.Namespace,
    is_moe: bool,
    is_fp8: bool,
    attention: bool = True,
    mlp: bool = True,
) -> dict[str, float]:
    """Bytes kept for each latent position of a rank, by tensor, after selective recomputation.

    What full recomputation leaves of layers is ``recomputation.kept_by_layers``.

    Args:
        args: validated command line.
        is_moe: whether its MLP is a mixture of experts.
        is_fp8: whether its matrix products take FP8.
        attention: whether it has attention, as not every layer of a HybridModel.
        mlp: whether it has an MLP.
    """
    of_layer = _latent_attention if args.multi_latent_attention else _attention
    kept = of_layer(args, is_fp8) if attention else {}
    if mlp:
        kept |= (_experts if is_moe else _mlp)(args, is_fp8)
    dropped = dropped_tensors(args, is_moe, is_fp8)
    return {name: size for name, size in kept.items() if name not in dropped}


def input_bytes(args: argparse.Namespace) -> float:
    """Bytes of the input of a layer for each latent position of a rank."""
    return _element(args) * args.hidden_size * _split(args)


def depth_bytes(args: argparse.Namespace, is_recomputed: bool) -> dict[str, float]:
    """Bytes that a depth of multi-token prediction keeps around its layers, as ``layer_bytes``.

    Args:
        args: validated command line.
        is_recomputed: whether the depth keeps but its input.
    """
    hidden = input_bytes(args)
    # The output feeds the next depth, and joined to those of the others the output layer.
    kept = {"embedding": hidden, "joined outputs": hidden}
    if is_recomputed:
        return kept
    return kept | {"normed pair": 2 * hidden, "layer output": hidden, "output": hidden}


def _element(args: argparse.Namespace) -> float:
    return _BF16 if args.bf16 or args.fp16 else _FP32


def _split(args: argparse.Namespace) -> float:
    """Share of the positions that a rank of the tensor-parallel group holds between layers."""
    return 1 / args.tensor_model_parallel_size if args.sequence_parallel else 1.0


def _attention(args: argparse.Namespace, is_fp8: bool) -> dict[str, float]:
    element, split = _element(args), _split(args)
    operand = fp8_bytes(args) if is_fp8 else element
    hidden, heads = args.hidden_size, args.num_attention_heads
    tensor = args.tensor_model_parallel_size
    # Without groups of queries the argument has a default of 1, which no model is built with.
    groups = args.num_query_groups if args.group_query_attention else heads
    # With fewer groups than ranks each rank has the keys and values of one.
    query, key = (n * args.kv_channels / tensor for n in (heads, max(groups, tensor)))
    kept = {
        "attention input": element * hidden * split,
        "normed attention input": operand * hidden * split,
        "query, key, value": element * (query + 2 * key),
        "attention output": element * query,
    }
    if is_fp8:
        # Attention keeps its output in bf16 and the projection keeps it in FP8.
        kept["projection input"] = operand * query
    if args.qk_layernorm:
        kept["query and key before norm"] = element * (query + key)
    if "core_attn" in recomputed_modules(args):
        # The value that is kept for it lies in all that the projection has computed, which ranks
        # gather where they share a group.
        parts = 1 if groups < tensor else tensor
        joined = ((1 + args.attention_output_gate) * heads + 2 * groups) * args.kv_channels / parts
        kept["joined query, key and value"] = element * (joined - key)
    if args.attention_output_gate:
        # Its sigmoid in fp32, and what it has scaled.
        kept["gate"] = (_FP32 + (0 if is_fp8 else element)) * query
    return kept


def _latent_attention(args: argparse.Namespace, is_fp8: bool) -> dict[str, float]:
    element, split = _element(args), _split(args)
    operand = fp8_bytes(args) if is_fp8 else element
    heads = args.num_attention_heads / args.tensor_model_parallel_size
    rotated, keys = args.qk_pos_emb_head_dim, args.qk_head_dim + args.qk_pos_emb_head_dim
    latent = (args.q_lora_rank or 0) + args.kv_lora_rank
    kept = {
        "attention input": element * args.hidden_size * split,
        "normed attention input": operand * args.hidden_size * split,
        # Before and behind their norms.
        "latent": element * (latent + rotated) * split,
        "normed latent": operand * latent * split,
        "query, key, value": element * heads * (2 * keys + args.v_head_dim),
        "attention output": element * heads * args.v_head_dim,
    }
    if is_fp8:
        kept["projection input"] = operand * heads * args.v_head_dim
    return kept


def _mlp(args: argparse.Namespace, is_fp8: bool) -> dict[str, float]:
    element, split = _element(args), _split(args)
    operand = fp8_bytes(args) if is_fp8 else element
    width = args.ffn_hidden_size / args.tensor_model_parallel_size
    return {
        "MLP input": element * args.hidden_size * split,
        "normed MLP input": operand * args.hidden_size * split,
        "gate and up": element * _gated(args) * width,
        "activated": operand * width,
    }


def _experts(args: argparse.Namespace, is_fp8: bool) -> dict[str, float]:
    element, split, hidden = _element(args), _split(args), args.hidden_size
    operand = fp8_bytes(args) if is_fp8 else element
    # Ranks of the tensor-parallel group have different tokens and pass them to the experts. Those
    # that share an expert gather its tokens, and each computes its part of the width.
    visits = args.moe_router_topk / args.tensor_model_parallel_size
    gathered = visits * args.expert_tensor_parallel_size
    width = args.moe_ffn_hidden_size
    kept = {
        "MLP input": element * hidden * split,
        "normed MLP input": element * hidden * split,
        "router": _FP32 * 2 * args.num_experts * split,
        "tokens of experts": operand * gathered * hidden,
        "gate and up": element * visits * _gated(args) * width,
        "activated": operand * visits * width,
    }
    shared = args.moe_shared_expert_intermediate_size
    if shared:
        shared /= args.tensor_model_parallel_size
        kept["shared gate and up"] = element * _gated(args) * shared
        kept["shared activated"] = operand * shared
    return kept


def _gated(args: argparse.Namespace) -> int:
    return 2 if args.swiglu else 1


def micro_batches_in_flight(args: argparse.Namespace, pipeline_rank: int, count: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all its layers.

    As Megatron's schedules warm up: 1F1B, and with virtual stages chunk by chunk.

    Args:
        args: validated command line.
        pipeline_rank: of the stage, from 0.
        count: micro-batches of a step.
    """
    stages = args.pipeline_model_parallel_size
    virtual = args.virtual_pipeline_model_parallel_size
    if virtual is None:
        return min(stages - pipeline_rank, count)
    group = args.microbatch_group_size_per_vp_stage or stages
    chunks = (stages - pipeline_rank - 1) * 2 + (virtual - 1) * group + 1
    return min(chunks, count * virtual) / virtual
