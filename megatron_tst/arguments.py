"""The ``--tst-*`` command line arguments."""

from __future__ import annotations

import argparse
from typing import get_args

from megatron_tst.batch_arguments import batch_sizes_from_args, total_steps_from_args
from megatron_tst.config import (
    CheckpointVerification,
    DocumentBoundary,
    LossImplementation,
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
    _add_method_arguments(group)
    _add_run_arguments(group)
    return parser


def _add_method_arguments(group: argparse._ArgumentGroup) -> None:
    """What the run trains: a resume must have the same."""
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
    group.add_argument(
        "--tst-document-boundary",
        choices=get_args(DocumentBoundary),
        default="cross",
        help="Whether bags run on from one document into the next, or each document begins a bag "
        "and fills up its last one with padding, which is masked.",
    )


def _add_run_arguments(group: argparse._ArgumentGroup) -> None:
    """How it is computed, and what is refused: a resume may have others."""
    group.add_argument(
        "--tst-loss-impl",
        choices=get_args(LossImplementation),
        default="auto",
        help="How phase 1 computes the loss and the embedding of bags: in torch or by Triton "
        "kernels, which auto takes on a GPU; linear: the loss together with the output layer, "
        "without whole logits, in both phases.",
    )
    group.add_argument(
        "--tst-max-epochs",
        type=float,
        help="How many times a run may read the text of a corpus; default 1 with superposition, "
        "unlimited without.",
    )
    group.add_argument(
        "--tst-verify-checkpoint",
        choices=get_args(CheckpointVerification),
        default="sample",
        help="What is looked at in a checkpoint before it is resumed: some master weights in each "
        "part of the model, in a second; all of its numbers, by the first process; or only the "
        "sizes of its files.",
    )


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
        document_boundary=args.tst_document_boundary,
    )


def superposition_schedule_from_args(args: argparse.Namespace) -> SuperpositionSchedule:
    """The schedule of a validated command line.

    Raises:
        ValueError: a setting is out of range, or the switch is not inside the run.
    """
    return SuperpositionSchedule(
        config=superposition_config_from_args(args),
        total_steps=total_steps_from_args(args),
        batch_sizes=batch_sizes_from_args(args),
        sequence_length=args.seq_length,
    )


def refuse_no_epochs(args: argparse.Namespace) -> None:
    """Refuses a limit of epochs that no run can keep.

    Raises:
        ValueError: naming the argument, its value and the remedy.
    """
    # A NaN fails this comparison too.
    if args.tst_max_epochs is not None and not args.tst_max_epochs > 0:
        raise ValueError(
            f"--tst-max-epochs is {args.tst_max_epochs:g}: use a number above 0 (inf: no limit)."
        )
