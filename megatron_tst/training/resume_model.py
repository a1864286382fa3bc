"""Refuses to continue a checkpoint with another model or optimizer than it holds.

Megatron ends over most of these while it loads, with a message about shapes or keys, and goes on
over some with something else than was asked for: it drops an output layer that the model does not
have, and takes the decay rates of Adam from the checkpoint.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.attention_layers import windows, without_positions
from megatron_tst.settings.multi_token import depths
from megatron_tst.training.gpt_to_hybrid import is_translated

_MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "group_query_attention",
    "multi_latent_attention",
    "swiglu",
    "normalization",
    "qk_layernorm",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "mtp_num_layers",
    "mtp_use_repeated_layer",
    "add_bias_linear",
    "attention_output_gate",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_latent_size",
    "moe_router_enable_expert_bias",
)
_MAY_BE_NONE = (
    *("num_experts", "mtp_num_layers", "moe_shared_expert_intermediate_size", "moe_latent_size"),
)
# A HybridModel counts attention and MLP as a layer each, and its pattern says which have experts.
_TOLD_BY_A_PATTERN = {"num_layers", "moe_layer_freq"}
# No weight depends on them, so that Megatron goes on with other positions without a word.
_POSITIONS = (
    *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved"),
    *("rotary_seq_len_interpolation_factor", "use_rope_scaling"),
)
_LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_LATENT_POSITIONS = ("rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim")
# Nor on these.
_COMPUTED = (
    *("softmax_type", "use_mup", "activation_func_clamp_value", "glu_linear_offset"),
    *("squared_relu", "quick_geglu", "openai_gelu", "layernorm_epsilon", "qk_l2_norm"),
    *("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm"),
)
_ROUTED = (
    *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax"),
    *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
)
# Arguments that are not called as their flags.
_FLAGS = {
    "layernorm_epsilon": "norm-epsilon",
    "layernorm_zero_centered_gamma": "apply-layernorm-1p",
    "add_bias_linear": "disable-bias-linear",
}
_TURNED_OFF_BY_FLAG = ("add_bias_linear",)
_MUP = ("mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult", "mup_attn_scale_power")
_LLAMA3, _YARN = (
    ("rope_scaling_factor",),
    ("rotary_scaling_factor", "mscale", "mscale_all_dim", "yarn_original_max_position_embeddings"),
)
_STAGE = "--finetune, for a stage of its own"
_OPTIMIZER = ("optimizer", "adam_beta1", "adam_beta2", "adam_eps")
_OF_OPTIMIZERS = {
    **dict.fromkeys(
        ("muon", "dist_muon", "adaptive_muon"), ("muon_momentum", "muon_scalar_optimizer")
    ),
    "lion": ("lion_beta1", "lion_beta2"),
    "sgd": ("sgd_momentum",),
}


def refuse_other_model(args: Namespace, saved: Any) -> None:
    """Refuses a model or an optimizer that the state in a checkpoint does not fit.

    Args:
        args: command line.
        saved: Megatron's arguments in the checkpoint.

    Raises:
        UsageError: naming the argument, both values and the remedy.
    """
    args = Namespace(**{**vars(args), "mtp_num_layers": depths(args) or None})
    skipped = _TOLD_BY_A_PATTERN if is_translated(args, saved) else set()
    given = {name for name in _MODEL if getattr(args, name) is not None or name in _MAY_BE_NONE}
    names = [name for name in _MODEL if name in given - skipped]
    if args.group_query_attention:
        names.append("num_query_groups")
    is_latent = args.multi_latent_attention or "+" in (args.hybrid_layer_pattern or "")
    names += _LATENT_SIZES if is_latent else ()
    if args.hybrid_layer_pattern and not skipped:
        _refuse_other_layers(args, saved.hybrid_layer_pattern)
    _refuse(args, saved, names, "the weights do not fit", "--load and --save of another run")
    names = [*_POSITIONS]
    names += _LLAMA3 if args.use_rope_scaling else ()
    names += _YARN if args.position_embedding_type == "yarn" else ()
    names += _LATENT_POSITIONS if is_latent else ()
    reason = "the model would see other positions than it was trained on"
    _refuse(args, saved, names, reason, _STAGE)
    _refuse_other_attention(args, saved)
    names = [*_COMPUTED, *(_MUP if args.use_mup else ())]
    names += _ROUTED if args.num_experts else ()
    _refuse(args, saved, names, "the same weights would compute something else", _STAGE)
    if not (args.no_load_optim or args.skip_train):
        reason = "the state of the optimizer is that of the checkpoint"
        names = [*_OPTIMIZER, *_OF_OPTIMIZERS.get(args.optimizer, ())]
        _refuse(args, saved, names, reason, "--no-load-optim")


def _refuse_other_layers(args: Namespace, was: str) -> None:
    # Pipes part pipeline stages, of which there may be other numbers.
    if was.replace("|", "") != args.hybrid_layer_pattern.replace("|", ""):
        raise UsageError(
            f"--load {args.load} was saved with --hybrid-layer-pattern {was}, and this command has "
            f"{args.hybrid_layer_pattern}: the weights do not fit. Keep the layers, or pass --load "
            "and --save of another run."
        )


def _refuse_other_attention(args: Namespace, saved: Any) -> None:
    """By layer, as the same number means other layers in a HybridModel than in a GPTModel."""
    for names, of_layers in (
        (("window_size", "window_attn_skip_freq"), windows),
        (("no_rope_freq",), without_positions),
    ):
        found, stored = of_layers(args), of_layers(saved)
        if any((*found, *stored)) and found != stored:
            was, now = (
                " ".join(f"--{n.replace('_', '-')} {getattr(settings, n, None)}" for n in names)
                for settings in (saved, args)
            )
            raise UsageError(
                f"--load {args.load} was saved with {was}, and this command has {now}, which other "
                "layers of attention follow (a HybridModel counts each MLP as a layer): the model "
                f"would see other positions than it was trained on. Keep them, or pass {_STAGE}."
            )


def _refuse(
    args: Namespace, saved: Any, names: list[str] | tuple[str, ...], reason: str, way_out: str
) -> None:
    for name in names:
        now = getattr(args, name)
        if (was := getattr(saved, name, now)) != now:
            flag = _FLAGS.get(name, name.replace("_", "-"))
            if name in _TURNED_OFF_BY_FLAG:
                was, now = not was, not now
            raise UsageError(
                f"--load {args.load} was saved with --{flag} {was}, and this command has {now}: "
                f"{reason}. Keep the setting, or pass {way_out}."
            )
