"""Settings of a model that Megatron-Core 0.19 does not heed where they are given."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_tst.settings.attention_layers import windows, without_positions

_MUP = {
    "mup_base_hidden_size": None,
    "mup_embedding_mult": 1.0,
    "mup_output_mult": 1.0,
    "mup_base_head_dim": None,
    "mup_attn_scale_power": 1.0,
}
_YARN = (
    *("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"),
    "yarn_correction_range_round_to_int",
)


def unheeded_model_settings(args: argparse.Namespace) -> Iterator[str]:
    """Settings of a model that would do nothing, or end in an error of the host.

    Args:
        args: parsed, not validated.

    Returns:
        Messages, each naming the argument, its value, the reason and the remedy.
    """
    pattern = args.hybrid_layer_pattern or ""
    reasons: dict[str, tuple[object, str]] = {
        "--position-embedding-type relative": (
            args.position_embedding_type == "relative",
            "the models here would train without positions, as only T5 has them",
        ),
        f"--fp8-output-proj with --hybrid-layer-pattern {pattern}": (
            args.fp8_output_proj and pattern,
            "Megatron's HybridModel has no such output layer (GPTModel, by --num-layers, has)",
        ),
        "--window-attn-skip-freq without --window-size": (
            args.window_attn_skip_freq is not None and not args.window_size,
            "no layer has a window",
        ),
        "--fp16-lm-cross-entropy": (
            args.fp16_lm_cross_entropy,
            "no model here looks at it",
        ),
        f"--mup-width-mult {args.mup_width_mult}": (
            args.mup_width_mult != 1.0,
            "Megatron computes it from --mup-base-hidden-size",
        ),
    }
    if args.fp8_output_proj:
        reasons |= _of_fp8_output(args)
    if not args.use_mup:
        for name, default in _MUP.items():
            reasons[_written(args, name)] = (
                getattr(args, name) != default,
                "it is part of --use-mup, which is not given",
            )
    if args.multi_latent_attention or set(pattern) & set("+D"):
        reasons |= _of_latent_attention(args)
    if pattern:
        reasons |= _of_layers(args)
    for setting, (is_set, reason) in reasons.items():
        if is_set:
            yield f"{setting} does not work: {reason}. Remove it."


def _of_fp8_output(args: argparse.Namespace) -> dict[str, tuple[object, str]]:
    layer = "Transformer Engine's output layer"
    return {
        "--fp8-output-proj without --untie-embeddings-and-output-weights": (
            not args.untie_embeddings_and_output_weights,
            f"{layer} must have a weight of its own",
        ),
        "--fp8-output-proj with --mtp-detach-heads": (
            args.mtp_detach_heads,
            f"{layer} does not take the detached weight",
        ),
        "--fp8-output-proj with --defer-embedding-wgrad-compute": (
            args.defer_embedding_wgrad_compute,
            f"{layer} has no buffers for it",
        ),
    }


def _of_latent_attention(args: argparse.Namespace) -> dict[str, tuple[object, str]]:
    ending = " with --multi-latent-attention"
    scale = "latent attention scales its scores by the root of the width of a head"
    reasons: dict[str, tuple[object, str]] = {
        _written(args, name) + ending: (getattr(args, name) != default, scale)
        for name, default in _MUP.items()
        if name in ("mup_base_head_dim", "mup_attn_scale_power")
    }
    reasons["--position-embedding-type yarn" + ending] = (
        args.position_embedding_type == "yarn",
        "latent attention rotates by itself (--rope-type yarn, its default, is heeded)",
    )
    for name in _YARN:
        reasons[_written(args, name) + ending] = (
            getattr(args, name) is not None,
            "Megatron takes the value of its own for latent attention",
        )
    return reasons


def _of_layers(args: argparse.Namespace) -> dict[str, tuple[object, str]]:
    """Numbers that name no layer of attention of a HybridModel, which counts MLPs too."""
    frequency, skipped = args.window_attn_skip_freq, args.no_rope_freq
    counted = "the pattern counts each MLP as a layer, so that it names no layer of attention"
    remedy = "(a list with one entry for each layer of the pattern works)"
    return {
        f"--window-attn-skip-freq {frequency} with --hybrid-layer-pattern "
        f"{args.hybrid_layer_pattern}": (
            isinstance(frequency, int) and frequency > 0 and all(windows(args)),
            f"{counted} {remedy}",
        ),
        f"--no-rope-freq {skipped} with --hybrid-layer-pattern {args.hybrid_layer_pattern}": (
            isinstance(skipped, int) and skipped > 0 and not any(without_positions(args)),
            f"{counted} {remedy}",
        ),
    }


def _written(args: argparse.Namespace, name: str) -> str:
    value = getattr(args, name)
    if name == "yarn_correction_range_round_to_int":
        return "--yarn-correction-range-round-to-int"
    return f"--{name.replace('_', '-')} {value}"
