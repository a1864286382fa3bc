"""Refuses to continue a checkpoint with batch sizes that would falsify its past or move its switch.

A run whose batch size changes at a resume is one run: its batch sizes are written as one
``--step-batch-size-schedule``, from sample 0 on.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.batch_arguments import batch_sizes_from_args
from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.phases import Phase, recorded_phases
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.training.resume_schedule import learning_rate_flags

DRAWN_SIZES = "drawn_sizes"
"""Under which settings of a checkpoint have :func:`drawn_sizes`."""


def drawn_sizes(schedule: SuperpositionSchedule) -> str:
    """Which samples have which of the bag sizes that are drawn, as a fingerprint."""
    drawn = [(phase.first_sample, phase.bag_size) for phase in schedule.stretches]
    return hashlib.sha256(repr(drawn).encode()).hexdigest()


def refuse_other_draws(
    args: Namespace, schedule: SuperpositionSchedule, saved: Mapping[str, Any]
) -> None:
    """Refuses steps that would read other samples in bags of a size than the run has laid out.

    Args:
        args: command line.
        schedule: phases and batch sizes of the command line.
        saved: settings in the checkpoint.

    Raises:
        UsageError: naming the arguments that must stay.
    """
    # Both have the same --tst-bag-sizes, or none.
    if schedule.config.bag_sizes is None or saved[DRAWN_SIZES] == drawn_sizes(schedule):
        return
    was, now = recorded_phases(saved)[-1], schedule.phases[-1]
    raise UsageError(
        f"--load {args.load} drew the bag sizes of its steps up to sample {was.first_sample} (step "
        f"{was.first_step}), and with this command (up to sample {now.first_sample}, step "
        f"{now.first_step}) other samples would have them: keep the length of phase 1 and the "
        "batch sizes in it (--tst-step-ratio or --tst-steps, --train-iters, --global-batch-size or "
        "--step-batch-size-schedule), or start a new run from its weights with --finetune."
    )


def refuse_other_past(
    args: Namespace, schedule: SuperpositionSchedule, saved: Any, steps_done: int
) -> None:
    """Refuses batch sizes with which the steps of a checkpoint would have read something else.

    Args:
        args: command line.
        schedule: phases and batch sizes of the command line.
        saved: Megatron's arguments in the checkpoint.
        steps_done: steps of the checkpoint.

    Raises:
        UsageError: naming the arguments to pass instead.
    """
    samples_read = saved.consumed_train_samples
    assumed = schedule.batch_sizes.samples_at(steps_done)
    if assumed == samples_read:
        return
    past = batch_sizes_from_args(saved)
    if past.samples_at(steps_done) == samples_read:
        whole = past.continued_by(schedule.batch_sizes, samples_read)
        remedy = f"pass {_flags_of(whole, schedule, saved)} instead"
    else:
        remedy = "write the batch sizes from its first step on as --step-batch-size-schedule"
    raise UsageError(
        f"--load {args.load} had read {samples_read} samples in {steps_done} steps, and with "
        f"{_given(args)} it would have been {assumed}: {remedy}, or start a new run from its "
        "weights with --finetune."
    )


def refuse_other_switch(
    args: Namespace, schedule: SuperpositionSchedule, before: Sequence[Phase]
) -> None:
    """Refuses phases that begin at other samples than those of the checkpoint.

    Args:
        args: command line.
        schedule: phases and batch sizes of the command line.
        before: phases of the checkpoint.

    Raises:
        UsageError: naming the ``--tst-steps`` to pass, where one keeps the switch.
    """
    was, now = ([(p.first_sample, p.bag_size) for p in ps] for ps in (before, schedule.phases))
    if was == now:
        return
    if not len(before) == len(schedule.phases) == 2:
        raise UsageError(
            f"--load {args.load} was trained with {_places(before)}, and this command has "
            f"{_places(schedule.phases)}: keep its phases, or start a new run from its weights "
            "with --finetune."
        )
    switch, other = before[1], schedule.phases[1]
    step = _step_at(switch.first_sample, schedule.batch_sizes)
    if step is None:
        remedy = _no_step_at(switch.first_sample, schedule.sequence_length)
    else:
        remedy = f"pass --tst-steps {step}"
    raise UsageError(
        f"--load {args.load} was trained with the switch at sample {switch.first_sample} (step "
        f"{switch.first_step}), and this command has it at sample {other.first_sample} (step "
        f"{other.first_step}): {remedy}, or start a new run from its weights with --finetune."
    )


def _places(phases: Sequence[Phase]) -> str:
    return ", ".join(
        f"bags of {phase.bag_size} from sample {phase.first_sample} (step {phase.first_step}) on"
        for phase in phases
    )


def _given(args: Namespace) -> str:
    if args.step_batch_size_schedule is not None:
        return f"--step-batch-size-schedule {args.step_batch_size_schedule!r}"
    given = f"--global-batch-size {args.global_batch_size}"
    if args.decrease_batch_size_if_needed:
        given += " and --decrease-batch-size-if-needed on these ranks"
    return given


def _flags_of(whole: BatchSizes, schedule: SuperpositionSchedule, saved: Any) -> str:
    """What to pass for a run of these batch sizes that keeps switch and learning rate."""
    length = schedule.sequence_length
    flags = f"--step-batch-size-schedule {whole.text(length)!r} {learning_rate_flags(saved)}"
    switch = recorded_phases(getattr(saved, "tst_settings", None))[-1].first_sample
    if not switch:
        return flags
    step = _step_at(switch, whole)
    if step is None:
        return f"{flags} ({_no_step_at(switch, length)})"
    return f"{flags} --tst-steps {step}"


def _step_at(sample: int, batch_sizes: BatchSizes) -> int | None:
    """The step that starts at a sample, None without one."""
    step = batch_sizes.steps_to(sample)
    return step if batch_sizes.samples_at(step) == sample else None


def _no_step_at(switch: int, sequence_length: int) -> str:
    return (
        f"no --tst-steps keeps the switch at sample {switch}, where no step begins: change the "
        f"batch size at that sample instead, threshold {switch * sequence_length}"
    )
