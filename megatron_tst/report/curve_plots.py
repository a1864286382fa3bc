"""Loss curves of a study: validation over what was spent, and training over steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from megatron_tst.report.drawing import FOREGROUND, Canvas
from megatron_tst.report.events import FloatArray
from megatron_tst.report.families import Group
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.pairs import ARMS, Arm
from megatron_tst.report.results import RunResult
from megatron_tst.report.runs import Budget
from megatron_tst.report.statistics import FEWEST_SEEDS, Estimate, estimate
from megatron_tst.report.units import amount, loss_text, seeds

# Blue, vermilion and others after the Okabe-Ito set, of a lightness that reads on white and on
# near-black.
COLOURS = ("#2f7fbf", "#d9601a", "#2a9a70", "#b5609f", "#8f7d12", "#6f7f90")
MARKERS = ("o", "s", "^", "D", "v", "P")
_INITIAL_TRANSIENT = 0.05
_CHARACTERS_A_LINE = 90
_DIVERGED_STYLE = (0, (1, 1.5))
_SWITCH_STYLE: dict[str, Any] = {"color": FOREGROUND, "linestyle": "--", "linewidth": 1.0}


@dataclass(frozen=True, eq=False)
class Curve:
    """Validation loss of a group of runs over what they had spent.

    Attributes:
        spent: mean over seeds, [n].
        losses: over seeds, n of them.
    """

    spent: FloatArray
    losses: list[Estimate]

    @property
    def mean(self) -> FloatArray:
        """Mean loss, [n]."""
        return np.array([loss.mean for loss in self.losses])


def curve_of(runs: tuple[RunResult, ...], budget: Budget) -> Curve:
    """Averages runs over the steps that all of them were evaluated at."""
    steps = sorted(set.intersection(*(set(run.steps.tolist()) for run in runs)))
    places = [np.searchsorted(run.steps, steps) for run in runs]
    spent = [run.spent(budget)[at] for run, at in zip(runs, places, strict=True)]
    losses = [run.validation_loss[at] for run, at in zip(runs, places, strict=True)]
    return Curve(
        np.mean(spent, axis=0),
        [estimate([float(value) for value in at_step]) for at_step in np.transpose(losses)],
    )


def draw_validation(
    canvas: Canvas,
    groups: list[Group],
    budget: Budget,
    matchup: Matchup | None = None,
    second_half: bool = False,
) -> None:
    """Draws validation curves with their intervals, diverged runs dotted.

    Args:
        canvas: where.
        groups: what to draw, baselines first.
        budget: horizontal axis.
        matchup: whose switches are marked, and whose equal losses if they have one seed.
        second_half: whether to show only the second half of the last phase.
    """
    drawn = [_draw_group(canvas, group, place, budget) for place, group in enumerate(groups)]
    curves = [curve for curve in drawn if curve is not None]
    for place, group in enumerate(groups):
        for run in group.diverged:
            _draw_diverged(canvas, run, place, budget)
    longest = max((curve.spent[-1] for curve in curves), default=1.0)
    start = _INITIAL_TRANSIENT * longest
    if matchup is not None and matchup.pairs:
        switches = np.mean([pair.spent_at_switches(budget) for pair in matchup.pairs], axis=0)
        # The second half of the last phase has none.
        named = "" if second_half else "switch"
        for switch, label in zip(switches, [named, *[""] * len(switches)], strict=False):
            canvas.axes.axvline(switch, label=label, **_SWITCH_STYLE)
        if len(matchup.pairs) == 1 and budget != "data tokens":
            _mark_equal_loss(canvas, matchup, budget)
        if second_half:
            start = (switches[-1] + float(matchup.pairs[0].tst.spent(budget)[-1])) / 2
            canvas.axes.set_xlim(start, longest + 0.02 * (longest - start))
    _frame(canvas, [(curve.spent, curve.mean) for curve in curves], start)
    canvas.axes.set_xlabel("training time (s)" if budget == "seconds" else budget)
    canvas.axes.set_ylabel("validation loss (nats/token)")
    canvas.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend(canvas.axes)


def draw_training(canvas: Canvas, groups: list[Group]) -> None:
    """Draws the training loss of one run of each group, the one of the first seed."""
    curves = []
    for place, group in enumerate(groups):
        if not group.counted:
            continue
        run = group.counted[0]
        x, y = run.training_steps.astype(np.float64), run.training_loss
        canvas.axes.plot(x, y, color=COLOURS[place], label=group.label)
        for step, loss in zip(x, y, strict=True):
            canvas.say(step, loss, f"{group.label}: {loss:.4f} at step {step:.0f}")
        for phase in run.phases[1:]:
            canvas.axes.axvline(phase.first_step, **_SWITCH_STYLE)
        curves.append((x, y))
    _frame(canvas, curves, _INITIAL_TRANSIENT * max(x[-1] for x, _ in curves))
    canvas.axes.set_xlabel("optimizer step")
    canvas.axes.set_ylabel("training loss (nats/token)")
    legend(canvas.axes)


def legend(axes: Axes) -> None:
    """A legend above the plot, where no curve can run through it."""
    labels = axes.get_legend_handles_labels()[1]
    # A legend wider than the figure would squeeze the axes.
    columns = max(1, min(3, _CHARACTERS_A_LINE // (max(map(len, labels), default=0) + 6)))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2)


def _draw_group(canvas: Canvas, group: Group, place: int, budget: Budget) -> Curve | None:
    if not group.counted:
        return None
    curve, colour = curve_of(group.counted, budget), COLOURS[place]
    canvas.axes.plot(
        curve.spent,
        curve.mean,
        color=colour,
        marker=MARKERS[place],
        label=f"{group.label} ({curve.mean[-1]:.3f})",
    )
    bands = [(loss.low, loss.high) for loss in curve.losses if loss.n >= FEWEST_SEEDS]
    # The band of two seeds would be all of the plot.
    if bands:
        low, high = np.array(bands, dtype=np.float64).T
        canvas.axes.fill_between(curve.spent, low, high, color=colour, alpha=0.1, linewidth=0)
    for spent, loss in zip(curve.spent, curve.losses, strict=True):
        over = "" if loss.n == 1 else f" ({seeds(loss.n)})"
        canvas.say(
            spent, loss.mean, f"{group.label}: {loss_text(loss)}{over} at {amount(budget, spent)}"
        )
    return curve


def _draw_diverged(canvas: Canvas, run: RunResult, place: int, budget: Budget) -> None:
    finite = np.isfinite(run.validation_loss)
    x, y = run.spent(budget)[finite], run.validation_loss[finite]
    if not x.size:
        return
    canvas.axes.plot(x, y, color=COLOURS[place], linestyle=_DIVERGED_STYLE, linewidth=1.2)
    canvas.axes.plot(x[-1:], y[-1:], "x", color=COLOURS[place], markersize=8)
    for spent, loss in zip(x, y, strict=True):
        canvas.say(spent, loss, f"{run.name}, diverged: {loss:.4f} at {amount(budget, spent)}")


def _mark_equal_loss(canvas: Canvas, matchup: Matchup, budget: Budget) -> None:
    """A diamond where an arm reached the other's final loss, dotted to where the other did."""
    pair = matchup.pairs[0]
    for target_of in ARMS:
        reading = pair.equal_loss(budget, target_of)
        chaser: Arm = "TST" if target_of == "baseline" else "baseline"
        cost, cost_of_target = reading.cost_of(chaser), reading.cost_of(target_of)
        if cost is None or cost_of_target is None:
            continue
        y = reading.target_loss
        canvas.axes.plot(
            [cost, cost_of_target], [y, y], color=FOREGROUND, linestyle=":", linewidth=1
        )
        colour = COLOURS[1 if chaser == "TST" else 0]
        canvas.axes.plot([cost], [y], "D", color=colour, markersize=7, zorder=5)
        canvas.say(cost, y, f"{chaser} first reached {y:.4f} after {amount(budget, cost)}")


def _frame(canvas: Canvas, curves: list[tuple[FloatArray, FloatArray]], start: float) -> None:
    """Fits the loss axis to what comes after ``start``: the initial drop would flatten the rest."""
    settled = [y[(x >= min(start, x[-1])) & np.isfinite(y)] for x, y in curves]
    settled = [y for y in settled if y.size]
    if not settled:
        return
    low, high = min(y.min() for y in settled), max(y.max() for y in settled)
    margin = 0.06 * max(high - low, 1e-3)
    canvas.axes.set_ylim(low - margin, high + margin)
