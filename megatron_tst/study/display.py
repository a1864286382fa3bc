"""Shows how a study stands, as a live table or as lines for a log file."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_tst.report.units import duration
from megatron_tst.study.run_folder import State
from megatron_tst.study.runner import Progress

_SECONDS_BETWEEN_LINES = 60.0
_STATES: tuple[State, ...] = ("finished", "diverged", "failed", "running", "waiting")


def summary(progress: Progress) -> str:
    """How many runs are in which state, and the time left."""
    counts = [f"{progress.count(s)} {s}" for s in _STATES if progress.count(s)]
    left = progress.seconds_left
    if progress.running:
        counts.append("time left unknown" if left is None else f"about {duration(left)} left")
    return f"{len(progress.states)} runs: {', '.join(counts)}"


class Display:
    """A live table on a terminal; elsewhere a line for each run that ends, and one a minute.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._ended: set[str] = set()
        self._last_line = time.monotonic()

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, progress: Progress) -> None:
        """Brings the display up to date."""
        for execution in progress.executions:
            name, state = execution.name, progress.states[execution.name]
            ended_now = state in ("finished", "diverged", "failed") and execution.started
            if ended_now and name not in self._ended:
                self._ended.add(name)
                why = "" if state == "finished" else f": {execution.folder.last_words()}"
                loss = _loss(execution.log.validation)
                # Plain, so that paths and numbers are not broken or coloured.
                self._print(f"{state} {name}, validation loss {loss}{why}")
        if self.console.is_terminal:
            self._live.update(_table(progress), refresh=True)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._print(summary(progress))

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(progress: Progress) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("run", "", "step", "loss", "validation"):
        table.add_column(column, justify="left" if column in ("run", "") else "right")
    for execution in progress.running:
        log = execution.log
        table.add_row(
            execution.name,
            ProgressBar(execution.total_steps, log.step, width=24),
            f"{log.step}/{execution.total_steps}",
            _loss(log.loss),
            _loss(log.validation),
        )
    return Group(table, Text(summary(progress), style="bold"))
