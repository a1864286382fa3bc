"""Figures of gaps: what a setting whose runs are not at their end is drawn as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron_tst.report.comparison import Study, study_of
from megatron_tst.report.drawing import Canvas
from megatron_tst.report.families import families_of
from megatron_tst.report.gap_plots import draw_gaps, draw_heat_map, draw_over_bag_sizes
from megatron_tst.report.sweep import Sweep, largest_sweep
from tests.unit.synthetic_runs import synthetic_run


def falling(end: float) -> Callable[[float], float]:
    return lambda step: end + 1 / step


@pytest.fixture
def study() -> Study:
    """Three seeds each: a baseline, s = 2, which won, and s = 4, which is not at its end."""
    runs = []
    for seed in range(3):
        runs.append(synthetic_run(falling(3.0), seed=seed))
        runs.append(synthetic_run(falling(2.95 - 0.001 * seed), bag_size=2, seed=seed))
        run = synthetic_run(falling(2.9 - 0.001 * seed), bag_size=4, seed=seed)
        runs.append(replace(run, status="unfinished"))
    return study_of(families_of(runs)[0])


def drawn(draw: Callable[[Canvas], None]) -> Canvas:
    canvas = Canvas(Figure().add_subplot())
    draw(canvas)
    return canvas


def sweep_of(study: Study) -> Sweep:
    sweep = largest_sweep(study.matchups)
    assert sweep is not None
    return sweep


def test_what_is_not_finished_decides_nothing_in_the_list_of_gaps(study: Study) -> None:
    canvas = drawn(lambda canvas: draw_gaps(canvas, study.ranked))
    labels = [label.get_text() for label in canvas.axes.get_yticklabels()]
    assert labels == ["s=4 r=0.25, unfinished", "s=2 r=0.25"]
    circles = [line for line in canvas.axes.get_lines() if line.get_marker() == "o"]
    assert [circle.get_markerfacecolor() == "white" for circle in circles] == [True, False]
    said = {text for _, _, text in canvas.values}
    assert "s=4 r=0.25: +0.1010 ± 0.0025 nats (3 seeds, unfinished)" in said
    assert "s=2 r=0.25: +0.0510 ± 0.0025 nats (3 seeds)" in said


def test_what_is_not_finished_has_no_heavy_frame_in_the_map(study: Study) -> None:
    canvas = drawn(lambda canvas: draw_heat_map(canvas, sweep_of(study)))
    cells = [patch for patch in canvas.axes.patches if isinstance(patch, Rectangle)]
    assert [cell.get_linewidth() > 1 for cell in cells] == [True, False]
    assert ["unfinished" in text.get_text() for text in canvas.axes.texts] == [False, True]


def test_what_is_not_finished_is_hollow_on_a_line(study: Study) -> None:
    canvas = drawn(lambda canvas: draw_over_bag_sizes(canvas, sweep_of(study)))
    assert any(isinstance(found, LineCollection) for found in canvas.axes.collections)
    hollow = [line for line in canvas.axes.get_lines() if line.get_color() == "white"]
    assert [float(x) for line in hollow for x in np.asarray(line.get_xdata())] == [4.0]
