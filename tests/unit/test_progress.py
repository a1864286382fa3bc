"""Progress without a terminal: lines by the clock; with one: bars."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from megatron_tst.common import progress
from megatron_tst.common.progress import (
    INTERVAL_VARIABLE,
    PeriodicLines,
    TaskProgress,
    rough_duration,
    seconds_between_lines,
)


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setenv(INTERVAL_VARIABLE, "0.02")
    return io.StringIO()


def wait_for_lines(output: io.StringIO, count: int) -> list[str]:
    end = time.monotonic() + 60
    while len(lines := output.getvalue().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.01)
    return lines


def test_a_line_says_what_how_far_and_how_long(
    output: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    task = progress._Task(began=clock)
    clock = 130.0
    assert task.line("arm") == "arm: 30 s so far"
    with TaskProgress(Console(file=output)) as display:
        display.update("tst", 60, 12_000, "step 60 of 12,000", "loss 3.1")
        clock = 160.0
        display.update("tst", 660, 12_000, "step 660 of 12,000", "loss 2.0")
        # 600 steps in 30 s.
        (line,) = display._unfinished()
    assert line == "tst: step 660 of 12,000 (6%), loss 2.0, about 9 min left"


def test_lines_come_by_the_clock_and_no_more_after_the_end(output: io.StringIO) -> None:
    console = Console(file=output, width=20)
    with TaskProgress(console) as display:
        time.sleep(0.1)
        # Nothing to say yet.
        assert output.getvalue() == ""
        display.update("reading", 0, 10, "a long amount which is not broken")
        lines = wait_for_lines(output, 3)
        display.update("reading", 10, 10)
        display.counting("writing", "parts")(1, 4)
        wait_for_lines(output, len(output.getvalue().splitlines()) + 2)
    assert lines[0].startswith("reading: a long amount which is not broken (0%), 0 s so far")
    last = output.getvalue().splitlines()[-1]
    assert last.startswith("writing: 1 of 4 parts (25%)")
    said = output.getvalue()
    time.sleep(0.1)
    assert output.getvalue() == said


def test_what_is_done_at_once_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(INTERVAL_VARIABLE, raising=False)
    output = io.StringIO()
    with TaskProgress(Console(file=output)) as display:
        display.update("reading", 10, 10)
    assert output.getvalue() == ""


def test_the_first_line_is_early(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Ended:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            return len(waits) > 3

    monkeypatch.delenv(INTERVAL_VARIABLE, raising=False)
    output = io.StringIO()
    lines = PeriodicLines(Console(file=output), lambda: ["a line"])
    monkeypatch.setattr(lines, "_ended", Ended())
    lines._print_until_the_end()
    assert waits == [10.0, 60.0, 60.0, 60.0]
    assert output.getvalue() == "a line\n" * 3


@pytest.mark.parametrize(("is_terminal", "with_bars"), [(True, False), (False, True)])
def test_bars_on_a_terminal_or_on_request(
    output: io.StringIO, is_terminal: bool, with_bars: bool
) -> None:
    console = Console(file=output, width=100, force_terminal=is_terminal)
    with TaskProgress(console, with_bars) as display:
        display.update("reading", 1, 4, status="first")
        display.update("reading", 4, 4, status="last")
        time.sleep(0.1)
    assert "reading" in output.getvalue()
    assert "━" in output.getvalue()
    assert "so far" not in output.getvalue()


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan"])
def test_a_bad_interval_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(INTERVAL_VARIABLE, value)
    with pytest.raises(ValueError, match=f"{INTERVAL_VARIABLE} is '{value}': use a number"):
        seconds_between_lines()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3_540, "59 min"), (7_500, "2 h 5 min")],
)
def test_rough_durations(seconds: float, text: str) -> None:
    assert rough_duration(seconds) == text
