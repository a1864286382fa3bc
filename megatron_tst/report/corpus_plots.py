"""Pictures of a corpus: how long its documents are, and how its mutual information falls."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, ScalarFormatter
from numpy.typing import NDArray

from megatron_tst.corpus.lengths import LengthDistribution
from megatron_tst.corpus.mutual_information import DecayFit, Measurement
from megatron_tst.report.curve_plots import COLOURS, legend
from megatron_tst.report.drawing import FOREGROUND, STYLE

_BINS = 60


def draw_lengths(lengths: LengthDistribution) -> bytes:
    """The histogram of document lengths, and of the tokens in them, as PNG.

    Empty documents have no place on the logarithmic axis; the label counts them.
    """
    positive = lengths.lengths[lengths.lengths > 0]
    # Between whole numbers, of which bins that are finer would miss some.
    steps = np.geomspace(positive[0], positive[-1] + 1, _BINS + 1).round()
    edges = np.unique(steps) - 0.5
    documents, tokens = (_percent(numbers) for numbers in lengths.binned(edges))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        axes = figure.add_subplot()
        colours = COLOURS[:2]
        axes.stairs(documents, edges, fill=True, alpha=0.55, color=colours[0], label="documents")
        axes.stairs(tokens, edges, color=colours[1], linewidth=1.6, label="tokens in them")
        for share, name, style in ((0.5, "median", "--"), (0.95, "p95", ":")):
            length = max(lengths.quantile(share), 1)
            label = f"{name} {length:,}"
            axes.axvline(length, color=FOREGROUND, linestyle=style, linewidth=1.0, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(f"tokens a document ({lengths.documents:,}, {lengths.empty:,} empty)")
        axes.set_ylabel("share in a bin (%)")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.2)
        return _png(figure)


def _percent(numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(100.0 * numbers / numbers.sum())


def draw_decay(measurement: Measurement, fit: DecayFit) -> bytes:
    """Mutual information against distance with the fitted law, and the residuals, as PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.2), layout="constrained")
        curve, residuals = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _draw_curve(curve, measurement, fit)
        difference = measurement.information - fit.law(measurement.distances)
        residuals.axhline(0.0, color=COLOURS[1])
        _draw_points(residuals, measurement, fit, difference)
        residuals.set_ylabel("residual (nats)")
        residuals.set_xlabel("distance D (tokens)")
        residuals.set_xticks(measurement.distances, minor=False)
        residuals.xaxis.set_major_formatter(ScalarFormatter())
        residuals.minorticks_off()
        figure.align_ylabels()
        return _png(figure)


def _draw_curve(axes: Axes, measurement: Measurement, fit: DecayFit) -> None:
    distances, law = measurement.distances, fit.law
    _draw_points(axes, measurement, fit, measurement.information)
    fine = np.geomspace(distances[0], distances[-1], 200)
    label = f"{law.constant:.3f} + {law.amplitude:.3f} D$^{{{law.exponent:.3f}}}$"
    axes.plot(fine, law(fine), color=COLOURS[1], label=label)
    constant = f"constant {law.constant:.3f}"
    axes.axhline(law.constant, color=FOREGROUND, linestyle=":", linewidth=1.0, label=constant)
    axes.set_xscale("log", base=2)
    axes.set_ylabel("mutual information (nats)")
    legend(axes)


def _draw_points(
    axes: Axes, measurement: Measurement, fit: DecayFit, values: NDArray[np.float64]
) -> None:
    axes.errorbar(
        measurement.distances,
        values,
        yerr=None if fit.standard_errors is None else 2.0 * fit.standard_errors,
        fmt="o",
        color=COLOURS[0],
        capsize=2.0,
        zorder=5,
        label="measured" if fit.standard_errors is None else "measured, 2 std. errors",
    )


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160, facecolor="white")
    return png.getvalue()
