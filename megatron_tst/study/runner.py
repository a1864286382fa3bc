"""Runs executions side by side on one machine, each in a slot of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from statistics import fmean

from megatron_tst.study.execution import Execution, Slot
from megatron_tst.study.run_folder import ENDED, State

_POLL_SECONDS = 0.5
MOST_FAILURES_IN_A_ROW = 3


@dataclass
class Progress:
    """How a study stands.

    Attributes:
        executions: all runs, in the order in which they are started.
        states: of each run, by name.
        running: those that run now.
        failures_in_a_row: runs that failed since the last that did not.
        slots: how many run at once.
    """

    executions: Sequence[Execution]
    states: dict[str, State]
    running: list[Execution] = field(default_factory=list)
    failures_in_a_row: int = 0
    slots: int = 1

    def count(self, state: State) -> int:
        """Runs in a state."""
        return sum(found == state for found in self.states.values())

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the runs that this runner has started; None before their first steps.

        Runs that wait take the slots as these become free.
        """
        ends = [self.seconds_left_of(execution) for execution in self.running]
        waiting = [e for e in self.executions if self.states[e.name] == "waiting"]
        lengths = [self.seconds_left_of(execution) for execution in waiting]
        known = [seconds for seconds in (*ends, *lengths) if seconds is not None]
        if len(known) < len(ends) + len(lengths):
            return None
        busy = known[: len(ends)] + [0.0] * (self.slots - len(ends))
        heapify(busy)
        for seconds in known[len(ends) :]:
            heapreplace(busy, busy[0] + seconds)
        return max(busy)

    def seconds_left_of(self, execution: Execution) -> float | None:
        """Likewise of one run, at the pace of those of its model; of all, if it has none yet."""
        started = [e for e in self.executions if e.first_logged]
        alike = [e for e in started if e.model == execution.model]
        pace = _pace([execution]) or _pace(alike) or _pace(started)
        if pace is None:
            return None
        to_start = fmean(e.first_logged - e.started for e in started)
        return execution.seconds_left(pace, to_start)


def _pace(executions: Sequence[Execution]) -> float | None:
    """Seconds a step; None before there are steps."""
    steps = sum(e.pace[0] for e in executions)
    return sum(e.pace[1] for e in executions) / steps if steps else None


def run_all(
    executions: Sequence[Execution],
    slots: Sequence[Slot],
    on_change: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Runs what has not ended, and returns when nothing is left to run.

    A run that fails is left for the next call, and the others go on; nothing is started any more
    after several failures in a row, which have one cause.

    Args:
        executions: the runs; finished and diverged ones are left as they are.
        slots: as many run at once.
        on_change: called about twice a second.

    Raises:
        BlockingIOError: a process of a runner that was killed still holds the folder of a run.
    """
    progress = Progress(executions, {e.name: _state_of(e) for e in executions}, slots=len(slots))
    free = list(slots)
    waiting = [e for e in executions if progress.states[e.name] == "waiting"]
    held: dict[str, Slot] = {}
    try:
        while waiting or progress.running:
            may_start = progress.failures_in_a_row < MOST_FAILURES_IN_A_ROW
            while waiting and free and may_start:
                _start(waiting.pop(0), free.pop(0), progress, held)
            if not progress.running:
                break
            time.sleep(_POLL_SECONDS)
            for execution in [e for e in progress.running if _has_ended(e, progress)]:
                progress.running.remove(execution)
                free.append(held.pop(execution.name))
            on_change(progress)
    finally:
        for execution in progress.running:
            execution.terminate()
        for execution in progress.running:
            execution.stop()
            progress.states[execution.name] = "waiting"
    return progress


def _state_of(execution: Execution) -> State:
    state = execution.folder.state()
    return state if state in ENDED else "waiting"


def _start(execution: Execution, slot: Slot, progress: Progress, held: dict[str, Slot]) -> None:
    held[execution.name] = slot
    execution.start(slot)
    progress.running.append(execution)
    progress.states[execution.name] = "running"


def _has_ended(execution: Execution, progress: Progress) -> bool:
    state = execution.poll()
    progress.states[execution.name] = state
    if state == "running":
        return False
    progress.failures_in_a_row = progress.failures_in_a_row + 1 if state == "failed" else 0
    return True
