"""Shows how a study stands, as a live table or as lines for a log file."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_tst.common.progress import PeriodicLines, rough_duration
from megatron_tst.study.execution import Execution
from megatron_tst.study.run_folder import State
from megatron_tst.study.runner import Progress

_STATES: tuple[State, ...] = ("finished", "diverged", "failed", "running", "waiting")


def summary(progress: Progress) -> str:
    """How many runs are in which state, and the time left."""
    counts = [f"{progress.count(s)} {s}" for s in _STATES if progress.count(s)]
    left = progress.seconds_left
    if progress.running:
        counts.append("time left unknown" if left is None else f"about {rough_duration(left)} left")
    return f"{len(progress.states)} runs: {', '.join(counts) or 'none left'}"


def running_lines(progress: Progress) -> list[str]:
    """How each run that goes stands: step, losses, time left."""
    return [_running_line(progress, execution) for execution in list(progress.running)]


def _running_line(progress: Progress, execution: Execution) -> str:
    log = execution.log
    parts = [f"step {log.step:,} of {execution.total_steps:,}", f"loss {_loss(log.loss)}"]
    if log.validation is not None:
        parts.append(f"validation loss {_loss(log.validation)}")
    left = progress.seconds_left_of(execution)
    if left is not None:
        parts.append(f"about {rough_duration(left)} left")
    return f"{execution.name}: {', '.join(parts)}"


class Display:
    """A live table on a terminal; elsewhere a line for each run that ends, and all by the minute.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._ended: set[str] = set()
        self._progress: Progress | None = None
        self._lines = PeriodicLines(console, self._how_it_stands)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        else:
            self._lines.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()
        else:
            self._lines.__exit__(kind, error, trace)

    def show(self, progress: Progress) -> None:
        """Brings the display up to date."""
        self._progress = progress
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

    def _how_it_stands(self) -> list[str]:
        if self._progress is None:
            return []
        return [summary(self._progress), *running_lines(self._progress)]

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
