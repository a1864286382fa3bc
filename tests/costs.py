"""Hooks of pytest: what each test computed, the longest files first, and a budget for each file."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.durations import CPU_SECONDS, budgets

# Shorter tests count with the next one: looking at all processes takes 6 ms.
_LOOK_AFTER_SECONDS = 0.05
_TICKS = os.sysconf("SC_CLK_TCK")

_seconds_not_looked_at = 0.0
_cpu_seconds = 0.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the files, new ones first: the last ones that workers get should be short."""
    order = {file: place for place, file in enumerate(budgets(), start=1)}
    items.sort(key=lambda item: order.get(_file(item.nodeid), 0))


def pytest_collection_finish() -> None:
    global _cpu_seconds
    _cpu_seconds = _cpu_seconds_of_tree(os.getpid())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    global _cpu_seconds, _seconds_not_looked_at
    outcome = yield
    _seconds_not_looked_at += call.duration
    if call.when == "teardown" and _seconds_not_looked_at > _LOOK_AFTER_SECONDS:
        before, _cpu_seconds = _cpu_seconds, _cpu_seconds_of_tree(os.getpid())
        # What a process has left to another parent is lost.
        spent = max(0.0, _cpu_seconds - before)
        outcome.get_result().user_properties.append((CPU_SECONDS, f"{spent:.2f}"))
        _seconds_not_looked_at = 0.0


def pytest_terminal_summary(terminalreporter: Any) -> None:
    spent: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                spent[_file(report.nodeid)] += report.duration
    if not spent:
        return
    allowed = budgets()
    terminalreporter.section("seconds of each file, and its budget")
    for file, seconds in sorted(spent.items(), key=lambda entry: -entry[1]):
        budget = allowed.get(file)
        note = "no budget: make durations" if budget is None else f"{budget:4d}"
        over = budget is not None and seconds > budget
        if over or budget is None or seconds >= 1:
            terminalreporter.write_line(f"{seconds:7.1f}  {note}{'  OVER' if over else ''}  {file}")
    terminalreporter.write_line(f"{sum(spent.values()):7.1f}  all, of one worker after the other")


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _cpu_seconds_of_tree(root: int) -> float:
    """Of a process, its descendants, and those that they have waited for."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for process in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        try:
            # The name of a program may contain anything, parentheses too.
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(process)
        ticks[process] = sum(map(int, fields[11:15]))
    total, left = 0, [root]
    while left:
        process = left.pop()
        total += ticks.get(process, 0)
        left += children.get(process, [])
    return total / _TICKS
