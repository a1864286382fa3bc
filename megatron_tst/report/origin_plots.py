"""Plots of where a gain comes from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import sqrt

import numpy as np
from matplotlib.ticker import NullFormatter

from megatron_tst.report.curve_plots import COLOURS, legend
from megatron_tst.report.drawing import FOREGROUND, Canvas, Plot, render
from megatron_tst.report.origin_positions import position_bins, position_losses
from megatron_tst.report.origin_seeds import last_switch
from megatron_tst.report.origins import GRADIENT, STEPS_AFTER, TRAINING, Arm
from megatron_tst.report.statistics import estimate
from megatron_tst.report.units import gap_text, seeds

_MOST_ARMS = 2
_BINS_PER_OCTAVE = 2
_AXES = {TRAINING: "training loss (nats/token)", GRADIENT: "gradient norm"}


def origin_plots(arms: Sequence[Arm]) -> list[Plot]:
    """Gaps by position, and losses and gradient norms after the switch, as far as measured."""
    plots = []
    baseline = arms[0]
    # An interval of fewer seeds than the baseline has can be wider than all else.
    others = [arm for arm in arms[1:] if arm.runs.keys() >= baseline.runs.keys()][:_MOST_ARMS]
    measured = {arm.name: position_gaps(baseline, arm) for arm in others}
    gaps = {name: found for name, found in measured.items() if found is not None}
    if gaps:
        caption = "Gap on the text by tokens seen; bars: 95% intervals over seeds."
        plots.append(render("positions", "Gap by position", caption, partial(_gaps, gaps)))
    switch = last_switch(arms)
    for quantity, name in ((TRAINING, "switch-losses"), (GRADIENT, "switch-gradients")):
        if switch is None:
            break
        series = {arm.name: found for arm in arms if (found := _means(arm, quantity, switch))}
        if len(series) > 1:
            draw = partial(_steps, series, quantity)
            caption = "Means over seeds, of each step after the switch."
            plots.append(render(name, f"{_AXES[quantity]} after the switch", caption, draw))
    return plots


def position_gaps(baseline: Arm, arm: Arm) -> np.ndarray | None:
    """Baseline minus arm, by seed and position, [seeds, n]; None without a pair."""
    rows = []
    for seed, run in sorted(arm.runs.items()):
        theirs = position_losses(baseline.runs[seed]) if seed in baseline.runs else None
        ours = position_losses(run)
        if ours is not None and theirs is not None:
            rows.append(theirs[0] - ours[0])
    return np.array(rows) if rows else None


def _gaps(gaps: dict[str, np.ndarray], canvas: Canvas) -> None:
    length = max(rows.shape[1] for rows in gaps.values())
    bins = position_bins(length, _BINS_PER_OCTAVE)
    middles = [sqrt(low * high) for low, high in bins]
    for place, (name, rows) in enumerate(gaps.items(), start=1):
        binned = [rows[:, low - 1 : high].mean(axis=1).tolist() for low, high in bins]
        found = [estimate(values) for values in binned]
        canvas.axes.errorbar(
            # Beside each other.
            [middle * 1.02 ** (place - 1) for middle in middles],
            [each.mean for each in found],
            yerr=[each.half_width or 0.0 for each in found],
            color=COLOURS[place % len(COLOURS)],
            marker="o",
            capsize=2,
            label=f"{name} ({seeds(len(rows))})",
        )
        for middle, (low, high), each in zip(middles, bins, found, strict=True):
            text = f"{name}, {low} to {high} tokens seen: {gap_text(each, 4)}"
            canvas.say(middle, each.mean, text)
    canvas.axes.axhline(0, color=FOREGROUND, linewidth=1)
    canvas.axes.set_xlabel("tokens that the prediction sees")
    canvas.axes.set_ylabel("gap to the baseline\n(nats/token; + is ahead)")
    _logarithmic(canvas, length)


def _logarithmic(canvas: Canvas, last: int) -> None:
    canvas.axes.set_xscale("log", base=2)
    ticks = [2**k for k in range(last.bit_length())]
    canvas.axes.set_xticks(ticks, [str(tick) for tick in ticks])
    canvas.axes.xaxis.set_minor_formatter(NullFormatter())
    legend(canvas.axes)


def _means(arm: Arm, quantity: str, switch: int) -> list[float] | None:
    """Means over seeds of the steps after the switch; None where one was not logged."""
    series = [run.series(quantity) for run in arm.runs.values()]
    last = min(STEPS_AFTER, min(run.total_steps for run in arm.runs.values()) - switch)
    steps = range(switch + 1, switch + last + 1)
    if not all(step in each for each in series for step in steps):
        return None
    return [float(np.mean([each[step] for each in series])) for step in steps]


def _steps(series: dict[str, list[float]], quantity: str, canvas: Canvas) -> None:
    for place, (name, values) in enumerate(series.items()):
        steps = range(1, len(values) + 1)
        canvas.axes.plot(steps, values, color=COLOURS[place % len(COLOURS)], label=name)
        for step, value in zip(steps, values, strict=True):
            canvas.say(step, value, f"{name}, step {step}: {value:.3f}")
    canvas.axes.set_xlabel("steps after the switch")
    canvas.axes.set_ylabel(_AXES[quantity])
    _logarithmic(canvas, max(map(len, series.values())))
