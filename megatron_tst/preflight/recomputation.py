"""What recomputation leaves: which tensors of a layer, and of which layers the inputs alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def recomputed_modules(args: argparse.Namespace) -> list[str]:
    """What is computed again of each layer, as the configuration of the model has it.

    Megatron completes it there and not in the arguments (megatron/core/transformer/
    transformer_config.py).

    Args:
        args: validated command line.
    """
    if args.recompute_granularity != "selective" and not args.moe_layer_recompute:
        return []
    modules = ["core_attn"] if args.recompute_modules is None else list(args.recompute_modules)
    return [*modules, "moe"] if args.moe_layer_recompute else modules


def dropped_tensors(args: argparse.Namespace, is_moe: bool, is_fp8: bool) -> set[str]:
    """Tensors of ``activations.layer_bytes`` that are computed again instead of kept.

    A module that is computed again keeps its input, and what it hands on stays where the next one
    keeps it as its own input.

    Args:
        args: validated command line.
        is_moe: whether the MLP of the layer is a mixture of experts.
        is_fp8: whether its matrix products take FP8.
    """
    by_module = _of_attention(args, is_fp8)
    for module, names in (_of_experts() if is_moe else _of_mlp(args)).items():
        by_module[module] = by_module.get(module, set()) | names
    return {name for module in recomputed_modules(args) for name in by_module.get(module, ())}


def _has_fused_norms(args: argparse.Namespace) -> bool:
    """Whether Transformer Engine's linear layers have the norm before them inside."""
    return bool(args.transformer_impl != "local")


def _of_attention(args: argparse.Namespace, is_fp8: bool) -> dict[str, set[str]]:
    is_fused = _has_fused_norms(args)
    # Latent attention has its norm apart, unless its down projections are one.
    is_norm_apart = not is_fused or (args.multi_latent_attention and not args.mla_down_proj_fusion)
    # In bf16 the projection keeps the output as its input, and so does a gate.
    is_output_dropped = is_fp8 and not args.attention_output_gate
    return {
        "core_attn": {"attention output"} if is_output_dropped else set(),
        "mla_up_proj": {"query, key, value"} | ({"normed latent"} if is_fused else set()),
        "layernorm": {"normed attention input"} if is_norm_apart else set(),
    }


def _of_mlp(args: argparse.Namespace) -> dict[str, set[str]]:
    products, normed = {"gate and up", "activated"}, {"normed MLP input"}
    if _has_fused_norms(args):
        return {"mlp": products | normed}
    return {"mlp": products, "layernorm": normed}


def _of_experts() -> dict[str, set[str]]:
    shared = {"shared gate and up", "shared activated"}
    return {
        "layernorm": {"normed MLP input"},
        "moe": {"router", "tokens of experts", "gate and up", "activated"} | shared,
        "moe_act": {"activated"},
        "shared_experts": shared,
    }


def kept_by_layers(args: argparse.Namespace, layers: Sequence[float], layer_input: float) -> float:
    """Bytes that the layers of a stage, or of a virtual one, keep.

    With ``--recompute-method block`` its first layers keep their inputs, and the others everything;
    with ``uniform`` each so many layers keep one input (megatron/core/recompute.py).

    Args:
        args: validated command line.
        layers: what each keeps without full recomputation, in order.
        layer_input: bytes of the input of one.
    """
    if args.recompute_granularity != "full":
        return sum(layers)
    if args.distribute_saved_activations:
        layer_input /= args.tensor_model_parallel_size
    count = args.recompute_num_layers
    if args.recompute_method == "block":
        return layer_input * min(count, len(layers)) + sum(layers[count:])
    return layer_input * -(-len(layers) // count)


def rebuilt_at_once(args: argparse.Namespace, layers: Sequence[float]) -> float:
    """Bytes that full recomputation computes again at once, of these layers at the most.

    Args:
        args: validated command line.
        layers: as in ``kept_by_layers``.
    """
    if args.recompute_granularity != "full":
        return 0.0
    count = args.recompute_num_layers
    if args.recompute_method == "block":
        return max(layers[:count], default=0.0)
    return max((sum(layers[i : i + count]) for i in range(0, len(layers), count)), default=0.0)


def recomputes_depths(args: argparse.Namespace) -> bool:
    """Whether depths of multi-token prediction are computed again whole; ``block`` skips them."""
    return bool(args.recompute_granularity == "full" and args.recompute_method == "uniform")
