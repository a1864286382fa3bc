"""docs/support-matrix.md is as new as the tests that it is made from."""

from __future__ import annotations

import pytest

from megatron_tst.settings.conflicts import _CONFLICTS
from tests.integration.layouts import LAYOUTS, UNTESTED
from tests.integration.test_layouts import CASES
from tests.integration.test_resharding import CASES as RESUMES
from tests.support_matrix import TARGET

PAGE = TARGET.read_text()


def rows(section: str) -> list[list[str]]:
    """Cells of the table of a section, without its head."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
def test_every_layout_has_its_tests(layout: str) -> None:
    tested = sum(case.layout == layout for case in CASES)
    found = [row for row in rows("Tested against one process") if row[0] == layout]
    assert len(found) == (tested > 0)
    cells = [cell for row in found for cell in row[2:] if cell not in ("untested", "no experts")]
    assert sum(len(cell.split(", ")) for cell in cells) == tested


def test_every_resume_is_listed() -> None:
    assert sorted(rows("Resumed at another layout")) == sorted(
        [model, saved, stop, resumed] for model, saved, stop, resumed in RESUMES
    )


def test_every_refusal_is_listed() -> None:
    assert {row[0].strip("`") for row in rows("Refused")} == {c.flag for c in _CONFLICTS}


def test_every_gap_is_listed() -> None:
    assert all(f"- {gap}" in PAGE for gap in UNTESTED)
