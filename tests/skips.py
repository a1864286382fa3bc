"""Hooks of pytest: a test is skipped for a reason that pyproject.toml allows, or it fails.

The end of a run counts the skipped tests by reason.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

_EVERYWHERE, _OUTSIDE_CI = "allowed_skips", "allowed_skips_outside_ci"


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in (_EVERYWHERE, _OUTSIDE_CI):
        parser.addini(name, "reasons for a skip, as regular expressions", "linelist", [])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    _fail_unless_allowed(outcome.get_result(), item.config)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, None]:
    outcome = yield
    _fail_unless_allowed(outcome.get_result(), collector.config)


def _fail_unless_allowed(
    report: pytest.TestReport | pytest.CollectReport, config: pytest.Config
) -> None:
    # What is expected to fail is reported as skipped too.
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = _reason(report)
    if any(re.match(pattern, reason) for pattern in _allowed(config)):
        return
    report.outcome = "failed"
    report.longrepr = (
        f"skipped, because: {reason}\nThis is none of {_EVERYWHERE} in pyproject.toml"
        f"{', which in continuous integration are all that is allowed' if _is_in_ci() else ''}."
    )


def _allowed(config: pytest.Config) -> list[str]:
    lists = [_EVERYWHERE] if _is_in_ci() else [_EVERYWHERE, _OUTSIDE_CI]
    return [pattern for name in lists for pattern in config.getini(name)]


def _is_in_ci() -> bool:
    return os.environ.get("CI", "") not in ("", "0", "false")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    assert isinstance(report.longrepr, tuple)
    return str(report.longrepr[2]).removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = Counter(map(_reason, terminalreporter.stats.get("skipped", [])))
    if counts:
        terminalreporter.section("skipped tests by reason")
    for reason, count in counts.most_common():
        terminalreporter.write_line(f"{count:7d}  {reason}")
