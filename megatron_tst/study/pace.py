"""Keeps runs within a time: measures their first steps, and says if there must be fewer.

All runs are shortened alike, so that what they are compared by stays equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean

from megatron_tst.study.execution import Execution

# Shortened runs have a round number of steps: those of two machines can be compared more often.
STEP_UNIT = 1_000
# The first logged interval holds what is done once.
_INTERVALS = 5
# What follows training on the machine of docs/quickstart.md: imports and reports, which take their
# time anywhere, and models that are evaluated, whose speed is that of training.
_SECONDS_AFTER = 20.0
_STEPS_AFTER = 200


@dataclass(frozen=True)
class Pace:
    """How fast runs go on this machine.

    Attributes:
        seconds_a_step: of the slowest run.
        seconds_to_start: from the launch to the first step.
        rounds: how many times the machine must be filled with runs.
        batches: how many batches a run of some steps takes, validation included; one for
            validation, forward only and larger, takes about as long as a step.
    """

    seconds_a_step: float
    seconds_to_start: float
    rounds: int
    batches: Callable[[int], int]

    def seconds_for(self, steps: int) -> float:
        """Time from the launch of all runs to the end of everything."""
        run = self.seconds_to_start + self.batches(steps) * self.seconds_a_step
        return self.rounds * run + _SECONDS_AFTER + _STEPS_AFTER * self.seconds_a_step


@dataclass(frozen=True)
class Plan:
    """How many steps fit.

    Attributes:
        planned_steps: what was wanted.
        steps: what all runs will do.
        expected_minutes: from the start of the command to its end.
        minutes: the budget.
        seconds_a_step: as measured.
    """

    planned_steps: int
    steps: int
    expected_minutes: float
    minutes: float
    seconds_a_step: float

    @property
    def is_shortened(self) -> bool:
        """Whether the machine is slower than planned."""
        return self.steps < self.planned_steps

    def sentences(self) -> str:
        """For people: what to expect, and what it costs in evidence."""
        pace = f"{1e3 * self.seconds_a_step:.0f} ms a step"
        if not self.is_shortened:
            return (
                f"{pace}: expecting to finish {self.expected_minutes:.0f} minutes after the start."
            )
        beyond = "" if self.expected_minutes <= self.minutes else ": fewer would show nothing"
        return (
            f"{pace}: {self.planned_steps:,} steps would not fit into {self.minutes:g} minutes on "
            f"this machine. Both arms do {self.steps:,}, for equal FLOPs as before; expecting to "
            f"finish {self.expected_minutes:.0f} minutes after the start"
            f"{beyond}. {EVIDENCE}"
        )


EVIDENCE = (
    "What that costs: in very short runs TST was behind (600 steps, one seed), as phase 2 is too "
    "short to recover, so that a draw or a loss of TST in a shortened run says little about a "
    "longer one."
)


def measure_pace(
    executions: Sequence[Execution], rounds: int, batches: Callable[[int], int]
) -> Pace | None:
    """The pace of the runs that go; None until each has done enough steps.

    Args:
        executions: runs that were started together.
        rounds: see :class:`Pace`.
        batches: see :class:`Pace`.
    """
    if not executions or not all(len(e.log.step_seconds) > _INTERVALS for e in executions):
        return None
    seconds = [fmean(e.log.step_seconds[1 : _INTERVALS + 1]) for e in executions]
    start = max(e.first_logged - e.started for e in executions)
    return Pace(max(seconds), start, rounds, batches)


def choose_steps(
    planned_steps: int,
    pace: Pace,
    launched: float,
    elapsed: float,
    minutes: float,
    may_shorten: bool,
) -> Plan:
    """The most steps that fit.

    Args:
        planned_steps: of the runs that have just done their first steps.
        pace: of these.
        launched: seconds from the start of the command to their launch.
        elapsed: seconds from the start of the command until now.
        minutes: the budget of the command.
        may_shorten: whether fewer steps than planned may be chosen.
    """

    def plan(steps: int, launch: float) -> Plan:
        expected = (launch + pace.seconds_for(steps)) / 60
        return Plan(planned_steps, steps, expected, minutes, pace.seconds_a_step)

    whole = plan(planned_steps, launched)
    if whole.expected_minutes <= minutes or planned_steps <= STEP_UNIT or not may_shorten:
        return whole
    # Shorter runs start anew, now.
    longest = (ceil(planned_steps / STEP_UNIT) - 1) * STEP_UNIT
    shorter = [plan(steps, elapsed) for steps in range(longest, 0, -STEP_UNIT)]
    return next((one for one in shorter if one.expected_minutes <= minutes), shorter[-1])
