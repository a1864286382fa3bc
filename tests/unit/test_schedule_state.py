"""Where the learning rate schedule goes on from a checkpoint that has none."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_tst.training.schedule_state import _go_on


class Scheduler:
    """Counts samples as Megatron's scheduler."""

    num_steps = 0

    def step(self, increment: int) -> None:
        self.num_steps += increment


@pytest.mark.parametrize(
    ("asked_for", "changes"),
    [
        (4, {"decrease_batch_size_if_needed": False}),
        # The ranks share what is asked for, or leave out two of six and three of seven.
        (4, {}),
        (6, {}),
        (7, {}),
        (2, {"step_batch_size_schedule": "0:4"}),
    ],
)
@pytest.mark.parametrize("skipped_steps", [0, 2, 10])
def test_skipped_steps_are_left_out(
    asked_for: int, changes: dict[str, Any], skipped_steps: int
) -> None:
    """Ten steps have read four samples each."""
    settings: dict[str, Any] = {
        "global_batch_size": asked_for,
        "decrease_batch_size_if_needed": True,
        "step_batch_size_schedule": None,
        "seq_length": 1,
        "micro_batch_size": 2,
        "data_parallel_size": 2,
        "gtp_weight_remat_size": 1,
    }
    saved = Namespace(**{**settings, **changes})
    # As Megatron's loop counts them; with a schedule no batch becomes smaller.
    unread = max(asked_for - 4, 0)
    skipped = 4 * skipped_steps + unread * (10 - skipped_steps)
    # What this command asks for has no part in the past.
    args = Namespace(consumed_train_samples=40, skipped_train_samples=skipped)
    scheduler = Scheduler()
    _go_on(scheduler, args, {"args": saved, "iteration": 10})
    assert scheduler.num_steps == 40 - 4 * skipped_steps


def test_a_batch_size_asked_for_that_was_changed_skips_nothing() -> None:
    """Five steps of six samples, of which ranks shared four, and five of seven."""
    saved = Namespace(
        global_batch_size=7,
        decrease_batch_size_if_needed=True,
        micro_batch_size=2,
        data_parallel_size=2,
        gtp_weight_remat_size=1,
    )
    scheduler = Scheduler()
    args = Namespace(consumed_train_samples=40, skipped_train_samples=25)
    _go_on(scheduler, args, {"args": saved, "iteration": 10})
    assert scheduler.num_steps == 40
