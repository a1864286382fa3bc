"""docs/results/origins.md: its tables and figures are those of the committed measurements, its
numbers stand in the tables, and what it concludes follows from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_tst.commands.explain_gain import main
from megatron_tst.report.origin_tables import moment_ratio, paired, position_losses
from megatron_tst.report.origins import GRADIENT, MOMENT, Arm, arms_of, read_traces
from megatron_tst.report.statistics import estimate
from tests.figures import assert_same_drawing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results/origins.csv"
TABLES = ROOT / "docs/results/origins-tables.md"
PAGE = (ROOT / "docs/results/origins.md").read_text()
FIGURES = sorted((ROOT / "docs/images/results/origins").iterdir())
BASELINE, BAGS, *OTHERS = arms_of(read_traces(RESULTS))
SWITCH = 3810


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origins")
    assert main([str(RESULTS), "--tables", str(folder / "t.md"), "--figures", str(folder)]) == 0
    return folder


def test_the_tables_are_those_of_the_results(regenerated: Path) -> None:
    assert (regenerated / "t.md").read_text() == TABLES.read_text()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.name)
def test_a_figure_is_that_of_the_results(regenerated: Path, figure: Path) -> None:
    assert_same_drawing(regenerated / figure.name, figure)


def test_the_page_shows_every_figure_and_its_form_for_print() -> None:
    shown = set(re.findall(r"\]\(\.\./images/results/origins/([^)]+)\)", PAGE))
    assert {figure.name for figure in FIGURES} == shown


def test_the_numbers_of_the_page_are_in_the_tables() -> None:
    text = re.sub(
        r"```.*?```|^\| (?:model|training|machine|text) .*?$", "", PAGE, flags=re.S | re.M
    )
    quoted = re.findall(
        "[+\N{MINUS SIGN}]?[0-9]+[.][0-9]+(?: \N{PLUS-MINUS SIGN} [0-9.]+[0-9])?", text
    )
    # And the start of a warm-up, which follows from the learning rate.
    tables = f"{TABLES.read_text()} {0.002 * SWITCH / 200:g}"
    assert len(quoted) > 20
    assert [number for number in quoted if number not in tables] == []


def test_the_seeds_are_those_of_the_page() -> None:
    assert {tuple(sorted(arm.runs)) for arm in (BASELINE, BAGS, *OTHERS)} == {(1, 2, 3)}
    texts = {run.text for arm in (BASELINE, BAGS, *OTHERS) for run in arm.runs.values()}
    assert len(texts) == 1
    assert None not in texts


def gaps(mask: Callable[[np.ndarray], np.ndarray]) -> dict[int, float]:
    """Of s = 2 by seed, over the predictions that see so many tokens."""
    found = {}
    for seed, run in BAGS.runs.items():
        theirs, ours = position_losses(BASELINE.runs[seed]), position_losses(run)
        assert ours is not None
        assert theirs is not None
        counted = ours[1] * mask(np.arange(1, len(ours[0]) + 1))
        found[seed] = float(np.average(theirs[0] - ours[0], weights=counted))
    return found


def test_the_gain_is_undecided_and_later_predictions_gain_more() -> None:
    gain = paired(BAGS, BASELINE, lambda run: run.final_loss)
    assert gain is not None
    assert gain.mean > 0
    assert not gain.excludes(0.0)
    early, late = gaps(lambda seen: seen <= 4), gaps(lambda seen: seen > 8)
    assert all(late[seed] > early[seed] for seed in late)


def test_no_place_in_the_bag_is_behind_the_other() -> None:
    first, second = gaps(lambda seen: seen % 2 == 0), gaps(lambda seen: seen % 2 == 1)
    assert not estimate([first[seed] - second[seed] for seed in first]).excludes(0.0)


def test_no_other_way_over_the_switch_is_decided() -> None:
    for arm in OTHERS:
        found = paired(arm, BAGS, lambda run: run.final_loss)
        assert found is not None
        assert not found.excludes(0.0)


def test_gradients_are_larger_than_the_baselines_for_a_few_steps_only() -> None:
    def norm(arm: Arm, seed: int, low: int, high: int) -> float:
        series = arm.runs[seed].series(GRADIENT)
        return float(np.mean([series[SWITCH + step] for step in range(low, high + 1)]))

    for arm in (BASELINE, BAGS):
        for run in arm.runs.values():
            norms = [value for step, value in run.series(GRADIENT).items() if step > SWITCH]
            assert np.mean(np.array(norms) > 1.0) > 0.85
    for seed in BAGS.runs:
        assert norm(BAGS, seed, 1, 5) > norm(BASELINE, seed, 1, 5)
        for low, high in ((6, 20), (21, 50), (51, 100)):
            assert norm(BAGS, seed, low, high) < norm(BASELINE, seed, low, high)


def test_second_moments_are_near_what_they_become() -> None:
    names = BAGS.runs[1].places(MOMENT, SWITCH)
    at_switch = [moment_ratio(BAGS, name, SWITCH, SWITCH + 1000) for name in names]
    assert min(at_switch) > 0.4
    assert max(at_switch) < 1.25
    later = [
        moment_ratio(BAGS, name, SWITCH + step, SWITCH + 1000)
        for name in names
        for step in (20, 50)
    ]
    assert min(later) > 0.5
    assert max(later) < 2.0
