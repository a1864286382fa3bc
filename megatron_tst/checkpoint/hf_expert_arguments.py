"""What ``config.json`` says of experts, as Megatron's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_tst.checkpoint.hf_expert_flags import groups_agree
from megatron_tst.checkpoint.hf_shapes import ModelShape

MIXTURES = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM")


def is_mixture(config: Any) -> bool:
    """Whether the model has experts."""
    return config.architectures[0] in MIXTURES


def _is_glm(config: Any) -> bool:
    return bool(config.architectures[0] == "Glm4MoeForCausalLM")


def dense_layers(config: Any) -> tuple[int, ...]:
    """Layers without experts in a mixture, counted from 0."""
    layers = range(config.num_hidden_layers)
    if _is_glm(config):
        return tuple(layers[: config.first_k_dense_replace])
    return tuple(
        layer
        for layer in layers
        if layer in config.mlp_only_layers
        or (layer + 1) % config.decoder_sparse_step
        or not config.num_experts
    )


def expert_sizes(config: Any) -> dict[str, Any]:
    """The fields of :class:`ModelShape` that describe experts."""
    sizes = {
        "experts": config.n_routed_experts if _is_glm(config) else config.num_experts,
        "dense_layers": dense_layers(config),
        "dense_ffn": config.intermediate_size,
    }
    match config.architectures[0]:
        case "Glm4MoeForCausalLM":
            shared = config.n_shared_experts * config.moe_intermediate_size
            sizes |= {"shared_ffn": shared, "sigmoid_router": True}
        case "Qwen2MoeForCausalLM":
            sizes |= {"shared_ffn": config.shared_expert_intermediate_size}
    return sizes


def unsupported_experts(config: Any) -> Iterator[str]:
    """Settings of a mixture, with their values, that Megatron computes otherwise."""
    chosen = config.num_experts_per_tok
    if len(dense := dense_layers(config)) == config.num_hidden_layers:
        yield f"no layer with experts (all of {list(dense)} are dense)"
    if chosen == 1 and config.norm_topk_prob:
        # Megatron refuses the softmax of a single logit, and does not divide a sigmoid by itself.
        yield "num_experts_per_tok 1 with norm_topk_prob True"
    if not expert_sizes(config).get("shared_ffn", 1):
        yield "shared experts of size 0"
    if not _is_glm(config):
        return
    if chosen > 1 and not config.norm_topk_prob:
        yield "norm_topk_prob False with sigmoid scores"
    groups, of_token = config.n_group, config.topk_group
    if not groups_agree(groups, of_token, chosen):
        yield (
            f"n_group {groups}, topk_group {of_token} and num_experts_per_tok {chosen} (not twice "
            "as many)"
        )


def expert_arguments(config: Any, shape: ModelShape) -> dict[str, Any]:
    """Arguments of Megatron for the experts by name; True and False are flags."""
    frequency = [int(layer not in shape.dense_layers) for layer in range(shape.layers)]
    values = {
        "num-experts": shape.experts,
        "moe-layer-freq": str(frequency).replace(" ", "") if shape.dense_layers else 1,
        "moe-ffn-hidden-size": shape.ffn,
        "moe-shared-expert-intermediate-size": shape.shared_ffn or None,
        "moe-shared-expert-gate": shape.shared_gate,
        "moe-router-topk": config.num_experts_per_tok,
        "moe-router-dtype": "fp32",
    }
    if not shape.sigmoid_router:
        return values | {
            "moe-router-score-function": "softmax",
            # The probabilities of all experts, which do not add up to one over the chosen ones.
            "moe-router-pre-softmax": not config.norm_topk_prob,
            "moe-aux-loss-coeff": config.router_aux_loss_coef,
        }
    is_limited = config.topk_group < config.n_group
    return values | {
        "moe-router-score-function": "sigmoid",
        "moe-router-enable-expert-bias": True,
        "moe-router-topk-scaling-factor": config.routed_scaling_factor,
        "moe-router-num-groups": config.n_group if is_limited else None,
        "moe-router-group-topk": config.topk_group if is_limited else None,
    }
