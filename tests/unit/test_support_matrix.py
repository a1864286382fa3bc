"""docs/support-matrix.md is as new as the tests that it is made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_tst.settings.conflicts import _CONFLICTS
from tests import support_matrix
from tests.integration.layouts import LAYOUTS, UNTESTED
from tests.integration.test_layouts import CASES
from tests.integration.test_resharding import CASES as RESUMES
from tests.support_matrix import SOURCES, TARGET

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
    no_test = ("untested", "no experts", "refused")
    cells = [cell for row in found for cell in row[2:] if cell not in no_test]
    assert sum(len(cell.split(", ")) for cell in cells) == tested


def test_every_resume_is_listed() -> None:
    assert sorted(rows("Resumed at another layout")) == sorted(
        [model, saved, stop, resumed] for model, saved, stop, resumed in RESUMES
    )


def test_every_refusal_is_listed() -> None:
    assert {row[0].strip("`") for row in rows("Refused")} == {c.flag for c in _CONFLICTS}


def test_every_gap_is_listed() -> None:
    assert all(f"- {gap}" in PAGE for gap in UNTESTED)


def test_a_page_older_than_its_sources_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in SOURCES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(support_matrix.ROOT / file, tmp_path / file)
    monkeypatch.setattr(support_matrix, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["support_matrix", "--check"])
    refusals = tmp_path / "tests/integration/test_bad_input.py"
    refusals.write_text(refusals.read_text() + "\n\ndef test_other() -> None: ...\n")
    support_matrix.main()
    for file in SOURCES:
        text = (tmp_path / file).read_text()
        for old, new in (("--sft", "--fim"), ("TP 2", "TP 3"), ("1e-6", "1e-5"), ("## ", "### ")):
            text = text.replace(old, new)
        (tmp_path / file).write_text(text)
        with pytest.raises(SystemExit, match="older than what it speaks of"):
            support_matrix.main()
        shutil.copy(Path(__file__).parents[2] / file, tmp_path / file)
