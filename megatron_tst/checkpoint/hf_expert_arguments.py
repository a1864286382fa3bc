"""What ``config.json`` says of experts, as Megatron's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_tst.checkpoint.hf_shapes import ModelShape


def dense_layers(config: Any) -> tuple[int, ...]:
    """Layers without experts in a mixture, counted from 0."""
    return tuple(
        layer
        for layer in range(config.num_hidden_layers)
        if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
    )


def unsupported_experts(config: Any) -> Iterator[str]:
    """Settings of a mixture, with their values, that Megatron computes otherwise."""
    if len(dense := dense_layers(config)) == config.num_hidden_layers:
        yield f"mlp_only_layers {list(dense)} (no layer with experts)"
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        # Megatron refuses the softmax of a single logit.
        yield "num_experts_per_tok 1 with norm_topk_prob True"


def expert_arguments(config: Any, shape: ModelShape) -> dict[str, Any]:
    """Arguments of Megatron for the experts by name; True and False are flags."""
    frequency = [int(layer not in shape.dense_layers) for layer in range(shape.layers)]
    return {
        "num-experts": shape.experts,
        "moe-layer-freq": str(frequency).replace(" ", "") if shape.dense_layers else 1,
        "moe-ffn-hidden-size": shape.ffn,
        "moe-router-topk": config.num_experts_per_tok,
        "moe-router-score-function": "softmax",
        # The probabilities of all experts, which do not add up to one over the chosen ones.
        "moe-router-pre-softmax": not config.norm_topk_prob,
        "moe-router-dtype": "fp32",
        "moe-aux-loss-coeff": config.router_aux_loss_coef,
    }
