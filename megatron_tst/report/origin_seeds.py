"""Gaps and means over the seeds of arms, as cells of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_tst.common.text_table import Table
from megatron_tst.common.units import DASH
from megatron_tst.report.origins import Arm, Trace
from megatron_tst.report.recovery import Recovery
from megatron_tst.report.statistics import Estimate, estimate
from megatron_tst.report.units import gap_text, loss_text, seeds


class Section(NamedTuple):
    """A table with what it says.

    Attributes:
        title: heading.
        note: what the numbers are.
        table: of them.
    """

    title: str
    note: str
    table: Table


def paired(one: Arm, other: Arm, value: Callable[[Trace], float | None]) -> Estimate | None:
    """Mean over seeds of ``other``'s value minus that of ``one``; None without a pair."""
    pairs = [
        (value(other.runs[seed]), value(run))
        for seed, run in one.runs.items()
        if seed in other.runs
    ]
    found = [theirs - ours for theirs, ours in pairs if theirs is not None and ours is not None]
    return estimate(found) if found else None


def mean(arm: Arm, value: Callable[[Trace], float | None]) -> Estimate | None:
    """Mean over the seeds that have a value."""
    found = [v for v in map(value, arm.runs.values()) if v is not None]
    return estimate(found) if found else None


def last_switch(arms: Sequence[Arm]) -> int | None:
    """The step after which the first arm with bags has none."""
    return next((trace.switch_step for trace in first_runs(arms) if trace.switch_step), None)


def first_runs(arms: Sequence[Arm]) -> list[Trace]:
    """A run of each arm, for what all of an arm have in common."""
    return [next(iter(arm.runs.values())) for arm in arms]


def most_seeds(arms: Sequence[Arm]) -> int:
    """Seeds of the arm that has the most."""
    return max(len(arm.runs) for arm in arms)


def gap_cell(found: Estimate | None, of: int, digits: int = 3) -> str:
    """A gap with half its interval, and its seeds where they are fewer than ``of``."""
    return DASH if found is None else gap_text(found, digits) + _some(found.n, of)


def loss_cell(found: Estimate | None, of: int, digits: int = 4) -> str:
    """A mean without an interval, and its seeds where they are fewer than ``of``."""
    if found is None:
        return DASH
    return loss_text(Estimate(found.mean, None, None, None, 1), digits) + _some(found.n, of)


def recovery_cell(found: Recovery | None, of: int) -> str:
    """Steps until the crossing, of how many seeds, and these where they are fewer than ``of``."""
    if found is None:
        return DASH
    steps = found.text if found.recovered else f"not in {seeds(found.seeds)}"
    return steps + _some(found.seeds, of)


def _some(n: int, of: int) -> str:
    """Says where a seed lacks a run or a value."""
    return f" (n = {n} of {of})" if n < of else ""
