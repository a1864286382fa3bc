"""Runs a function after every training step of Megatron's loop.

``megatron.training.training.train`` offers no callback between steps. Its last call in each step is
``checkpoint_and_decide_exit``; this module puts a function in front of that call. It is the only
place where the training loop is patched.

A step of ``--iterations-to-skip`` has no such call. ``dummy_train_step``, which reads its data,
fails on a stage that has no data loader or several, and broadcasts by the shape of plain batches.
Here it only reads, and calls the function too.

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
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args, training

from megatron_tst.upstream.patches import replace, wrap


@dataclass(frozen=True)
class TrainingStep:
    """State of the run after an optimizer step.

    Attributes:
        iteration: number of steps done.
        model: model chunks of this rank, wrapped.
        optimizer: Megatron optimizer.
        is_skipped: whether its data were read and nothing else was done (``--iterations-to-skip``).
    """

    iteration: int
    model: list[Any]
    optimizer: Any
    is_skipped: bool = False


def run_after_each_step(
    callback: Callable[[TrainingStep], bool], before_next_step: Callable[[], None]
) -> None:
    """Calls functions around Megatron's own save after each step; the last call wins.

    Args:
        callback: called when the step, its log line and its evaluation are done, before the save;
            returns whether this step must be saved, whatever the interval. Also called after a step
            that is skipped, which Megatron neither logs, nor evaluates, nor saves.
        before_next_step: called after the save.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    loop = _Loop(callback)
    wrap("megatron.training.training:save_checkpoint_and_time", _once_before_a_batch_change)
    wrap("megatron.training.training:train", loop.noting_what_is_trained)
    replace("megatron.training.training:dummy_train_step", loop.skip)
    wrap(
        "megatron.training.training:checkpoint_and_decide_exit",
        lambda upstream: _calling_back(upstream, loop, before_next_step),
    )


def _calling_back(
    upstream: Callable[..., Any],
    loop: _Loop,
    before_next_step: Callable[[], None],
) -> Callable[..., bool]:
    @wraps(upstream)
    def checkpoint_and_decide_exit(
        model: list[Any],
        optimizer: Any,
        opt_param_scheduler: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        loop.steps_done = iteration
        must_save = loop.callback(TrainingStep(iteration, model, optimizer))
        with _due(iteration) if must_save else nullcontext():
            is_to_exit = bool(
                upstream(model, optimizer, opt_param_scheduler, iteration, *args, **kwargs)
            )
        before_next_step()
        return is_to_exit

    checkpoint_and_decide_exit.calls_back = True  # type: ignore[attr-defined]
    return checkpoint_and_decide_exit


def calls_back() -> bool:
    """Whether :func:`run_after_each_step` was called."""
    return getattr(training.checkpoint_and_decide_exit, "calls_back", False)


@dataclass
class _Loop:
    """Megatron's loop, which does not tell its function for a skipped step where it is.

    Attributes:
        callback: see :func:`run_after_each_step`.
        steps_done: of the run.
        model: as :class:`TrainingStep` has it.
        optimizer: likewise.
    """

    callback: Callable[[TrainingStep], bool]
    steps_done: int = 0
    model: Any = None
    optimizer: Any = None

    def noting_what_is_trained(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's ``train``."""

        @wraps(upstream)
        def train(forward_step: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self.steps_done, self.model, self.optimizer = get_args().iteration, model, optimizer
            return upstream(forward_step, model, optimizer, *args, **kwargs)

        return train

    def skip(self, data_iterator: Any) -> None:
        """In the place of ``dummy_train_step``: reads the data of a skipped step."""
        rerun = get_rerun_state_machine()
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        while rerun.should_run_forward_backward(data_iterator):
            # One for each virtual stage; None where a stage or a rank reads nothing.
            for iterator in iterators:
                for _ in range(get_num_microbatches() if iterator is not None else 0):
                    next(iterator)
        self.steps_done += 1
        self.callback(TrainingStep(self.steps_done, self.model, self.optimizer, is_skipped=True))


def _once_before_a_batch_change(upstream: Callable[..., None]) -> Callable[..., None]:
    """Drops the save before a step with more micro-batches, if the step before is saved already.

    Other saves of the same step stay: the rerun state machine has something to add to it.
    """
    micro_batches: dict[int, int] = {}

    @wraps(upstream)
    def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> None:
        now = get_num_microbatches()
        if micro_batches.pop(iteration, now) != now:
            return
        upstream(iteration, *args, **kwargs)
        micro_batches.clear()
        micro_batches[iteration] = now

    return save_checkpoint_and_time


@contextmanager
def _due(iteration: int) -> Iterator[None]:
    """Makes Megatron save this step as one of the interval, so that it does not do so again."""
    args = get_args()
    interval, args.save_interval = args.save_interval, iteration
    try:
        yield
    finally:
        args.save_interval = interval
