"""Keeps the learning rate schedule where it is when a checkpoint is loaded.

Megatron-Core 0.19 loads the scheduler with the optimizer only: with ``--no-load-optim`` the
schedule would begin again, warm-up included. And it tells the groups of the optimizer apart by
their learning rates: with ``--override-opt_param-scheduler`` or
``--use-checkpoint-opt_param-scheduler`` and another ``--lr`` it would not find the saved ones.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint
from megatron.training import get_args, print_rank_0

from megatron_tst.checkpoint.tracker import RELEASE
from megatron_tst.settings.batch_arguments import batch_sizes_from_args
from megatron_tst.training.checkpoint_choice import checkpoint_to_load
from megatron_tst.training.fully_sharded import continue_counting
from megatron_tst.upstream.patches import wrap

_RATES = {"max_lr": ("lr", "decoupled_lr"), "min_lr": ("min_lr", "decoupled_min_lr")}


def keep_learning_rate_schedule() -> None:
    """Makes Megatron's load continue the schedule. Idempotent.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    wrap("megatron.training.training:load_checkpoint", _continuing_the_schedule)


def _continuing_the_schedule(upstream: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(upstream)
    def load_checkpoint(
        model: list[Any], optimizer: Any, opt_param_scheduler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        arguments = get_args()
        has_both = optimizer is not None and opt_param_scheduler is not None
        saved = _common_state(arguments) if has_both else None
        if saved is None:
            return upstream(model, optimizer, opt_param_scheduler, *args, **kwargs)
        with _saved_rates(optimizer, arguments, saved["args"]):
            loaded = upstream(model, optimizer, opt_param_scheduler, *args, **kwargs)
            if arguments.no_load_optim:
                _go_on(opt_param_scheduler, arguments, saved)
            elif arguments.use_torch_fsdp2:
                continue_counting(optimizer, saved["optimizer"])
        # Again, from the rates that now hold.
        opt_param_scheduler.step(0)
        return loaded

    return load_checkpoint


def _common_state(args: Namespace) -> dict[str, Any] | None:
    """What all ranks share of the checkpoint to continue, None for a new run."""
    folder = None if args.finetune else checkpoint_to_load(args)
    if folder is None or folder.name == RELEASE:
        return None
    if not check_is_distributed_checkpoint(str(folder)):
        return None
    state: dict[str, Any] = load_common_state_dict(str(folder))
    return state if state.get("args") is not None else None


def _go_on(scheduler: Any, args: Namespace, saved: dict[str, Any]) -> None:
    state = saved.get("opt_param_scheduler")
    if state is None:  # --no-save-optim saves none. One step of the schedule is one sample.
        skipped = _samples_of_skipped_steps(
            saved["args"], saved["iteration"], args.skipped_train_samples
        )
        scheduler.step(args.consumed_train_samples - skipped)
    else:
        scheduler.load_state_dict(state)
    print_rank_0(
        "> --no-load-optim: the learning rate schedule goes on at sample "
        f"{scheduler.num_steps}; the moments of the optimizer start at 0"
    )


def _samples_of_skipped_steps(saved: Any, steps_done: int, skipped: int) -> int:
    """The samples that were read for steps of ``--iterations-to-skip``.

    Args:
        saved: Megatron's arguments in the checkpoint.
        steps_done: steps of the checkpoint, skipped ones included.
        skipped: what Megatron has counted: all samples of a step that is skipped, and of any other
            those by which ``--decrease-batch-size-if-needed`` made it smaller, which nobody read.
    """
    if getattr(saved, "step_batch_size_schedule", None) is not None:
        # Megatron makes no batch of a schedule smaller.
        return skipped
    size = batch_sizes_from_args(saved).size_at(0)
    unread = saved.global_batch_size - size
    if unread == 0:
        return skipped
    # skipped == size * steps + unread * (steps_done - steps), where unread < size; less where a
    # batch size nearer to what the ranks share was asked for before.
    steps = (skipped - unread * steps_done) // (size - unread)
    return size * max(steps, 0)


@contextmanager
def _saved_rates(optimizer: Any, args: Namespace, saved: Any) -> Iterator[None]:
    """Gives the groups the rates of the checkpoint, by which Megatron finds their state."""
    if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        yield
        return
    own = [{key: group.get(key) for key in _RATES} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        for key, names in _RATES.items():
            for name in names:
                value = getattr(args, name, None)
                if value is not None and group.get(key) == value:
                    group[key] = getattr(saved, name, value)
                    break
    yield
    if args.override_opt_param_scheduler:
        # Loading keeps their order, in new objects.
        for group, rates in zip(optimizer.param_groups, own, strict=True):
            group.update(rates)
