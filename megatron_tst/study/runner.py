"""Runs executions side by side on one machine, each in a slot of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
        started: when the runner was started, seconds of the monotonic clock.
        steps_done: optimizer steps that this runner has done in runs that have ended.
    """

    executions: Sequence[Execution]
    states: dict[str, State]
    running: list[Execution] = field(default_factory=list)
    failures_in_a_row: int = 0
    started: float = field(default_factory=time.monotonic)
    steps_done: int = 0

    def count(self, state: State) -> int:
        """Runs in a state."""
        return sum(found == state for found in self.states.values())

    @property
    def steps_left(self) -> int:
        """Optimizer steps of the runs that wait or run."""
        left = sum(e.total_steps for e in self.executions if self.states[e.name] == "waiting")
        return left + sum(e.total_steps - e.log.step for e in self.running)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the speed of this runner so far; None before the first steps."""
        done = self.steps_done + sum(e.log.step - e.first_step for e in self.running)
        if done < 1:
            return None
        return (time.monotonic() - self.started) / done * self.steps_left


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
    progress = Progress(executions, {e.name: _state_of(e) for e in executions})
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
    progress.steps_done += execution.log.step - execution.first_step
    progress.failures_in_a_row = progress.failures_in_a_row + 1 if state == "failed" else 0
    return True
