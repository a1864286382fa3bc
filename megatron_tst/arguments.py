"""The ``--tst-*`` command line arguments and what they do not go together with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, get_args

from megatron_tst.config import (
    Objective,
    ResetAtSwitch,
    SuperpositionConfig,
    TargetWeighting,
    Variant,
)
from megatron_tst.schedule import SuperpositionSchedule


def add_superposition_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the token superposition group to Megatron's parser."""
    group = parser.add_argument_group(title="token superposition")
    group.add_argument(
        "--tst-bag-size",
        type=int,
        default=1,
        help="Tokens folded into one latent position in phase 1; 1 turns superposition off.",
    )
    group.add_argument(
        "--tst-step-ratio",
        type=float,
        help="Fraction of all optimizer steps spent in phase 1 (published best: 0.2 to 0.4).",
    )
    group.add_argument(
        "--tst-steps", type=int, help="Optimizer steps of phase 1, instead of a ratio."
    )
    group.add_argument(
        "--tst-variant",
        choices=get_args(Variant),
        default="full",
        help="Which side is superposed: bags in and out, bags in only, or bags out only.",
    )
    group.add_argument(
        "--tst-target-weighting",
        choices=get_args(TargetWeighting),
        help="Weight of the tokens of a target bag; default uniform below a bag size of 8, "
        "power-law from 8 on.",
    )
    group.add_argument(
        "--tst-power-law-exponent",
        type=float,
        default=1.0,
        help="p in the power-law weight i^-p of the i-th token.",
    )
    group.add_argument(
        "--tst-objective",
        choices=get_args(Objective),
        default="mce",
        help="Phase-1 loss: multi-hot cross-entropy, or an ablation.",
    )
    group.add_argument(
        "--tst-reset-at-switch",
        choices=get_args(ResetAtSwitch),
        default="none",
        help="State re-initialised at the switch (ablations).",
    )
    return parser


def superposition_config_from_args(args: argparse.Namespace) -> SuperpositionConfig:
    """The superposition settings of a parsed command line.

    Raises:
        ValueError: a setting is out of range.
    """
    return SuperpositionConfig(
        bag_size=args.tst_bag_size,
        step_ratio=args.tst_step_ratio,
        steps=args.tst_steps,
        variant=args.tst_variant,
        target_weighting=args.tst_target_weighting,
        power_law_exponent=args.tst_power_law_exponent,
        objective=args.tst_objective,
        reset_at_switch=args.tst_reset_at_switch,
    )


def superposition_schedule_from_args(args: argparse.Namespace) -> SuperpositionSchedule:
    """The schedule of a validated command line.

    Raises:
        ValueError: a setting is out of range, or the switch is not inside the run.
    """
    total_steps = args.train_iters or args.train_samples // args.global_batch_size
    return SuperpositionSchedule(
        config=superposition_config_from_args(args),
        total_steps=total_steps,
        global_batch_size=args.global_batch_size,
        sequence_length=args.seq_length,
    )


_Rule = tuple[str, Callable[[Any], bool], str]

_NEEDS_PLAIN_BATCHES = "its batches are not bags of tokens"
_CONFLICTS: tuple[_Rule, ...] = (
    ("--mtp-num-layers", lambda a: bool(a.mtp_num_layers), "its targets are single tokens"),
    ("--sft", lambda a: a.sft, _NEEDS_PLAIN_BATCHES),
    ("--fim-data", lambda a: a.fim_data, _NEEDS_PLAIN_BATCHES),
    ("--mock-data", lambda a: a.mock_data, "there is no text to read in bags"),
    ("--perform-rl-step", lambda a: a.perform_rl_step, _NEEDS_PLAIN_BATCHES),
    (
        "--dataloader-inter-document-masking",
        lambda a: a.dataloader_inter_document_masking,
        "a bag may hold tokens of two documents",
    ),
    (
        "--reset-attention-mask",
        lambda a: a.reset_attention_mask,
        "a bag may hold tokens of two documents",
    ),
    (
        "--reset-position-ids",
        lambda a: a.reset_position_ids,
        "a bag may hold tokens of two documents",
    ),
    (
        "--hybrid-context-parallel",
        lambda a: a.hybrid_context_parallel,
        "it packs sequences of different lengths",
    ),
    (
        "--cross-entropy-fusion-impl te",
        lambda a: a.cross_entropy_loss_fusion and a.cross_entropy_fusion_impl == "te",
        "it overwrites bf16 logits (use native, or drop --cross-entropy-loss-fusion)",
    ),
    (
        "--cuda-graph-impl full_iteration",
        lambda a: a.cuda_graph_impl == "full_iteration",
        "the batch changes its shape at the switch (use local or none)",
    ),
    (
        "--dataloader-type",
        lambda a: a.dataloader_type not in (None, "single"),
        "samples must be read in order for each token to be read once (use single)",
    ),
    (
        "--rampup-batch-size",
        lambda a: a.rampup_batch_size is not None,
        "the switch is defined for a constant batch size",
    ),
    (
        "--step-batch-size-schedule",
        lambda a: getattr(a, "step_batch_size_schedule", None) is not None,
        "the switch is defined for a constant batch size",
    ),
    (
        "--phase-transition-iterations",
        lambda a: bool(a.phase_transition_iterations),
        "it restarts and reshuffles the data; the switch happens inside the run",
    ),
    (
        "--overlap-moe-expert-parallel-comm",
        lambda a: a.overlap_moe_expert_parallel_comm,
        "its schedule computes the loss outside the model",
    ),
    (
        "--hybrid-layer-pattern",
        lambda a: getattr(a, "hybrid_layer_pattern", None) is not None,
        "only GPTModel is supported",
    ),
    (
        "--use-megatron-fsdp",
        lambda a: a.use_megatron_fsdp or getattr(a, "use_torch_fsdp2", False),
        "embedding rows are read from plain parameters (use --use-distributed-optimizer)",
    ),
    (
        "--logits-load-dir",
        lambda a: getattr(a, "logits_load_dir", None) is not None,
        "cached teacher logits belong to single tokens",
    ),
)


def refuse_conflicting_arguments(args: argparse.Namespace) -> None:
    """Refuses Megatron arguments that superposition does not work with.

    Raises:
        ValueError: naming the argument, the reason and the remedy.
    """
    if args.tst_bag_size == 1:
        return
    for flag, is_set, reason in _CONFLICTS:
        if is_set(args):
            raise ValueError(
                f"{flag} does not work with --tst-bag-size {args.tst_bag_size}: {reason}. "
                "Remove it, or use --tst-bag-size 1."
            )
