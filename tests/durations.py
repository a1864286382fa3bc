"""Writes tests/durations.md, what each file of tests costs, from the results of a run.

    python -m pytest --junitxml=results.xml
    python -m tests.durations results.xml

``make durations`` does both. The order in which files are run, and the budgets that every run of
the tests is compared with, come from this table.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tst.common.atomic_files import write_file

TARGET = Path(__file__).with_name("durations.md")
CPU_SECONDS = "CPU seconds"
"""A property of test cases: the time that their processes computed, however busy the machine."""
_NAMED_SECONDS = 4.0

_INTRODUCTION = """\
# What the tests cost

Made by `make durations`; do not edit. {origin}

Seconds are those of the clock, fixtures included, on a machine that other work may have shared. CPU
seconds are what the tests and all processes that they start have computed. A file's budget is twice
its seconds here, and at least 10; `make test` ends with the files that took longer, and fails for
none: machines differ. Files run in the order of this table.
"""


@dataclass
class Cost:
    """What a test or a file of tests has taken."""

    tests: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def add(self, other: Cost) -> None:
        self.tests += other.tests
        self.seconds += other.seconds
        self.cpu_seconds += other.cpu_seconds

    @property
    def budget(self) -> int:
        """Seconds in which a file should be through."""
        return max(10, 5 * math.ceil(self.seconds * 2 / 5))


def main() -> None:
    """Prints and writes the table from the JUnit file named on the command line."""
    cases = list(_read(Path(sys.argv[1])))
    if not cases:
        raise SystemExit("no test results: pass the --junitxml file of a run")
    page = "\n".join(_page(cases)) + "\n"
    write_file(TARGET, page)
    print(page, end="")


def budgets() -> dict[str, int]:
    """Seconds of each file in the committed table, the longest file first."""
    rows = [line.strip("| ").split(" | ") for line in TARGET.read_text().splitlines()]
    return {row[0]: int(row[-1]) for row in rows if row[0].endswith(".py") and len(row) == 5}


def _read(path: Path) -> Iterator[tuple[str, str, Cost]]:
    """File, name and cost of each test that was run."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if case.find("skipped") is None:
            found = {p.get("name"): p.get("value", "0") for p in case.iter("property")}
            cost = Cost(1, float(case.get("time", 0)), float(found.get(CPU_SECONDS, 0)))
            yield f"{case.get('classname', '').replace('.', '/')}.py", case.get("name", ""), cost


def _page(cases: list[tuple[str, str, Cost]]) -> Iterator[str]:
    files: dict[str, Cost] = {}
    total = Cost()
    for file, _, cost in cases:
        files.setdefault(file, Cost()).add(cost)
        total.add(cost)
    yield _INTRODUCTION.format(origin=_origin())
    yield from _head("file", "tests", "seconds", CPU_SECONDS, "budget")
    for file, cost in sorted(files.items(), key=lambda entry: -entry[1].seconds):
        yield _row(file, cost.tests, *_times(cost), cost.budget)
    yield _row("all", total.tests, *_times(total), "")
    yield f"\n## Tests of {_NAMED_SECONDS:g} seconds and more\n"
    yield from _head("test", "seconds", CPU_SECONDS)
    for file, name, cost in sorted(cases, key=lambda case: -case[2].seconds):
        if cost.seconds >= _NAMED_SECONDS:
            test = f"{Path(file).name}::{name}".replace("|", "\\|")
            yield _row(test, *_times(cost))


def _origin() -> str:
    return f"Python {platform.python_version()}, {os.cpu_count()} cores, {processor()}."


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _times(cost: Cost) -> tuple[str, str]:
    return f"{cost.seconds:.1f}", f"{cost.cpu_seconds:.1f}"


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield _row(*["---"] * len(cells))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
