"""Megatron's arguments of batch sizes: what they mean, and what it does not work with."""

from __future__ import annotations

import argparse

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.batch_sizes import BatchSizes


def batch_sizes_from_args(args: argparse.Namespace) -> BatchSizes:
    """The batch sizes of a command line, or of the arguments in a checkpoint.

    Raises:
        UsageError: ``--step-batch-size-schedule`` has another form.
    """
    schedule = getattr(args, "step_batch_size_schedule", None)
    if schedule is not None:
        # Megatron then sets --global-batch-size to one micro-batch of each rank.
        return BatchSizes.parse(schedule, args.seq_length)
    batch_size = args.global_batch_size
    ranks = getattr(args, "data_parallel_size", None)
    if ranks is not None and getattr(args, "decrease_batch_size_if_needed", False):
        # Known when Megatron has validated. As ConstantNumMicroBatchesCalculator.
        batch_size -= batch_size % (args.micro_batch_size * ranks * args.gtp_weight_remat_size)
    return BatchSizes.constant(batch_size)


def total_steps_from_args(args: argparse.Namespace) -> int:
    """Optimizer steps of the run, 0 when the command line does not say.

    Raises:
        UsageError: ``--step-batch-size-schedule`` has another form.
    """
    if args.train_iters:
        return int(args.train_iters)
    samples = args.train_samples or 0
    if args.step_batch_size_schedule is None:
        # Whole batches, as Megatron rounds.
        return int(samples // args.global_batch_size)
    return batch_sizes_from_args(args).steps_to(samples)


def refuse_bad_batch_sizes(args: argparse.Namespace) -> None:
    """Refuses lengths and batch sizes below 1, which Megatron lets through or divides by.

    With a schedule of batch sizes it refuses what Megatron computes from a constant one.

    Raises:
        UsageError: naming the argument, its value and the remedy.
    """
    for name in ("seq_length", "micro_batch_size", "global_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: use 1 or more.")
    if args.step_batch_size_schedule is None:
        return
    if args.seq_length is None:
        raise UsageError(
            f"--step-batch-size-schedule {args.step_batch_size_schedule!r} has thresholds in "
            "tokens, and --seq-length is missing: add it, also with --use-checkpoint-args."
        )
    batch_sizes = batch_sizes_from_args(args)
    if args.train_iters:
        raise UsageError(
            f"--train-iters {args.train_iters} does not work with --step-batch-size-schedule: "
            "Megatron computes the tokens and the learning rate from a constant batch size. Pass "
            f"--train-samples {batch_sizes.samples_at(args.train_iters)}, which are as many steps, "
            "and --lr-warmup-samples and the like."
        )
    if args.override_ckpt_iteration is not None:
        raise UsageError(
            f"--override-ckpt-iteration {args.override_ckpt_iteration} does not work with "
            "--step-batch-size-schedule: Megatron computes the samples read from a constant batch "
            "size. Remove it; --ckpt-step starts from an earlier checkpoint."
        )


def refuse_unusable_batch_sizes(args: argparse.Namespace, steps_done: int) -> None:
    """Refuses batch sizes ahead at which Megatron would end the run.

    Args:
        args: command line, validated by Megatron.
        steps_done: where the run starts; what lies behind may have had another layout.

    Raises:
        UsageError: naming the argument, the batch size and the remedy.
    """
    if args.step_batch_size_schedule is None:
        return
    size_before = 0
    for step, _, batch_size in batch_sizes_from_args(args).stages_from(steps_done):
        if step >= total_steps_from_args(args):
            break
        problem = _misfit(args, batch_size)
        if batch_size < size_before:
            problem = (
                f"is smaller than {size_before} before, and Megatron only raises it within a "
                "launch: leave this entry out, end the launch at that step (--exit-interval "
                f"{step}), and resume with the entry"
            )
        if problem is not None:
            raise UsageError(
                f"--step-batch-size-schedule {args.step_batch_size_schedule!r}: the batch size "
                f"{batch_size} from step {step} on {problem}."
            )
        size_before = batch_size


def _misfit(args: argparse.Namespace, batch_size: int) -> str | None:
    """Why a batch cannot be spread over the processes, None if it can."""
    at_once = args.micro_batch_size * args.data_parallel_size * args.gtp_weight_remat_size
    micro_batches, rest = divmod(batch_size, at_once)
    if rest:
        return (
            f"is not a multiple of {at_once}, one micro-batch of size {args.micro_batch_size} on "
            "each data-parallel rank: change one of them"
        )
    if args.virtual_pipeline_model_parallel_size is None:
        return None
    # As forward_backward_pipelining_with_interleaving in core/pipeline_parallel/schedules.py.
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    if micro_batches < group or 0 < micro_batches % group < stages:
        return (
            f"makes {micro_batches} micro-batches, which {stages} pipeline stages with virtual "
            f"ones take in groups of {group}: use a multiple of {group * at_once}"
        )
    return None
