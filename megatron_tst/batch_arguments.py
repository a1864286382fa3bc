"""Megatron's arguments of batch sizes: what they mean, and what it does not work with."""

from __future__ import annotations

import argparse

from megatron_tst.batch_sizes import BatchSizes


def batch_sizes_from_args(args: argparse.Namespace) -> BatchSizes:
    """The batch sizes of a command line, or of the arguments in a checkpoint.

    Raises:
        ValueError: ``--step-batch-size-schedule`` has another form.
    """
    schedule = getattr(args, "step_batch_size_schedule", None)
    if schedule is not None:
        # Megatron then sets --global-batch-size to one micro-batch of each rank.
        return BatchSizes.parse(schedule, args.seq_length)
    return BatchSizes.constant(args.global_batch_size)


def total_steps_from_args(args: argparse.Namespace) -> int:
    """Optimizer steps of the run, 0 when the command line does not say.

    Raises:
        ValueError: ``--step-batch-size-schedule`` has another form.
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
        ValueError: naming the argument, its value and the remedy.
    """
    for name in ("seq_length", "micro_batch_size", "global_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: use 1 or more.")
    if args.step_batch_size_schedule is None:
        return
    batch_sizes = batch_sizes_from_args(args)
    if args.train_iters:
        raise ValueError(
            f"--train-iters {args.train_iters} does not work with --step-batch-size-schedule: "
            "Megatron computes the text and the learning rate from a constant batch size. Pass "
            f"--train-samples {batch_sizes.samples_at(args.train_iters)}, which are as many steps, "
            "and --lr-warmup-samples and the like."
        )
    if args.override_ckpt_iteration is not None:
        raise ValueError(
            f"--override-ckpt-iteration {args.override_ckpt_iteration} does not work with "
            "--step-batch-size-schedule: Megatron computes the samples read from a constant batch "
            "size. Remove it; --ckpt-step starts from an earlier checkpoint."
        )


def refuse_batches_of_no_layout(args: argparse.Namespace, steps_done: int) -> None:
    """Refuses batch sizes ahead at which Megatron would end the run.

    Args:
        args: command line, validated by Megatron.
        steps_done: where the run starts; what lies behind may have had another layout.

    Raises:
        ValueError: naming the argument, the batch size and the remedy.
    """
    if args.step_batch_size_schedule is None:
        return
    in_parallel = args.micro_batch_size * args.data_parallel_size * args.gtp_weight_remat_size
    flag = f"--step-batch-size-schedule {args.step_batch_size_schedule!r}"
    size_before = 0
    for step, _, batch_size in batch_sizes_from_args(args).stages_from(steps_done):
        if step >= total_steps_from_args(args):
            break
        if batch_size % in_parallel:
            raise ValueError(
                f"{flag}: the batch size {batch_size} from step {step} on is not a multiple of "
                f"{in_parallel}, the micro-batches of size {args.micro_batch_size} that are "
                "computed at once: change one of them, or the number of processes."
            )
        if batch_size < size_before:
            raise ValueError(
                f"{flag}: the batch size falls from {size_before} to {batch_size} at step {step}, "
                "and Megatron only raises it within a launch: leave this entry out, end the launch "
                f"at that step (--exit-interval {step}), and resume with the entry."
            )
        size_before = batch_size
