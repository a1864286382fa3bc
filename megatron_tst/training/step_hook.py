"""Runs a function after every training step of Megatron's loop.

``megatron.training.training.train`` offers no callback between steps. Its last call in each step is
``checkpoint_and_decide_exit``; this module puts a function in front of that call. It is the only
place where the training loop is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from importlib.metadata import version
from typing import Any

from megatron.training import training


@dataclass(frozen=True)
class TrainingStep:
    """State of the run after an optimizer step.

    Attributes:
        iteration: number of steps done.
        model: model chunks of this rank, wrapped.
        optimizer: Megatron optimizer.
        save_checkpoint: writes a checkpoint of this step.
    """

    iteration: int
    model: list[Any]
    optimizer: Any
    save_checkpoint: Callable[[], None]


def run_after_each_step(
    callback: Callable[[TrainingStep], None], before_next_step: Callable[[], None]
) -> None:
    """Calls functions around Megatron's own save after each step; the last call wins.

    Args:
        callback: called when the step, its log line and its evaluation are done, before the save.
        before_next_step: called after the save.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    name = "checkpoint_and_decide_exit"
    if not hasattr(training, name):
        raise RuntimeError(
            f"megatron.training.training.{name} does not exist in megatron-core "
            f"{version('megatron-core')}: install the version pinned in pyproject.toml."
        )
    upstream = getattr(training, name)
    upstream = getattr(upstream, "__wrapped__", upstream)

    @wraps(upstream)
    def checkpoint_and_decide_exit(
        model: list[Any],
        optimizer: Any,
        opt_param_scheduler: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        step = (model, optimizer, opt_param_scheduler, iteration, *args)
        save = partial(_save, *step, **kwargs)
        callback(TrainingStep(iteration, model, optimizer, save))
        is_to_exit = bool(upstream(*step, **kwargs))
        before_next_step()
        return is_to_exit

    setattr(training, name, checkpoint_and_decide_exit)


def _save(
    model: list[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
    iteration: int,
    floating_point_operations: float,
    checkpointing_context: Any,
    train_data_iterator: Any,
) -> None:
    training.save_checkpoint_and_time(
        iteration,
        model,
        optimizer,
        opt_param_scheduler,
        floating_point_operations,
        checkpointing_context,
        train_data_iterator=train_data_iterator,
    )
