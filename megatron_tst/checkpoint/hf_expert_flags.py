"""Which of Megatron's flags for experts the classes of transformers have settings for."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any, Literal

ExpertArchitecture = Literal["Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"]

# Flag as the message has it, name of the argument, values that can be expressed.
_ROUTER: tuple[tuple[Any, ...], ...] = (
    ("--moe-router-enable-expert-bias", "moe_router_enable_expert_bias", False),
    ("--moe-router-topk-scaling-factor", "moe_router_topk_scaling_factor", None, 1.0),
    ("--moe-router-num-groups", "moe_router_num_groups", None),
    ("--moe-router-group-topk", "moe_router_group_topk", None),
)
_ALWAYS: tuple[tuple[Any, ...], ...] = (
    ("--moe-router-score-function", "moe_router_score_function", "softmax", "sigmoid"),
    ("--moe-router-force-load-balancing", "moe_router_force_load_balancing", False),
    ("--moe-router-force-biased", "moe_router_force_biased", None),
    ("--moe-expert-capacity-factor", "moe_expert_capacity_factor", None),
    ("--moe-apply-probs-on-input", "moe_apply_probs_on_input", False),
    ("--moe-latent-size", "moe_latent_size", None),
    # They change the order of the rows of gate and up.
    ("--moe-mlp-glu-interleave-size", "moe_mlp_glu_interleave_size", None),
    ("--moe-shared-expert-glu-interleave-size", "moe_shared_expert_glu_interleave_size", None),
)
_SETTINGS: dict[ExpertArchitecture, tuple[tuple[Any, ...], ...]] = {
    "Qwen3MoeForCausalLM": (
        ("--num-experts without --qk-layernorm", "qk_layernorm", True),
        *_ROUTER,
        *_ALWAYS,
    ),
    "Qwen2MoeForCausalLM": (
        ("--moe-shared-expert-intermediate-size with --qk-layernorm", "qk_layernorm", False),
        (
            "--moe-shared-expert-intermediate-size without --moe-shared-expert-gate",
            "moe_shared_expert_gate",
            True,
        ),
        *_ROUTER,
        *_ALWAYS,
    ),
    "Glm4MoeForCausalLM": (
        (
            "--moe-router-score-function sigmoid without --moe-router-enable-expert-bias",
            "moe_router_enable_expert_bias",
            True,
        ),
        (
            "--moe-router-score-function sigmoid with --moe-shared-expert-gate",
            "moe_shared_expert_gate",
            False,
        ),
        *_ALWAYS,
    ),
}
# What only some of the classes have.
_MORE: dict[ExpertArchitecture, tuple[str, ...]] = {
    "Qwen3MoeForCausalLM": (),
    "Qwen2MoeForCausalLM": ("add_qkv_bias",),
    "Glm4MoeForCausalLM": ("add_qkv_bias", "rotary_percent"),
}


def expert_architecture(sigmoid: bool, shared: int) -> ExpertArchitecture:
    """The class for a kind of scores and a size of the shared expert, 0 without."""
    if sigmoid:
        return "Glm4MoeForCausalLM"
    return "Qwen2MoeForCausalLM" if shared else "Qwen3MoeForCausalLM"


def has_sigmoid(args: Namespace) -> bool:
    """Whether the router takes the sigmoid of its logits."""
    return bool(getattr(args, "moe_router_score_function", "softmax") == "sigmoid")


def shared_size(args: Namespace) -> int:
    """Inner size of all shared experts together."""
    return getattr(args, "moe_shared_expert_intermediate_size", None) or 0


def expert_rules(args: Namespace) -> tuple[tuple[Any, ...], ...]:
    """Flag, name of the argument and values that the class for these arguments has."""
    return _SETTINGS[expert_architecture(has_sigmoid(args), shared_size(args))]


def expert_extras(args: Namespace) -> tuple[str, ...]:
    """Arguments that the class for these arguments has settings for, and others have not."""
    return _MORE[expert_architecture(has_sigmoid(args), shared_size(args))]


def unsupported_router(args: Namespace, dense_layers: Sequence[int], ffn: int) -> Iterator[str]:
    """Combinations of flags that no class has settings for; ``ffn`` is the size of an expert."""
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind in getattr(args, "moe_router_load_balancing_type", ""):
            yield f"--moe-router-load-balancing-type {kind}"
    factor = getattr(args, "moe_expert_rank_capacity_factor", None)
    # ncclep ends a run that exceeds it, and drops nothing.
    if factor is not None and getattr(args, "moe_flex_dispatcher_backend", "") != "ncclep":
        yield f"--moe-expert-rank-capacity-factor {factor}"
    if not has_sigmoid(args):
        return
    sigmoid = "--moe-router-score-function sigmoid"
    shared = shared_size(args)
    if not shared or shared % ffn:
        yield (
            f"{sigmoid} with --moe-shared-expert-intermediate-size {shared} (no multiple of "
            f"--moe-ffn-hidden-size {ffn})"
        )
    if list(dense_layers) != list(range(len(dense_layers))):
        yield f"{sigmoid} with layers without experts after one that has some (--moe-layer-freq)"
    if not groups_agree(*router_groups(args), args.moe_router_topk):
        yield (
            f"{sigmoid} with --moe-router-group-topk {args.moe_router_group_topk} and "
            f"--moe-router-topk {args.moe_router_topk} (not twice as many)"
        )


def router_groups(args: Namespace) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may choose from; one if from all."""
    chosen = getattr(args, "moe_router_group_topk", None)
    groups = args.moe_router_num_groups if chosen else 1
    return (groups, chosen) if chosen and chosen < groups else (1, 1)


def groups_agree(groups: int, chosen: int, topk: int) -> bool:
    """Whether both sides choose the same groups.

    transformers adds up the best two scores of a group, Megatron the best ``topk // chosen``
    (``group_limited_topk`` of ``megatron.core.transformer.moe.moe_utils``).
    """
    return groups == chosen or topk // chosen == 2
