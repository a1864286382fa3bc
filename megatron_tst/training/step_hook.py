"""Runs a function after every training step of Megatron's loop.

``megatron.training.training.train`` offers no callback between steps. Its last call in each step is
``checkpoint_and_decide_exit``; this module puts a function in front of that call. It is the only
place where the training loop is patched.

Megatron saves by itself between two steps of different batch sizes, also when the step before was
saved already. ``save_checkpoint_and_time`` is wrapped to save a step once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, training

from megatron_tst.training.upstream import unwrapped


@dataclass(frozen=True)
class TrainingStep:
    """State of the run after an optimizer step.

    Attributes:
        iteration: number of steps done.
        model: model chunks of this rank, wrapped.
        optimizer: Megatron optimizer.
    """

    iteration: int
    model: list[Any]
    optimizer: Any


def run_after_each_step(
    callback: Callable[[TrainingStep], bool], before_next_step: Callable[[], None]
) -> None:
    """Calls functions around Megatron's own save after each step; the last call wins.

    Args:
        callback: called when the step, its log line and its evaluation are done, before the save;
            returns whether this step must be saved, whatever the interval.
        before_next_step: called after the save.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    name = "checkpoint_and_decide_exit"
    upstream = unwrapped(training, name)
    _save_once_before_a_batch_change()

    @wraps(upstream)
    def checkpoint_and_decide_exit(
        model: list[Any],
        optimizer: Any,
        opt_param_scheduler: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        must_save = callback(TrainingStep(iteration, model, optimizer))
        with _due(iteration) if must_save else nullcontext():
            is_to_exit = bool(
                upstream(model, optimizer, opt_param_scheduler, iteration, *args, **kwargs)
            )
        before_next_step()
        return is_to_exit

    checkpoint_and_decide_exit.calls_back = True  # type: ignore[attr-defined]
    setattr(training, name, checkpoint_and_decide_exit)


def calls_back() -> bool:
    """Whether :func:`run_after_each_step` was called."""
    return getattr(training.checkpoint_and_decide_exit, "calls_back", False)


def _save_once_before_a_batch_change() -> None:
    """Drops the save before a step with more micro-batches, if the step before is saved already.

    Other saves of the same step stay: the rerun state machine has something to add to it.
    """
    name = "save_checkpoint_and_time"
    upstream = unwrapped(training, name)
    micro_batches: dict[int, int] = {}

    @wraps(upstream)
    def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> None:
        now = get_num_microbatches()
        if micro_batches.pop(iteration, now) != now:
            return
        upstream(iteration, *args, **kwargs)
        micro_batches.clear()
        micro_batches[iteration] = now

    setattr(training, name, save_checkpoint_and_time)


@contextmanager
def _due(iteration: int) -> Iterator[None]:
    """Makes Megatron save this step as one of the interval, so that it does not do so again."""
    args = get_args()
    interval, args.save_interval = args.save_interval, iteration
    try:
        yield
    finally:
        args.save_interval = interval
