"""How far a command is: bars on a terminal, a line a minute in a file or a CI log.

Every tool shows its progress by these two classes. ``MEGATRON_TST_PROGRESS_SECONDS`` changes the
time between lines.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_tst.common.errors import UsageError

if TYPE_CHECKING:
    # Training imports this module, and does not draw: it runs without rich.
    from rich.console import Console
    from rich.progress import Progress, TaskID

INTERVAL_VARIABLE = "MEGATRON_TST_PROGRESS_SECONDS"
_SECONDS_BETWEEN_LINES = 60.0
# Early enough to see that something happens; what takes less prints no line.
_SECONDS_TO_FIRST_LINE = 10.0

CountCallback = Callable[[int, int], None]
"""Is told how many are done, and of how many."""


def no_progress(done: int, total: int) -> None:
    """Says nothing."""


def seconds_between_lines() -> float:
    """Time from line to line.

    Raises:
        UsageError: the variable is no number above 0.
    """
    text = os.environ.get(INTERVAL_VARIABLE)
    if text is None:
        return _SECONDS_BETWEEN_LINES
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{INTERVAL_VARIABLE} is {text!r}: use a number of seconds above 0.")
    return seconds


def rough_duration(seconds: float) -> str:
    """A time that is an estimate: ``40 s``, ``9 min``, ``2 h 5 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class PeriodicLines(AbstractContextManager["PeriodicLines"]):
    """Prints lines after ten seconds and then once a minute, also while a long call goes on.

    Args:
        console: where to.
        lines: what there is to say, called in a thread of its own.
    """

    def __init__(self, console: Console, lines: Callable[[], list[str]]) -> None:
        self._console = console
        self._lines = lines
        self._seconds = seconds_between_lines()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print_until_the_end, daemon=True)

    def __enter__(self) -> PeriodicLines:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        # A signal may have come while it was started.
        if self._thread.is_alive():
            self._thread.join()

    def _print_until_the_end(self) -> None:
        wait = min(self._seconds, _SECONDS_TO_FIRST_LINE)
        while not self._ended.wait(wait):
            for line in self._lines():
                _print_plainly(self._console, line)
            wait = self._seconds


def _print_plainly(console: Console, text: str) -> None:
    # So that paths and numbers are neither broken nor coloured.
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Task:
    """What one bar or line is about."""

    done: float = 0
    total: float | None = None
    amount: str = ""
    status: str = ""
    began: float = field(default_factory=time.monotonic)
    # Where speed is measured from: a run may start slowly, or go on from a checkpoint.
    first_done: float = 0
    first_at: float | None = None

    def line(self, name: str) -> str:
        share = "" if not self.total else f" ({self.done / self.total:.0%})"
        parts = [f"{self.amount}{share}" if self.amount else "", self.status]
        left = self._seconds_left()
        if left is None:
            parts.append(f"{rough_duration(time.monotonic() - self.began)} so far")
        else:
            parts.append(f"about {rough_duration(left)} left")
        return f"{name}: {', '.join(part for part in parts if part)}"

    def _seconds_left(self) -> float | None:
        """At the speed so far; None before there is one."""
        new = self.done - self.first_done
        if self.total is None or self.first_at is None or new <= 0:
            return None
        return (time.monotonic() - self.first_at) / new * (self.total - self.done)


class TaskProgress(AbstractContextManager["TaskProgress"]):
    """One or more tasks: a bar each on a terminal, elsewhere a line each by the minute.

    Nothing is printed before the first :meth:`update`, so that a refusal is its one line.

    Args:
        console: where to; standard error where results go to standard output.
        with_bars: draw bars also where there is no terminal.
    """

    def __init__(self, console: Console, with_bars: bool = False) -> None:
        self._tasks: dict[str, _Task] = {}
        self._bars: Progress | None = None
        self._bar_ids: dict[str, TaskID] = {}
        if console.is_terminal or with_bars:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[amount]}"),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=console)
        self._console = console
        self._lines = PeriodicLines(console, self._unfinished)
        self._is_shown = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_shown:
            return
        if self._bars is not None:
            self._bars.stop()
        else:
            self._lines.__exit__(kind, error, trace)

    def update(
        self,
        name: str,
        done: float,
        total: float | None,
        amount: str | None = None,
        status: str = "",
    ) -> None:
        """Says how far a task is.

        Args:
            name: of the task; a new name is a new task.
            done: of ``total``.
            total: None where it is not known.
            amount: ``done`` of ``total`` for people; by default these numbers.
            status: what else there is to say.
        """
        if amount is None:
            amount = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        task = self._tasks.setdefault(name, _Task())
        task.done, task.total, task.amount, task.status = done, total, amount, status
        if task.first_at is None and done:
            task.first_at, task.first_done = time.monotonic(), done
        self._show(name, task)

    def say(self, text: str) -> None:
        """Prints a line of its own, above the bars."""
        _print_plainly(self._console, text)

    def counting(self, name: str, unit: str) -> CountCallback:
        """A callback that tells a task how many of a unit are done."""

        def update(done: int, total: int) -> None:
            self.update(name, done, total, f"{done:,} of {total:,} {unit}")

        return update

    def _show(self, name: str, task: _Task) -> None:
        if not self._is_shown:
            self._is_shown = True
            if self._bars is not None:
                self._bars.start()
            else:
                self._lines.__enter__()
        if self._bars is None:
            return
        fields: dict[str, Any] = {"amount": task.amount, "status": task.status}
        if name not in self._bar_ids:
            self._bar_ids[name] = self._bars.add_task(name, total=task.total, **fields)
        self._bars.update(self._bar_ids[name], completed=task.done, total=task.total, **fields)

    def _unfinished(self) -> list[str]:
        return [
            task.line(name)
            for name, task in list(self._tasks.items())
            if task.total is None or task.done < task.total
        ]
