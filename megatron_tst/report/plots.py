"""The plots of a comparison, as SVG that takes the page's text colour and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_tst.report import wording
from megatron_tst.report.comparison import Arm, Comparison
from megatron_tst.report.runs import (
    OFFSET_LOSS_PREFIX,
    TRAINING_LOSS,
    Budget,
    FloatArray,
    Run,
    Series,
)

# Blue and vermilion of the Okabe-Ito set, with a lightness that reads on white and on near-black.
_COLOURS = {"baseline": "#2f7fbf", "TST": "#d9601a"}
_MARKERS = {"baseline": "o", "TST": "s"}
# Stands for the text colour; the SVG takes the page's instead.
_FOREGROUND = "#1f2328"
_INITIAL_TRANSIENT = 0.05
_POINTS_PER_PHASE = 300
_MARKERS_PER_CURVE = 20
# A date would make two reports of the same runs differ.
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-tst",
    "text.color": _FOREGROUND,
    "axes.labelcolor": _FOREGROUND,
    "axes.edgecolor": _FOREGROUND,
    "xtick.color": _FOREGROUND,
    "ytick.color": _FOREGROUND,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FOREGROUND,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}


@dataclass(frozen=True)
class Plot:
    """One rendered plot.

    Attributes:
        name: for file names.
        title: heading.
        caption: one or two sentences of text.
        svg: an ``<svg>`` element without references to other files.
        png: the same plot on white.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def render_plots(comparison: Comparison) -> list[Plot]:
    """Renders all plots, the equal-FLOPs one first."""
    plots = [
        _plot(
            "equal-flops",
            "Equal FLOPs",
            "Validation loss against equivalent tokens, to which FLOPs are proportional. "
            "Diamonds mark where each arm first reached the other's final loss.",
            lambda axes: _draw_validation(axes, comparison, "equivalent tokens"),
        ),
        _plot(
            "equal-data",
            "Equal data",
            "Validation loss against tokens of text read.",
            lambda axes: _draw_validation(axes, comparison, "data tokens"),
        ),
        _plot(
            "training-time",
            "Training time",
            "Validation loss against seconds spent in training steps, without evaluation.",
            lambda axes: _draw_validation(axes, comparison, "seconds"),
        ),
        _plot(
            "training-loss",
            "Training loss",
            wording.jump_explanation(comparison),
            lambda axes: _draw_training(axes, comparison),
        ),
    ]
    if comparison.tst.last_step > comparison.tst.schedule.switch_step:
        end_of_run = _plot(
            "end-of-run",
            "Equal FLOPs, end of the run",
            "The same curves over the second half of phase 2.",
            lambda axes: _draw_end(axes, comparison),
        )
        plots.insert(1, end_of_run)
    offsets = _offset_losses(comparison.tst)
    if offsets:
        plots.append(
            _plot(
                "offset-loss",
                "Loss by position in the bag",
                "Phase 1 of TST: training loss of the i-th token of the bag that is predicted.",
                lambda axes: _draw_offsets(axes, offsets),
            )
        )
    return plots


def _plot(name: str, title: str, caption: str, draw: Callable[[Axes], None]) -> Plot:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata=_NO_METADATA)
    return Plot(name, title, caption, _embeddable(svg.getvalue().decode(), title), png.getvalue())


def _embeddable(document: str, label: str) -> str:
    """The ``<svg>`` element of a document, without namespaces, in the page's colour and font."""
    element = document[document.index("<svg") :]
    element = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", element)
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = element.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    # Ids are unique within a document only; a page holds several.
    prefix = re.sub(r"\W", "", label.lower())
    element = re.sub(r'\bid="', f'id="{prefix}-', element)
    element = re.sub(r'(url\(|xlink:href=")#', rf"\1#{prefix}-", element)
    return element.replace(_FOREGROUND, "currentColor")


def _arms(comparison: Comparison) -> Iterator[tuple[str, Run]]:
    yield "baseline", comparison.baseline
    yield "TST", comparison.tst


def _draw_validation(axes: Axes, comparison: Comparison, budget: Budget) -> None:
    curves = _draw_validation_curves(axes, comparison, budget)
    switch = comparison.tst.schedule.switch_step
    _mark_switch(axes, comparison, comparison.tst.spent(budget, switch))
    _frame_losses(axes, curves, start=_INITIAL_TRANSIENT * max(x[-1] for x, _ in curves))
    _legend(axes)


def _draw_end(axes: Axes, comparison: Comparison) -> None:
    tst = comparison.tst
    curves = _draw_validation_curves(axes, comparison, "equivalent tokens")
    middle = (tst.schedule.switch_step + tst.last_step) / 2
    start, end = (tst.spent("equivalent tokens", step) for step in (middle, tst.last_step))
    _frame_losses(axes, curves, start)
    axes.set_xlim(start, end + 0.02 * (end - start))
    _legend(axes)


def _draw_validation_curves(
    axes: Axes, comparison: Comparison, budget: Budget
) -> list[tuple[FloatArray, FloatArray]]:
    """Draws the curves and their labels; returns what each arm had spent, and its losses."""
    curves = []
    for name, run in _arms(comparison):
        x, loss = run.validation_spent(budget), run.validation.values
        axes.plot(
            x,
            loss,
            color=_COLOURS[name],
            marker=_MARKERS[name],
            markevery=max(1, len(x) // _MARKERS_PER_CURVE),
            label=f"{name} (final {run.final_loss:.3f})",
        )
        curves.append((x, loss))
    if budget != "data tokens":
        _mark_equal_loss(axes, comparison, budget)
    axes.set_xlabel("training time (s)" if budget == "seconds" else budget)
    axes.set_ylabel("validation loss (nats/token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return curves


def _legend(axes: Axes) -> None:
    """A legend above the plot, where no curve can run through it."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2)


def _frame_losses(axes: Axes, curves: list[tuple[FloatArray, FloatArray]], start: float) -> None:
    """Fits the loss axis to what comes after ``start``: the initial drop would flatten the rest."""
    settled = [y[x >= min(start, x[-1])] for x, y in curves]
    low, high = min(y.min() for y in settled), max(y.max() for y in settled)
    margin = 0.06 * max(high - low, 1e-3)
    axes.set_ylim(low - margin, high + margin)


def _mark_switch(axes: Axes, comparison: Comparison, at: float) -> None:
    axes.axvline(
        at,
        color=_FOREGROUND,
        linestyle="--",
        linewidth=1.0,
        label=f"switch (step {comparison.tst.schedule.switch_step})",
    )


def _mark_equal_loss(axes: Axes, comparison: Comparison, budget: Budget) -> None:
    """A diamond where an arm reached the other's final loss, dotted to where the other did."""
    for reading in comparison.equal_loss:
        chaser: Arm = "TST" if reading.target_of == "baseline" else "baseline"
        cost, cost_of_target = reading.cost_of(chaser), reading.cost_of(reading.target_of)
        if reading.budget != budget or cost is None or cost_of_target is None:
            continue
        y = reading.target_loss
        axes.plot([cost, cost_of_target], [y, y], color=_FOREGROUND, linestyle=":", linewidth=1)
        axes.plot([cost], [y], "D", color=_COLOURS[chaser], markersize=7, zorder=5)


def _draw_training(axes: Axes, comparison: Comparison) -> None:
    curves = []
    for name, run in _arms(comparison):
        steps, losses = _thinned(run.scalars[TRAINING_LOSS], run.schedule.switch_step)
        axes.plot(steps, losses, color=_COLOURS[name], label=name)
        curves.append((steps, losses))
    _mark_switch(axes, comparison, comparison.tst.schedule.switch_step)
    _frame_losses(axes, curves, start=_INITIAL_TRANSIENT * max(x[-1] for x, _ in curves))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats/token)")
    _legend(axes)


def _thinned(series: Series, switch_step: int) -> tuple[FloatArray, FloatArray]:
    """Means over neighbouring steps, never across the switch, so that a long run stays drawable."""
    points: list[tuple[float, float]] = []
    for phase in (series.steps <= switch_step, series.steps > switch_step):
        steps, values = series.steps[phase], series.values[phase]
        pieces = min(len(steps), _POINTS_PER_PHASE)
        if pieces:
            points += [
                (float(np.mean(x)), float(np.mean(y)))
                for x, y in zip(
                    np.array_split(steps, pieces), np.array_split(values, pieces), strict=True
                )
            ]
    x, y = np.array(points).T
    return x, y


def _offset_losses(run: Run) -> list[float]:
    """Mean over the last tenth of the logged values, by position in the bag."""
    losses = []
    for i in range(1, run.schedule.config.bag_size + 1):
        series = run.scalars.get(f"{OFFSET_LOSS_PREFIX}{i}")
        if series is None:
            return []
        losses.append(float(series.values[-max(1, len(series.values) // 10) :].mean()))
    return losses


def _draw_offsets(axes: Axes, losses: list[float]) -> None:
    positions = range(1, len(losses) + 1)
    axes.plot(positions, losses, color=_COLOURS["TST"], marker=_MARKERS["TST"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("position in the predicted bag (tokens)")
    axes.set_ylabel("training loss (nats/token)")
