"""docs/results/origins.md: its tables and figures are those of the committed measurements, its
numbers those of their rows and columns, and what it concludes follows from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_tst.commands.explain_gain import main
from megatron_tst.common.units import MINUS, PLUS_MINUS
from megatron_tst.report.origin_positions import position_losses
from megatron_tst.report.origin_seeds import paired
from megatron_tst.report.origin_switch import moment_ratio
from megatron_tst.report.origins import GRADIENT, MOMENT, Arm, arms_of, read_traces
from megatron_tst.report.statistics import estimate
from tests.figures import assert_same_drawing
from tests.origins_page import PAGE as ORIGINS_PAGE
from tests.origins_page import (
    TABLES,
    _holds_zero,
    leaving_out_zero,
    refreshed,
    tables,
    told,
    unmarked,
)

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results/origins.csv"
PAGE = ORIGINS_PAGE.read_text()
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


def test_the_tables_of_the_largest_model_are_those_of_its_runs(tmp_path: Path) -> None:
    committed = ROOT / "docs/results/subwords-origins.csv"
    assert main([str(committed), "--tables", str(tmp_path / "t.md")]) == 0
    assert (tmp_path / "t.md").read_text() == committed.with_suffix(".md").read_text()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.name)
def test_a_figure_is_that_of_the_results(regenerated: Path, figure: Path) -> None:
    assert_same_drawing(regenerated / figure.name, figure)


def test_the_page_shows_every_figure_and_its_form_for_print() -> None:
    shown = set(re.findall(r"\]\(\.\./images/results/origins/([^)]+)\)", PAGE))
    assert {figure.name for figure in FIGURES} == shown


def test_the_numbers_of_the_page_are_those_of_their_rows_and_columns() -> None:
    assert refreshed(PAGE) == PAGE
    assert unmarked(PAGE) == []
    assert PAGE.count("<!--") >= 60
    # These are in no table.
    assert f"`-{0.002 * SWITCH / 200:g}`" in PAGE
    assert f"of the {BAGS.runs[1].total_steps - SWITCH} steps that are left" in PAGE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Rows, columns and whole tables in each other's place.
        ("By position; 65 to 128; s = 2 ahead by", "By position; 3 to 4; s = 2 ahead by"),
        ("By position; 3 to 4; warm-up ahead by", "By position; 3 to 4; beta2 0.9 ahead by"),
        ("After the switch; 0; loss of s = 2", "After the switch; 0; loss of baseline"),
        ("By offset; 1 of 2; s = 2 ahead by", "After the switch; 1000; s = 2 ahead by"),
    ],
)
def test_numbers_in_each_others_place_are_seen(one: str, other: str) -> None:
    first, second = (f"{told(what)}<!--{what}-->" for what in (one, other))
    assert first in PAGE
    assert second in PAGE
    changed = PAGE.replace(first, f"{told(other)}<!--{one}-->")
    changed = changed.replace(second, f"{told(one)}<!--{other}-->")
    # All of them are somewhere in the tables.
    assert all(told(what) in TABLES.read_text() for what in (one, other))
    assert refreshed(changed) == PAGE != changed


def test_cells_of_a_row_in_each_others_place_are_seen() -> None:
    row = "| 0.67 | 0.91 | 1.12 | 1.30 |"
    assert PAGE.count(row) == 1
    changed = PAGE.replace(row, "| 0.91 | 0.67 | 1.12 | 1.30 |")
    assert refreshed(changed) == PAGE
    assert unmarked(f"{PAGE}\nAnd +0.0195 {PLUS_MINUS} 0.0290.") != []


def test_words_that_the_tables_contradict_are_marked() -> None:
    all_hold = "All hold zero<!--must zero By position; each; s = 2 ahead by-->."
    assert refreshed(all_hold) == all_hold
    false = "All hold zero<!--must zero By position; each; fresh moments ahead by-->."
    assert refreshed(false) == false.replace("<!--", "not so<!--")
    assert refreshed(refreshed(false)) == refreshed(false)


def test_words_on_a_cell_without_an_interval_do_not_hold() -> None:
    for kind in ("zero", "off"):
        bare = f"So<!--must {kind} Around the switch; {MINUS}49 to 0; gradient norm, baseline-->."
        assert refreshed(bare) == bare.replace("<!--", "not so<!--")


def test_an_interval_of_some_seeds_is_read() -> None:
    assert _holds_zero(f"+0.02 {PLUS_MINUS} 0.03 (n = 2 of 3)")
    assert not _holds_zero(f"{MINUS}0.04 {PLUS_MINUS} 0.03 (n = 2 of 3)")


def test_the_page_names_every_interval_by_position_that_leaves_out_zero() -> None:
    named = re.findall(r"<!--must off By position; ([^;]+); ([^>]+)-->", PAGE)
    assert set(named) == leaving_out_zero("By position")
    counted = re.findall(r"That is (\d+) of the table's (\d+) intervals", PAGE)
    cells = [cell for row in tables()["By position"].values() for cell in row.values()]
    gaps = sum(PLUS_MINUS in cell for cell in cells)
    assert counted == [(str(len(named)), str(gaps))]


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


def test_half_of_what_the_switch_costs_is_back_within_20_steps() -> None:
    gaps = tables()["After the switch"]
    lost, left = (
        float(gaps[step]["s = 2 ahead by"].partition(" ")[0].replace(MINUS, "-"))
        for step in ("0", "20")
    )
    assert 0.45 < left / lost < 0.5


def test_checkpoints_after_the_switch_are_at_the_full_rate() -> None:
    """WSD with a warm-up of 5% and a decay of 10%."""
    total = BAGS.runs[1].total_steps
    assert 0.05 * total < SWITCH
    assert total * 0.9 > SWITCH + 1000


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


def test_three_tensors_are_clearly_further_off_after_50_steps_than_at_the_switch() -> None:
    def further_off(name: str) -> float:
        at, after = (
            abs(np.log(moment_ratio(BAGS, name, SWITCH + step, SWITCH + 1000))) for step in (0, 50)
        )
        return float(after - at)

    names = BAGS.runs[1].places(MOMENT, SWITCH)
    assert {name for name in names if further_off(name) > 0.1} == {
        "decoder.final_layernorm.weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "output_layer.weight",
    }
    # All of them are in the page's table.
    assert all(f"<!--row Adam's second moments; s = 2, {name};" in PAGE for name in names)
