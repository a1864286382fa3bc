"""What is wrong with a parsed command line, before Megatron validates it.

A run ends with the first of these errors; preflight shows them all.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

from megatron_tst.common.errors import UsageError
from megatron_tst.common.platform import Platform
from megatron_tst.settings.arguments import (
    refuse_no_epochs,
    superposition_config_from_args,
    superposition_schedule_from_args,
)
from megatron_tst.settings.batch_arguments import refuse_bad_batch_sizes
from megatron_tst.settings.conflicts import conflicts
from megatron_tst.settings.unheeded import unheeded_arguments
from megatron_tst.settings.validation_arguments import validation_errors

_OLD_NAMES = {
    "hybrid_override_pattern": "hybrid_layer_pattern",
    "encoder_num_layers": "num_layers",
    "encoder_seq_length": "seq_length",
}
_OLD_GRAPHS = {"enable_cuda_graph": "local", "external_cuda_graph": "transformer_engine"}


def argument_errors(args: argparse.Namespace, platform: Platform) -> Iterator[str]:
    """Checks a parsed command line by itself; files are not looked at.

    Args:
        args: parsed, not validated.
        platform: that the run is for.

    Returns:
        Messages, each naming the argument, its value and the remedy.
    """
    args = _under_current_names(args)
    if args.yaml_cfg is not None:
        yield f"--yaml-cfg {args.yaml_cfg} is not supported: pass its values as flags."
    bad_batch_sizes = list(_error(refuse_bad_batch_sizes, args))
    yield from bad_batch_sizes
    yield from _error(refuse_no_epochs, args)
    # The length of a phase is counted in batches.
    yield from _error(superposition_config_from_args if bad_batch_sizes else _refuse_phases, args)
    yield from _length_errors(args)
    yield from _learning_rate_errors(args)
    yield from conflicts(args)
    yield from validation_errors(args)
    yield from unheeded_arguments(args, platform.has_gpu)
    yield from _error(platform.refuse_arguments, args)
    is_local_on_gpu = platform.has_gpu and args.transformer_impl == "local"
    if is_local_on_gpu and args.dataloader_inter_document_masking:
        yield (
            "--dataloader-inter-document-masking does not work with --transformer-impl local on a "
            "GPU, whose attention takes no packed sequences: use transformer_engine."
        )


def _under_current_names(args: argparse.Namespace) -> argparse.Namespace:
    """A copy in which old spellings, which Megatron's validation resolves, have their new names."""
    args = copy.copy(args)
    for old, new in _OLD_NAMES.items():
        if getattr(args, new) is None:
            setattr(args, new, getattr(args, old))
    for flag, implementation in _OLD_GRAPHS.items():
        if getattr(args, flag, False):
            args.cuda_graph_impl = implementation
    return args


def _error(
    check: Callable[[argparse.Namespace], object], args: argparse.Namespace
) -> Iterator[str]:
    """The message of a check that raises; nothing if it passes."""
    try:
        check(args)
    except UsageError as error:
        yield str(error)


def _length_errors(args: argparse.Namespace) -> Iterator[str]:
    if not (args.train_iters or args.train_samples or args.skip_train):
        yield "--train-iters or --train-samples is missing, so the run has no steps: pass one."
    batch = args.global_batch_size or args.micro_batch_size or 0
    if args.train_samples and args.train_samples < batch:
        yield (
            f"--train-samples {args.train_samples} is less than one batch of {batch}, so the run "
            "has no steps: pass more."
        )
    for flag, interval, off in (
        ("--log-interval", args.log_interval, "a large one logs little"),
        ("--eval-interval", args.eval_interval, "--eval-iters 0 evaluates never"),
    ):
        # Megatron divides by both.
        if interval is not None and interval < 1:
            yield f"{flag} {interval} is not positive: pass 1 or more; {off}."


def _learning_rate_errors(args: argparse.Namespace) -> Iterator[str]:
    # Megatron builds the model and reads the text before it asserts these, without a message.
    unit = "iters" if args.train_iters else "samples"
    until = f"lr_decay_{unit}" if getattr(args, f"lr_decay_{unit}") else f"train_{unit}"
    length, warmup = getattr(args, until), f"lr_warmup_{unit}"
    limit, named = length, f"{_flag(until)} {length}"
    if args.lr_warmup_fraction is not None:
        limit, named, warmup = 1, "1", "lr_warmup_fraction"
    if limit and getattr(args, warmup) >= limit:
        yield (
            f"{_flag(warmup)} {getattr(args, warmup)} is not less than {named}: the learning rate "
            "would never be reached; warm up for a part of the run."
        )
    wsd = f"lr_wsd_decay_{unit}"
    if length and args.lr_decay_style == "WSD" and getattr(args, wsd) is None:
        yield f"--lr-decay-style WSD has no decay: pass {_flag(wsd)}, such as a tenth of the run."
    if args.lr is not None and args.min_lr is not None and args.min_lr > args.lr:
        yield (
            f"--min-lr {args.min_lr} is above --lr {args.lr}: the learning rate ends at the "
            "former; pass a smaller one."
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_phases(args: argparse.Namespace) -> None:
    superposition_config_from_args(args)
    has_batch_sizes = args.global_batch_size or args.step_batch_size_schedule
    if has_batch_sizes and (args.train_iters or args.train_samples):
        superposition_schedule_from_args(args)
