"""The ``--tst-*`` command line arguments."""

from __future__ import annotations

import argparse
from typing import get_args

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.batch_arguments import batch_sizes_from_args, total_steps_from_args
from megatron_tst.settings.config import SETTINGS, CheckpointVerification, SuperpositionConfig
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.settings.setting_fields import FLAGS, Setting, worded


def add_superposition_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the token superposition group to Megatron's parser."""
    group = parser.add_argument_group(title="token superposition")
    for known in SETTINGS.values():
        _add_setting(group, known)
    group.add_argument(
        "--tst-max-epochs",
        type=float,
        help="How many times a run may read a corpus; default 1 with superposition, "
        "unlimited without.",
    )
    group.add_argument(
        "--tst-exclude-documents",
        metavar="FILE",
        help="Documents that the train split is to leave out, a line CORPUS:INDEX each as "
        "tst trace prints them; at a resume from there on.",
    )
    # What a checkpoint and the list leave out, from which sample on.
    parser.set_defaults(tst_left_out=[])
    group.add_argument(
        "--tst-verify-checkpoint",
        choices=get_args(CheckpointVerification),
        default="sample",
        help="What is looked at in a checkpoint before it is resumed: some master weights in each "
        "part of the model, in a second; all of its numbers, by the first process; or only the "
        "sizes of its files.",
    )
    return parser


def _add_setting(group: argparse._ArgumentGroup, known: Setting) -> None:
    group.add_argument(
        known.flag,
        type=known.kind,
        default=known.default,
        choices=tuple(known.choices) or None,
        help=known.help,
    )


def has_bags(args: argparse.Namespace) -> bool:
    """Whether a command line, valid or not, asks for phases with bags."""
    return bool(args.tst_bag_size > 1 or args.tst_schedule or args.tst_bag_sizes)


def bags_flag(args: argparse.Namespace) -> str:
    """The flag by which a command line asks for bags, with its value."""
    for name in ("schedule", "bag_sizes"):
        if value := getattr(args, SETTINGS[name].argument):
            return f"{SETTINGS[name].flag} {value}"
    return f"--tst-bag-size {args.tst_bag_size}"


def superposition_config_from_args(args: argparse.Namespace) -> SuperpositionConfig:
    """The superposition settings of a parsed command line.

    Raises:
        UsageError: a setting is out of range.
    """
    with worded(FLAGS):
        return SuperpositionConfig(
            **{name: getattr(args, known.argument) for name, known in SETTINGS.items()}
        )


def superposition_schedule_from_args(args: argparse.Namespace) -> SuperpositionSchedule:
    """The schedule of a validated command line.

    Raises:
        UsageError: a setting is out of range, or the switch is not inside the run.
    """
    with worded(FLAGS):
        return SuperpositionSchedule(
            config=superposition_config_from_args(args),
            total_steps=total_steps_from_args(args),
            batch_sizes=batch_sizes_from_args(args),
            sequence_length=args.seq_length,
            seed=args.seed,
        )


def refuse_no_epochs(args: argparse.Namespace) -> None:
    """Refuses a limit of epochs that no run can keep.

    Raises:
        UsageError: naming the argument, its value and the remedy.
    """
    # A NaN fails this comparison too.
    if args.tst_max_epochs is not None and not args.tst_max_epochs > 0:
        raise UsageError(
            f"--tst-max-epochs is {args.tst_max_epochs:g}: use a number above 0 (inf: no limit)."
        )
