"""Writes checkpoints in the background on a CPU.

Megatron hands the tensors to a worker process that it starts afresh. Such a process knows nothing
of the CPU platform and fails; and on a CPU it would share the tensors that training goes on
changing. A fork of the rank has the platform and a snapshot of the tensors.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

from megatron_tst.upstream.patches import replace


class _OneAtATime(AsyncCallsQueue):
    """Waits for the save before: two at once would mix up what they report in a common queue."""

    def schedule_async_request(self, async_request: Any) -> int:
        self.maybe_finalize_async_calls(blocking=True)
        return int(super().schedule_async_request(async_request))


def start_writer(rank: int, mp_mode: str = "fork") -> None:
    """Prepares background saves; takes the place of Megatron's start of its worker."""
    replace("megatron.training.async_utils:_async_calls_queue", _OneAtATime(persistent=False))
    get_write_results_queue(mp_mode="fork")
