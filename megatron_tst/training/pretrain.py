"""Pre-training with superposition on Megatron's own loop."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.training import (
    get_args,
    get_tensorboard_writer,
    inprocess_restart,
    pretrain,
    print_rank_0,
)
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tst.common.errors import UsageError, print_error, raise_interrupt
from megatron_tst.common.platform import platform
from megatron_tst.model.config import model_config_from_args
from megatron_tst.model.model import superpose_built_models
from megatron_tst.model.offset_loss import OffsetLossMeter
from megatron_tst.settings.losses import is_hosts, losses_of_run, plain_loss
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.training.command_line import parse_command_line
from megatron_tst.training.data_budget import check_data_budget
from megatron_tst.training.datasets import DatasetsProvider
from megatron_tst.training.failures import report_failure
from megatron_tst.training.forward_step import ForwardStep
from megatron_tst.training.fully_sharded import mend_fully_sharded, refuse_uneven_shards
from megatron_tst.training.fused_paths import report_fused_paths
from megatron_tst.training.metrics import StepClock
from megatron_tst.training.moments import fill_moments
from megatron_tst.training.optimizer_sharding import mend_saved_optimizer
from megatron_tst.training.optimizer_state import load_without_gradients
from megatron_tst.training.random_state import keep_random_state_of_each_rank
from megatron_tst.training.reporting import (
    ProgressReporter,
    count_parameters,
    write_run_description,
)
from megatron_tst.training.schedule_state import keep_learning_rate_schedule
from megatron_tst.training.step_hook import TrainingStep, run_after_each_step
from megatron_tst.training.switch import switch_phase
from megatron_tst.upstream.patches import check as check_upstream


def main(after_step: Callable[[TrainingStep], None] | None = None) -> int:
    """Runs the training that the command line describes.

    Args:
        after_step: called after each optimizer step, once the step is reported.

    Returns:
        The exit code: 2 after one line on standard error when the input is bad, 1 after a traceback
        and such a line when something else goes wrong.
    """
    try:
        run(after_step)
    # torch's own exception is no Exception.
    except (Exception, CheckpointException) as error:
        raise_interrupt(error)
        # Once steps were done the input was good: what goes wrong then needs its traceback.
        if not isinstance(error, UsageError) or _steps_were_done():
            return report_failure(error)
        # Before the process group exists every rank meets the same error, and one line is enough;
        # afterwards it may be the error of one rank.
        if torch.distributed.is_initialized() or os.environ.get("RANK", "0") == "0":
            print_error(error)
        return 2
    return 0


def run(after_step: Callable[[TrainingStep], None] | None = None) -> None:
    """Parses the command line and trains.

    Args:
        after_step: called after each optimizer step, once the step is reported.

    Raises:
        UsageError: bad input, before any training.
        RuntimeError: a Megatron that is not as this package knows it.
    """
    check_upstream()
    _rendezvous_alone()
    with _refusing_in_one_line():
        args, schedule = parse_command_line()
        if platform().has_gpu:
            report_fused_paths(args)
        model_config = model_config_from_args(args)
        datasets_provider = DatasetsProvider(args, schedule)
        schedule = check_data_budget(args, schedule, datasets_provider.config)
        _print_settings(schedule)
        _print_platform()
    if schedule.config.enabled or not is_hosts(plain_loss(args, platform().has_gpu)):
        superpose = partial(superpose_built_models, superposition=schedule.config)
        model_config.pre_wrap_hooks.append(superpose)
    clock, meter = StepClock(args.tst_seconds), OffsetLossMeter()
    reporter = ProgressReporter(schedule, clock, meter)
    step_end = _StepEnd(schedule, clock, reporter, after_step)
    run_after_each_step(step_end, before_next_step=clock.start)
    if args.use_torch_fsdp2:
        mend_fully_sharded()
        model_config.pre_wrap_hooks.append(partial(refuse_uneven_shards, args=args))
    load_without_gradients()
    mend_saved_optimizer()
    keep_random_state_of_each_rank()
    keep_learning_rate_schedule()
    launch, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    launch(
        pretrain_cfg_container_from_args(args, model_config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        ForwardStep(schedule, clock, meter),
        store=store,
    )
    _flush_tensorboard()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _flush_tensorboard() -> None:
    """Writes what was logged last: the final evaluation comes behind Megatron's own flush.

    A thread writes it, which ends with the process.
    """
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.flush()


class _StepEnd:
    """What happens after each step."""

    def __init__(
        self,
        schedule: SuperpositionSchedule,
        clock: StepClock,
        reporter: ProgressReporter,
        after_step: Callable[[TrainingStep], None] | None,
    ) -> None:
        self.schedule = schedule
        self.clock = clock
        self.reporter = reporter
        self.after_step = after_step
        self._is_first_step = True

    def __call__(self, step: TrainingStep) -> bool:
        """Returns whether the step must be saved: before the switch or another batch size."""
        args = get_args()
        if step.is_skipped:
            self._switch(step)
            return False
        self.clock.stop()
        args.tst_seconds = self.clock.seconds
        if self._is_first_step:
            self._is_first_step = False
            parameters = count_parameters(step.model)
            machine = platform()
            losses = losses_of_run(args, machine.has_gpu)
            write_run_description(args, self.schedule, parameters, losses, machine.describe())
        fill_moments(step.optimizer)
        self.reporter.report(step.iteration, args)
        self._switch(step)
        if self.after_step is not None:
            self.after_step(step)
        done = step.iteration
        # A skipped step is not saved: what lies behind it is saved before it.
        while not (must_save := self._must_be_saved(done)) and done + 1 in args.iterations_to_skip:
            done += 1
        return must_save or step.iteration < self.schedule.total_steps <= done

    def _switch(self, step: TrainingStep) -> None:
        if self.schedule.begins_phase(step.iteration):
            switch_phase(step, self.schedule)

    def _must_be_saved(self, steps_done: int) -> bool:
        # Before another batch size Megatron would save between the steps, where the clock runs.
        return self.schedule.begins_phase(steps_done) or (
            steps_done < self.schedule.total_steps
            and self.schedule.batch_sizes.changes_at(steps_done)
        )


def _steps_were_done() -> bool:
    try:
        return bool(getattr(get_args(), "curr_iteration", 0))
    except AssertionError:  # Megatron has no arguments yet.
        return False


def _rendezvous_alone() -> None:
    """Lets one process run without torchrun."""
    if "MASTER_ADDR" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))


def _print_settings(schedule: SuperpositionSchedule) -> None:
    print_rank_0("> token superposition:")
    for name, value in schedule.config.resolved(schedule.switch_step).to_dict().items():
        print_rank_0(f"    {name:.<24} {value}")
    steps = schedule.total_steps
    for phase in schedule.phases[1:] or schedule.phases:
        print_rank_0(f"    {'switch_step':.<24} {phase.first_step} of {steps}")
    print_rank_0(f"    {'data_tokens':.<24} {schedule.data_tokens(steps)}")
    print_rank_0(f"    {'equivalent_tokens':.<24} {schedule.equivalent_tokens(steps)}")


def _print_platform() -> None:
    if not platform().has_gpu:
        print_rank_0("> CPU platform:")
    for name, value in platform().describe().items():
        print_rank_0(f"    {name:.<24} {value}")


@contextmanager
def _refusing_in_one_line() -> Iterator[None]:
    """Makes one UsageError of what Megatron and its libraries raise over a bad command line."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if _was_in_megatron(error):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UsageError(
                f"Megatron cannot run this command line: {str(error) or frame.line} "
                f"({type(error).__name__} in {frame.filename}:{frame.lineno})"
            ) from error
        if isinstance(error, OSError):
            raise UsageError(str(error)) from error
        raise


def _was_in_megatron(error: BaseException) -> bool:
    """Whether Megatron, and not this package, called what failed."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    known = [package for package in packages if package in ("megatron", "megatron_tst")]
    return known[-1] == "megatron"
