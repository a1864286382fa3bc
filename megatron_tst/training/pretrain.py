"""Pre-training with superposition on Megatron's own loop."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, inprocess_restart, pretrain, print_rank_0
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args, parse_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tst import cpu
from megatron_tst.arguments import (
    add_superposition_arguments,
    refuse_no_epochs,
    superposition_config_from_args,
    superposition_schedule_from_args,
)
from megatron_tst.batch_arguments import (
    batch_sizes_from_args,
    refuse_bad_batch_sizes,
    refuse_unusable_batch_sizes,
)
from megatron_tst.conflicts import refuse_conflicting_arguments
from megatron_tst.cpu.arguments import refuse_gpu_arguments, set_cpu_defaults
from megatron_tst.model.model import superpose_built_models
from megatron_tst.model.offset_loss import OffsetLossMeter
from megatron_tst.schedule import SuperpositionSchedule
from megatron_tst.training.data_budget import check_data_budget
from megatron_tst.training.datasets import (
    DatasetsProvider,
    check_data_files,
    check_data_vocabulary,
)
from megatron_tst.training.failures import report_failure
from megatron_tst.training.forward_step import ForwardStep
from megatron_tst.training.fused_paths import report_fused_paths
from megatron_tst.training.metrics import StepClock
from megatron_tst.training.optimizer_state import load_without_gradients
from megatron_tst.training.reporting import (
    ProgressReporter,
    count_parameters,
    write_run_description,
)
from megatron_tst.training.resume import check_resume, record_settings
from megatron_tst.training.step_hook import TrainingStep, run_after_each_step
from megatron_tst.training.switch import switch_phase

_PACKAGE = Path(__file__).resolve().parents[1]


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
        # Once steps were done the input was good: what goes wrong then needs its traceback.
        is_input = isinstance(error, ValueError) and _raised_by_this_package(error)
        if not is_input or _steps_were_done():
            return report_failure(error)
        _print_error(error)
        return 2
    return 0


def run(after_step: Callable[[TrainingStep], None] | None = None) -> None:
    """Parses the command line and trains.

    Args:
        after_step: called after each optimizer step, once the step is reported.

    Raises:
        ValueError: bad input, before any training.
    """
    _rendezvous_alone()
    with _refusing_in_one_line():
        args, schedule = _parse()
        if not cpu.is_active():
            report_fused_paths(args)
        is_hybrid = args.hybrid_layer_pattern is not None
        model_config = (hybrid_config_from_args if is_hybrid else gpt_config_from_args)(args)
        datasets_provider = DatasetsProvider(args, schedule)
        schedule = check_data_budget(args, schedule, datasets_provider.config)
        _print_settings(schedule)
    if schedule.config.enabled or args.tst_loss_impl == "linear":
        superpose = partial(
            superpose_built_models,
            superposition=schedule.config,
            loss_implementation=args.tst_loss_impl,
        )
        model_config.pre_wrap_hooks.append(superpose)
    clock, meter = StepClock(args.tst_seconds), OffsetLossMeter()
    reporter = ProgressReporter(schedule, clock, meter)
    step_end = _StepEnd(schedule, clock, reporter, after_step)
    run_after_each_step(step_end, before_next_step=clock.start)
    load_without_gradients()
    launch, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    launch(
        pretrain_cfg_container_from_args(args, model_config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        ForwardStep(schedule, clock, meter),
        store=store,
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _StepEnd:
    """What happens after each optimizer step."""

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
        self.clock.stop()
        args = get_args()
        args.tst_seconds = self.clock.seconds
        if self._is_first_step:
            self._is_first_step = False
            write_run_description(args, self.schedule, count_parameters(step.model))
        self.reporter.report(step.iteration, args)
        is_switch = self.schedule.config.enabled and step.iteration == self.schedule.switch_step
        if is_switch:
            switch_phase(step, self.schedule.config)
        if self.after_step is not None:
            self.after_step(step)
        # Megatron would do it between the steps, where the clock runs.
        is_batch_change = (
            step.iteration < self.schedule.total_steps
            and self.schedule.batch_sizes.changes_at(step.iteration)
        )
        return is_switch or is_batch_change


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


def _parse() -> tuple[argparse.Namespace, SuperpositionSchedule]:
    # Parsed twice: Megatron's validation prints all arguments, builds the tokenizer and the
    # writers, and reports by assertion.
    args = parse_args(add_arguments)
    check_arguments(args)
    args = parse_and_validate_args(add_arguments, args_defaults=_evaluation_defaults(args))
    # Validation resolves deprecated spellings and --use-checkpoint-args.
    refuse_conflicting_arguments(args)
    schedule = superposition_schedule_from_args(args)
    check_data_vocabulary(args)
    record_settings(args, schedule)
    refuse_unusable_batch_sizes(args, steps_done=check_resume(args, schedule))
    return args, schedule


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
        raise ValueError(
            f"--step-batch-size-schedule {args.step_batch_size_schedule!r}: evaluations read "
            f"batches of its first size, {size}, which {ranks} data-parallel ranks cannot share. "
            f"Pass --eval-global-batch-size with a multiple of {at_once}; other sizes than before "
            "change the samples that evaluations read."
        )
    return {"eval_global_batch_size": size}


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses what is wrong with a parsed command line before Megatron validates it.

    Raises:
        ValueError: naming the argument or file, its value and the remedy.
    """
    if args.yaml_cfg is not None:
        raise ValueError(f"--yaml-cfg {args.yaml_cfg} is not supported: pass its values as flags.")
    refuse_bad_batch_sizes(args)
    refuse_no_epochs(args)
    superposition_config_from_args(args)
    has_batch_sizes = args.global_batch_size or args.step_batch_size_schedule
    if has_batch_sizes and (args.train_iters or args.train_samples):
        superposition_schedule_from_args(args)
    refuse_conflicting_arguments(args)
    if cpu.is_active():
        refuse_gpu_arguments(args)
    elif args.dataloader_inter_document_masking and args.transformer_impl == "local":
        raise ValueError(
            "--dataloader-inter-document-masking does not work with --transformer-impl local on a "
            "GPU, whose attention takes no packed sequences: use transformer_engine."
        )
    check_data_files(args)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the ``--tst-*`` arguments to Megatron's parser, and the defaults of the platform."""
    # Megatron's own usage lists all arguments and would bury the message of a wrong one.
    parser.usage = "%(prog)s [arguments of Megatron and --tst-*, listed by --help]"
    parser.formatter_class = _HelpFormatter
    parser = add_superposition_arguments(parser)
    # By itself Megatron repeats a step with a NaN, saves, and exits without an error; and it checks
    # no NaN in the first step after a start, whose weights a later checkpoint would then hold.
    parser.set_defaults(rerun_mode="disabled")
    return set_cpu_defaults(parser) if cpu.is_active() else parser


class _HelpFormatter(argparse.HelpFormatter):
    """Prints a help text with a bare percent sign, of which Megatron 0.19 has one, as it is."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except ValueError:
            return action.help or ""


def _print_settings(schedule: SuperpositionSchedule) -> None:
    print_rank_0("> token superposition:")
    for name, value in schedule.config.resolved(schedule.switch_step).to_dict().items():
        print_rank_0(f"    {name:.<24} {value}")
    steps = schedule.total_steps
    print_rank_0(f"    {'switch_step':.<24} {schedule.switch_step} of {steps}")
    print_rank_0(f"    {'data_tokens':.<24} {schedule.data_tokens(steps)}")
    print_rank_0(f"    {'equivalent_tokens':.<24} {schedule.equivalent_tokens(steps)}")


@contextmanager
def _refusing_in_one_line() -> Iterator[None]:
    """Makes one ValueError of what Megatron and its libraries raise over a bad command line."""
    try:
        yield
    except Exception as error:
        if _raised_by_this_package(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"Megatron cannot run this command line: {str(error) or frame.line} "
            f"({type(error).__name__} in {frame.filename}:{frame.lineno})"
        ) from error


def _print_error(error: BaseException) -> None:
    # Before the process group exists every rank meets the same error, and one line is enough;
    # afterwards it may be the error of one rank.
    if torch.distributed.is_initialized() or os.environ.get("RANK", "0") == "0":
        print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)


def _raised_by_this_package(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(_PACKAGE)
