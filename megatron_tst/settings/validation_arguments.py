"""Megatron's evaluation of whole validation sets, and what of it does not work.

Megatron-Core 0.19 has ``--full-validation`` for ``--multiple-validation-sets`` (of which there may
be one) only, and finds out everything else at the first evaluation, or at the last.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from megatron_tst.common.errors import UsageError


def validation_errors(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the arguments of validation sets by themselves.

    Args:
        args: parsed.

    Returns:
        Messages, each naming the argument, its value and the remedy.
    """
    full, sets = "--full-validation", "--multiple-validation-sets"
    if args.validation_set_names and not args.multiple_validation_sets:
        yield (
            f"--validation-set-names {' '.join(args.validation_set_names)} names the sets of "
            f"{sets}: pass that flag too, or remove the names."
        )
    if args.multiple_validation_sets != args.full_validation:
        given, missing = (full, sets) if args.full_validation else (sets, full)
        yield (
            f"{given} does not work without {missing} in this Megatron-Core: pass both (with the "
            "sets, or one, as --valid-data-path), or neither and choose the samples of an "
            "evaluation with --eval-iters."
        )
    if not args.full_validation:
        return
    stages = args.pipeline_model_parallel_size
    if args.tensor_model_parallel_size * stages > 1:
        size = args.eval_micro_batch_size or args.micro_batch_size
        if size != 1:
            yield (
                f"{full} reads one sample at a time, and ranks with --tensor-model-parallel-size "
                f"{args.tensor_model_parallel_size} and --pipeline-model-parallel-size {stages} "
                f"expect --eval-micro-batch-size {size}: pass --eval-micro-batch-size 1, and the "
                "number of data-parallel ranks as --eval-global-batch-size."
            )


def refuse_validation_data(
    args: argparse.Namespace, paths: Sequence[str], weights: Sequence[float] | None, has_test: bool
) -> None:
    """Refuses text, or a layout, that ``--full-validation`` cannot evaluate with.

    Args:
        args: validated.
        paths: corpora that the validation split comes from.
        weights: theirs, None without.
        has_test: whether there is a test split.

    Raises:
        UsageError: naming the argument, its value and the remedy.
    """
    if not args.full_validation:
        return
    listed, parts = " ".join(paths), args.virtual_pipeline_model_parallel_size
    if parts is not None:
        raise UsageError(
            f"--full-validation does not work with {parts} parts of the model on each pipeline "
            "rank: Megatron counts the samples of the sets on the first part only. Remove "
            "--full-validation, or --num-virtual-stages-per-pipeline-rank and its like."
        )
    if weights is not None:
        raise UsageError(
            "--full-validation reads each set once, and the validation data is a weighted "
            f"blend of {listed}: pass the sets without weights as --valid-data-path, and the data "
            "to train on, with its weights, as --train-data-path."
        )
    if has_test:
        raise UsageError(
            "--multiple-validation-sets does not work with test data, over which Megatron "
            "would fail after the last step: remove --test-data-path, or let the third number of "
            "--split be 0."
        )
    names = args.validation_set_names
    if names and len(names) != len(paths):
        raise UsageError(
            f"--validation-set-names {' '.join(names)} does not name each of the validation sets "
            f"{listed}: pass as many names."
        )


def refuse_short_sets(lengths: Sequence[int], data_parallel_size: int) -> None:
    """Refuses a set of which a rank would have nothing to evaluate.

    Args:
        lengths: samples of each set.
        data_parallel_size: ranks that share them.

    Raises:
        UsageError: naming the set and the remedy.
    """
    for index, length in enumerate(lengths):
        if length < data_parallel_size:
            raise UsageError(
                f"--full-validation: set {index} has {length} samples for {data_parallel_size} "
                "data-parallel ranks, each of which needs one: enlarge it."
            )
