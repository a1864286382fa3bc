"""The command line of a run: parsed, and checked before anything is built."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_tst.common.errors import UsageError
from megatron_tst.common.platform import platform, pose_connections
from megatron_tst.settings.argument_checks import argument_errors
from megatron_tst.settings.arguments import (
    add_superposition_arguments,
    superposition_schedule_from_args,
)
from megatron_tst.settings.batch_arguments import batch_sizes_from_args, refuse_unusable_batch_sizes
from megatron_tst.settings.conflicts import refuse_conflicting_arguments
from megatron_tst.settings.optimizer_arguments import refuse_missing_optimizer
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.training.datasets import (
    check_data_files,
    check_data_vocabulary,
    write_mock_corpus,
)
from megatron_tst.training.exclusions import leave_out_documents
from megatron_tst.training.finished import evaluate_only
from megatron_tst.training.resume import check_resume, record_settings


def parse_command_line() -> tuple[argparse.Namespace, SuperpositionSchedule]:
    """Parses and validates ``sys.argv``, and compares it with the checkpoint to load.

    Returns:
        Megatron's arguments with ``--tst-*``, and the phases of the run.

    Raises:
        UsageError: naming the argument or file, its value and the remedy. Megatron and its
            libraries raise whatever they raise.
    """
    # Parsed twice: Megatron's validation prints all arguments, builds the tokenizer and the
    # writers, and reports by assertion.
    args = parse_args(add_arguments)
    check_arguments(args)
    refuse_missing_optimizer(args)
    if not platform().has_gpu:
        pose_connections(args)
    args = parse_and_validate_args(add_arguments, args_defaults=_defaults(args))
    # Validation resolves deprecated spellings and --use-checkpoint-args.
    refuse_conflicting_arguments(args)
    schedule = superposition_schedule_from_args(args)
    write_mock_corpus(args)
    check_data_vocabulary(args)
    record_settings(args, schedule)
    steps_done = check_resume(args, schedule)
    if not args.skip_train:
        leave_out_documents(args, schedule.batch_sizes.samples_at(steps_done))
    refuse_unusable_batch_sizes(args, steps_done)
    if steps_done >= schedule.total_steps and not args.skip_train:
        evaluate_only(args, steps_done, schedule.total_steps)
    return args, schedule


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the ``--tst-*`` arguments to Megatron's parser, and the defaults of the platform."""
    # Megatron's own usage lists all arguments and would bury the message of a wrong one.
    parser.usage = "%(prog)s [arguments of Megatron and --tst-*, listed by --help]"
    parser.formatter_class = _HelpFormatter
    parser = add_superposition_arguments(parser)
    # By itself Megatron repeats a step with a NaN, saves, and exits without an error; and it checks
    # no NaN in the first step after a start, whose weights a later checkpoint would then hold.
    parser.set_defaults(rerun_mode="disabled")
    return platform().set_defaults(parser)


class _HelpFormatter(argparse.HelpFormatter):
    """Prints a help text with a bare percent sign, of which Megatron 0.19 has one, as it is."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except ValueError:
            return action.help or ""


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses what is wrong with a parsed command line before Megatron validates it.

    Raises:
        UsageError: naming the argument or file, its value and the remedy.
    """
    for message in argument_errors(args, platform()):
        raise UsageError(message)
    check_data_files(args)


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    """What Megatron takes for arguments that the command line does not have."""
    defaults: dict[str, Any] = _evaluation_defaults(args)
    if args.tokenizer_type is None:
        # As in upstream's pretrain_gpt.py.
        defaults["tokenizer_type"] = "GPT2BPETokenizer"
    return defaults


def _evaluation_defaults(args: argparse.Namespace) -> dict[str, int]:
    """Evaluates with the first batch size of a schedule.

    Megatron's default is one micro-batch of each rank, with which the samples of an evaluation
    would depend on the number of processes.
    """
    if args.step_batch_size_schedule is None or args.eval_global_batch_size is not None:
        return {}
    size = batch_sizes_from_args(args).size_at(0)
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    ranks = args.world_size // (model * args.context_parallel_size)
    at_once = (args.eval_micro_batch_size or args.micro_batch_size) * max(ranks, 1)
    if size % at_once:
        raise UsageError(
            f"--step-batch-size-schedule {args.step_batch_size_schedule!r}: evaluations read "
            f"batches of its first size, {size}, which {ranks} data-parallel ranks cannot share. "
            f"Pass --eval-global-batch-size with a multiple of {at_once}; other sizes than before "
            "change the samples that evaluations read."
        )
    return {"eval_global_batch_size": size}
