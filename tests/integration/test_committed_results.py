"""The tables and figures in docs/ are those of the committed results, and the text quotes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scipy import stats

from megatron_tst.commands.compare_runs import main
from megatron_tst.common.units import PLUS_MINUS, TIMES
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import read_results
from megatron_tst.report.statistics import Estimate, estimate
from megatron_tst.study.study_file import read_study
from tests import results_page
from tests.figures import assert_same_drawing
from tests.results_page import ROOT, SECTIONS, TABLES, refreshed, state, unmarked, verdict

PAGE = results_page.PAGE.read_text()
STUDIES = sorted({table for table, _ in SECTIONS.values()})
IMAGES = ROOT / "docs/images/results"
FIGURES = sorted(path for study in STUDIES for path in (IMAGES / study).iterdir())


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for study in STUDIES:
        outputs = ["--tables", folder / f"{study}.md", "--figures", folder / study]
        command = [TABLES / f"{study}.csv", "--output", folder / f"{study}.html", *outputs]
        assert main([str(part) for part in command]) == 0
    return folder


@pytest.fixture(scope="module")
def runs() -> dict[str, list[RunResult]]:
    return {study: read_results(TABLES / f"{study}.csv") for study in STUDIES}


@pytest.mark.parametrize("study", STUDIES)
def test_the_tables_are_those_of_the_results(regenerated: Path, study: str) -> None:
    made, committed = regenerated / f"{study}.md", TABLES / f"{study}.md"
    assert made.read_text() == committed.read_text()


def test_make_results_knows_every_table() -> None:
    (listed,) = re.findall(r"^RESULTS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(listed.split()) == STUDIES


def figure_id(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("figure", FIGURES, ids=figure_id)
def test_a_figure_is_that_of_the_results(regenerated: Path, figure: Path) -> None:
    assert_same_drawing(regenerated / figure_id(figure), figure)


def test_the_page_shows_every_figure_and_its_form_for_print() -> None:
    shown = set(re.findall(r"\]\(images/results/([^)]+)\)", PAGE))
    assert shown == {figure_id(figure) for figure in FIGURES}


def test_figures_verdicts_and_captions_of_the_page_follow_from_the_tables() -> None:
    assert refreshed(PAGE) == PAGE
    assert results_page.with_captions(PAGE) == PAGE
    assert unmarked(PAGE) == []
    assert PAGE.count("<!--") > 100


def test_an_unpaired_difference_is_that_of_welch() -> None:
    equal = results_page.unpaired([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    exact = stats.ttest_ind([1.0, 2.0, 3.0], [0.5, 1.5, 2.5], equal_var=False).confidence_interval()
    assert (equal.mean, equal.low, equal.high) == pytest.approx((0.5, exact.low, exact.high))
    # 4.75 degrees of freedom, of which 4 count.
    values = [0.040, 0.047, 0.026], [0.012, 0.004, 0.020, -0.006, 0.023]
    found = results_page.unpaired(*values)
    welch = stats.ttest_ind(*values, equal_var=False).confidence_interval()
    assert found.half_width is not None
    assert 1 < 2 * found.half_width / (welch.high - welch.low) < 1.1
    assert found.mean == pytest.approx((welch.low + welch.high) / 2)


def test_the_first_step_under_a_loss_is_told_of_every_seed() -> None:
    assert results_page.told("under 4.0 subwords: baseline") == "10000, 10000 and never"
    found = "8008, 8008 and 10000<!--under 4.4 subwords: baseline-->"
    assert found in PAGE
    assert refreshed(found.replace("10000", "never")) == found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"+0.021 {PLUS_MINUS} 0.019<!--gap 127k: s=2 r=0.3-->", f"+0.022 {PLUS_MINUS} 0.019"),
        ("ahead<!--is gap 127k: s=2 r=0.3-->", "behind"),
        ("contradicted<!--verdict behind: gap 127k: s=3 r=0.3 hinge-->", "reproduced"),
        (f"80%<!--share 127k: s=2 r=0.3 on baseline 2{TIMES} steps-->", "85%"),
        (f"1.20{TIMES} (1.06 to 1.35)<!--speed 127k: s=2 r=0.3-->", f"1.30{TIMES} (1.06 to 1.35)"),
    ],
)
def test_a_changed_figure_or_verdict_is_seen(old: str, new: str) -> None:
    assert old in PAGE
    changed = PAGE.replace(old, new + old[old.index("<!--") :], 1)
    assert refreshed(changed) != changed
    # Nor can one be put beside them without saying where it is from.
    assert unmarked(PAGE.replace(old, f"**{new}**", 1))


def test_words_that_the_tables_contradict_are_marked() -> None:
    said = f"r = 0.3<!--must most: 127k: s=2 r=0.3 on baseline 2{TIMES} steps-->"
    assert refreshed(said) == said
    false = ("must ahead: gap 127k: s=6 r=0.3", "must wider: 127k: baseline vs s=4 r=0.3")
    assert [refreshed(f"so <!--{what}-->") for what in false] == [
        f"so not so<!--{what}-->" for what in false
    ]


def test_what_comes_back_under_the_baseline_decides_by_its_seeds() -> None:
    said = "1<!--{}--> **undecided<!--verdict ahead: {}-->**"
    for what, shown in (
        # Evaluated twice, which does not say when.
        ("back 127k: s=2 r=0.3", ("601 to 2100", "not tested")),
        ("back long 443k: s=2 r=0.3", ("4514", "reproduced")),
        ("back long: s=2 r=0.3", ("3879 in 3 of 5", "undecided")),
    ):
        steps, word = shown
        assert refreshed(said.format(what, what)) == (
            f"{steps}<!--{what}--> **{word}<!--verdict ahead: {what}-->**"
        )


ZERO_HELD, AHEAD, BEHIND = estimate([-1, 2, 3]), estimate([2, 3, 4]), estimate([-2, -3, -4])


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (None, "not run"),
        (estimate([5.0]), "too few seeds"),
        # Its interval leaves out zero, and two seeds decide nothing.
        (estimate([5.0, 5.01]), "too few seeds"),
        (ZERO_HELD, "undecided"),
        (AHEAD, "ahead"),
        (BEHIND, "behind"),
    ],
)
def test_the_rule_of_states(gap: Estimate | None, expected: str) -> None:
    assert state(gap) == expected


@pytest.mark.parametrize(
    ("claim", "states", "expected"),
    [
        ("ahead", [], "not tested"),
        ("ahead", ["too few seeds", "not run"], "not tested"),
        ("ahead", ["ahead", "ahead", "not run"], "reproduced"),
        ("ahead", ["ahead", "undecided"], "reproduced in part"),
        ("ahead", ["ahead", "behind"], "mixed"),
        ("ahead", ["undecided", "behind"], "contradicted"),
        ("behind", ["undecided", "behind"], "reproduced in part"),
        ("behind", ["undecided", "too few seeds"], "undecided"),
        ("equal", ["undecided"], "undecided"),
        ("equal", ["undecided", "behind"], "contradicted"),
    ],
)
def test_the_rule_of_verdicts(claim: str, states: list[str], expected: str) -> None:
    assert verdict(claim, states) == expected


@pytest.mark.parametrize("study", STUDIES)
def test_the_runs_are_those_of_the_study_file(runs: dict[str, list[RunResult]], study: str) -> None:
    laid_out = {run.name for run in read_study(ROOT / f"examples/studies/{study}.yaml").runs()}
    # Of the one that goes on, those that have ended.
    names = {run.name for run in runs[study]}
    assert names <= laid_out if study == "subwords" else names == laid_out
    assert {run.status for run in runs[study]} <= {"finished", "diverged"}


@pytest.mark.parametrize("study", STUDIES)
def test_the_runs_saw_one_text(runs: dict[str, list[RunResult]], study: str) -> None:
    assert len({tuple(sorted(run.data.items())) for run in runs[study]}) == 1
