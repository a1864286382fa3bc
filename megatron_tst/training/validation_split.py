"""What the evaluations of a run read."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.data.validation import FixedValidationDataset
from megatron_tst.settings.validation_arguments import refuse_short_sets


def samples_per_evaluation(args: Namespace) -> int | None:
    """What each evaluation reads; None for all that there is."""
    if args.full_validation:
        return None
    return int(args.eval_iters * args.eval_global_batch_size)


def evaluations(args: Namespace) -> tuple[int, int]:
    """The evaluations that this command would have done by now, and those of the whole run.

    Megatron's own count (``get_train_valid_test_num_samples``) leaves one out where
    ``--start-eval-at-iter`` is a multiple of ``--eval-interval``.

    Args:
        args: Megatron's, with the step of the checkpoint.

    Returns:
        Both counts; the second includes the evaluation after training.
    """
    if args.skip_train:
        return 0, 1
    left_out = max((args.start_eval_at_iter or 0) - 1, 0) // args.eval_interval
    steps = args.iteration, max(args.iteration, args.train_iters)
    done, planned = (max(step // args.eval_interval - left_out, 0) for step in steps)
    return done, planned + 1


def validation_split(built: Any, args: Namespace, is_reader: bool) -> Any:
    """The validation split as Megatron's loop is to read it.

    It repeats one set of samples, so that every evaluation of a run, in either phase and after a
    resume with other settings of the evaluation, reads the same tokens. Megatron asks for the place
    of a resume after this, and finds the one that belongs to the step and to this command.

    Args:
        built: dataset of the split; several with ``--multiple-validation-sets``.
        args: Megatron's; its count of samples evaluated is set.
        is_reader: whether this rank reads data.

    Returns:
        What takes the place of ``built``: None if nothing is evaluated, or on other ranks.

    Raises:
        UsageError: nothing is there to validate on, or less than an evaluation reads.
    """
    per_evaluation = samples_per_evaluation(args)
    if per_evaluation is not None:
        done, planned = evaluations(args)
        args.consumed_valid_samples = done * per_evaluation
    if not is_reader:
        # None, or as many as there are sets.
        return built
    if per_evaluation == 0:
        # Megatron would refuse to read a blend of no samples.
        return None
    if built is None:
        wanted, remedy = f"--eval-iters is {args.eval_iters}", "use --eval-iters 0"
        if per_evaluation is None:
            wanted, remedy = "--full-validation is set", "remove the flag and use --eval-iters 0"
        raise UsageError(
            f"{wanted} and there is no data for validation: give it a share with --split, a corpus "
            f"with --valid-data-path, or {remedy}."
        )
    if per_evaluation is None:
        sets = built if isinstance(built, list) else [built]
        refuse_short_sets([len(dataset) for dataset in sets], args.data_parallel_size)
        return built
    return FixedValidationDataset(built, per_evaluation, planned * per_evaluation)
