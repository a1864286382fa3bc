"""A run that is done and is started again, as a requeued job may be: it is evaluated, and ends.

Megatron would fail over a train split that has nothing left, or train no step and save the last one
again.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from megatron.training import print_rank_0
from megatron.training.global_vars import get_tensorboard_writer

from megatron_tst.upstream.patches import wrap


def evaluate_only(args: Namespace, steps_done: int, total_steps: int) -> None:
    """Turns a command whose steps are all done into an evaluation of its last checkpoint.

    Nothing is saved. The losses go to TensorBoard only where those of the last step are not there,
    because the run was killed between its last checkpoint and its last evaluation.

    Args:
        args: validated command line, changed in place.
        steps_done: steps of the checkpoint.
        total_steps: steps of the run.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    print_rank_0(
        f"> the run is done: --load {args.load} has done {steps_done} of {total_steps} steps. It "
        "is evaluated; nothing is trained or saved. To train on, pass more --train-iters or "
        "--train-samples."
    )
    # The state of the optimizer is as large as several models, and nothing needs it.
    args.skip_train = args.no_load_optim = True
    wrap(
        "megatron.training.training:evaluate_and_print_results",
        lambda upstream: _logged_once(upstream, args),
    )


def _logged_once(upstream: Callable[..., None], args: Namespace) -> Callable[..., None]:
    is_missing: bool | None = None

    @wraps(upstream)
    def evaluate_and_print_results(*positional: Any, **named: Any) -> None:
        nonlocal is_missing
        # Once: the loss of the test split has the tag and the step of the validation loss.
        if is_missing is None and get_tensorboard_writer():
            is_missing = not _has_validation_loss(Path(args.tensorboard_dir), args.iteration)
        upstream(*positional, **named | {"write_to_tensorboard": bool(is_missing)})

    return evaluate_and_print_results


def _has_validation_loss(folder: Path, step: int) -> bool:
    """Whether an event file has a validation loss of a step."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    files = folder.glob("events.out.tfevents.*")
    # The loss is in the file of the last attempt that trained, and files are large.
    for path in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        for record in RawEventFileLoader(str(path)).Load():
            if b" validation" in record and Event.FromString(record).step == step:
                return True
    return False
