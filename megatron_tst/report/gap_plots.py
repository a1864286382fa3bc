"""Gaps of many settings: one by one, over s and r, and final losses over the length of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter

from megatron_tst.common.units import DASH, quantity
from megatron_tst.report.curve_plots import COLOURS, MARKERS, legend
from megatron_tst.report.drawing import FOREGROUND, Canvas
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.results import RunResult
from megatron_tst.report.statistics import is_decided
from megatron_tst.report.sweep import Sweep, cell_of
from megatron_tst.report.units import gap_text, seeds
from megatron_tst.report.wording import UNFINISHED

_GAP_AXIS = "gap to the baseline (nats/token; + is TST ahead)"


def draw_gaps(canvas: Canvas, matchups: Sequence[Matchup]) -> None:
    """A row for each setting: mean and interval of the paired differences, and each seed."""
    rows = list(enumerate(reversed(matchups)))
    for row, matchup in rows:
        gap = matchup.gap
        if gap is None:
            continue
        colour = COLOURS[1] if gap.mean > 0 else COLOURS[0]
        if gap.low is not None and gap.high is not None:
            canvas.axes.plot([gap.low, gap.high], [row, row], color=colour, linewidth=2)
        for seed, value in _by_seed(matchup):
            canvas.axes.plot(value, row, "|", color=FOREGROUND, markersize=6, alpha=0.6)
            canvas.say(value, row, f"{matchup.tst.label}, seed {seed}: {value:+.4f}")
        face = colour if _decides(matchup) else "white"
        canvas.axes.plot(
            gap.mean, row, "o", color=colour, markerfacecolor=face, markersize=6, zorder=3
        )
        canvas.say(gap.mean, row, _gap_title(matchup))
    canvas.axes.axvline(0, color=FOREGROUND, linewidth=1)
    canvas.axes.set_xlim(*_frame(matchups))
    labels = [f"{matchup.tst.label}{_unfinished(matchup)}" for _, matchup in rows]
    canvas.axes.set_yticks([row for row, _ in rows], labels)
    canvas.axes.set_ylim(-0.7, len(rows) - 0.3)
    canvas.axes.set_xlabel(_GAP_AXIS)


def _decides(matchup: Matchup) -> bool:
    return matchup.gap is not None and matchup.is_finished and is_decided(matchup.gap)


def _unfinished(matchup: Matchup) -> str:
    return "" if matchup.is_finished or not matchup.pairs else f", {UNFINISHED}"


def _by_seed(matchup: Matchup) -> list[tuple[int, float]]:
    return [(pair.tst.seed, pair.gap) for pair in matchup.pairs if pair.gap is not None]


def _frame(matchups: Sequence[Matchup]) -> tuple[float, float]:
    """Limits of an axis of gaps: all seeds, whole intervals as far as they are no wider than
    these. The interval of two seeds can be ten times as wide, and would hide the rest."""
    gaps = [gap for matchup in matchups for _, gap in _by_seed(matchup)]
    low, high = min([*gaps, 0.0]), max([*gaps, 0.0])
    found = [matchup.gap for matchup in matchups]
    ends = [end for gap in found if gap is not None for end in (gap.low, gap.high)]
    width = max(high - low, 1e-3)
    near = [end for end in ends if end is not None and low - width / 4 <= end <= high + width / 4]
    return min([low, *near]) - width / 20, max([high, *near]) + width / 20


def draw_heat_map(canvas: Canvas, sweep: Sweep) -> None:
    """A cell for each (s, r): the gap; framed where its interval leaves out zero."""
    sizes, ratios = sweep.bag_sizes, sweep.step_ratios
    gaps = {cell: matchup.gap for cell, matchup in sweep.cells.items()}
    reach = max((abs(gap.mean) for gap in gaps.values() if gap), default=0.0) or 1e-3
    shades = TwoSlopeNorm(0.0, -reach, reach)
    for column, size in enumerate(sizes):
        for row, ratio in enumerate(ratios):
            matchup = sweep.cells.get((size, ratio))
            _draw_cell(canvas, column, row, matchup, shades)
            told = f"s={size} r={ratio:g}: no run" if matchup is None else _gap_title(matchup)
            # A cell is larger than a point's target.
            for across in (-0.25, 0.0, 0.25):
                canvas.say(column + across, row, told)
    canvas.axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    canvas.axes.set_yticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    canvas.axes.set_xlim(-0.5, len(sizes) - 0.5)
    canvas.axes.set_ylim(-0.5, len(ratios) - 0.5)
    canvas.axes.set_xlabel("bag size s")
    canvas.axes.set_ylabel("step ratio r")
    canvas.axes.grid(visible=False)


def _draw_cell(
    canvas: Canvas, column: int, row: int, matchup: Matchup | None, shades: TwoSlopeNorm
) -> None:
    gap = None if matchup is None else matchup.gap
    text, shade, ink = DASH, "none", FOREGROUND
    if gap is not None:
        text = gap_text(gap).replace(" ", "\n", 1)
        shade, ink = _shade(float(shades(gap.mean)))
    if matchup is not None and matchup.tst.diverged:
        text += f"\n{len(matchup.tst.diverged)} of {len(matchup.tst.runs)} diverged"
    if matchup is not None and _unfinished(matchup):
        text += f"\n{UNFINISHED}"
    is_framed = matchup is not None and _decides(matchup)
    canvas.axes.add_patch(
        Rectangle(
            (column - 0.47, row - 0.46),
            0.94,
            0.92,
            facecolor=shade,
            edgecolor=FOREGROUND,
            linewidth=2.0 if is_framed else 0.4,
            hatch=None if matchup is not None else "///",
            alpha=1.0 if matchup is not None else 0.4,
        )
    )
    canvas.axes.text(column, row, text, ha="center", va="center", fontsize=9, color=ink)


def _shade(value: float) -> tuple[str, str]:
    """Fill and ink of a cell for a gap scaled to 0 .. 1, with 0.5 for no gap."""
    end = np.array([0xD9, 0x60, 0x1A]) if value > 0.5 else np.array([0x2F, 0x7F, 0xBF])
    white = np.array([0xF4, 0xF4, 0xF4])
    share = abs(value - 0.5) * 2
    red, green, blue = (round(c) for c in white + share * (end - white))
    # Dark on all shades, so in both colour schemes; not the text colour, which turns with them.
    return f"#{red:02x}{green:02x}{blue:02x}", "#101418"


def draw_over_bag_sizes(canvas: Canvas, sweep: Sweep) -> None:
    """The gap over s, a line for each r."""
    lines = sweep.over_bag_sizes()
    for place, (ratio, line) in enumerate(lines.items()):
        _draw_line(canvas, place, f"r={ratio:g}", [float(cell_of(m)[0]) for m in line], line)
    canvas.axes.set_xscale("log", base=2)
    sizes = sweep.bag_sizes
    canvas.axes.set_xticks(sizes, [str(size) for size in sizes])
    canvas.axes.xaxis.set_minor_formatter(NullFormatter())
    _finish_lines(canvas, "bag size s", lines.values())


def draw_over_step_ratios(canvas: Canvas, sweep: Sweep) -> None:
    """The gap over r, a line for each s."""
    lines = sweep.over_step_ratios()
    for place, (size, line) in enumerate(lines.items()):
        _draw_line(canvas, place, f"s={size}", [cell_of(m)[1] for m in line], line)
    canvas.axes.set_xticks(sweep.step_ratios, [f"{ratio:g}" for ratio in sweep.step_ratios])
    _finish_lines(canvas, "step ratio r", lines.values())


def _draw_line(
    canvas: Canvas, place: int, label: str, positions: list[float], line: list[Matchup]
) -> None:
    found = [(x, matchup, matchup.gap) for x, matchup in zip(positions, line, strict=True)]
    points = [(x, matchup, gap) for x, matchup, gap in found if gap is not None]
    canvas.axes.errorbar(
        [x for x, _, _ in points],
        [gap.mean for _, _, gap in points],
        yerr=[gap.half_width or 0.0 for _, _, gap in points],
        color=COLOURS[place % len(COLOURS)],
        marker="o",
        linestyle="-" if place < len(COLOURS) else "--",
        capsize=3,
        label=label,
    )
    for x, matchup, gap in points:
        canvas.say(x, gap.mean, _gap_title(matchup))
        if not matchup.is_finished:
            canvas.axes.plot(x, gap.mean, "o", color="white", markersize=3, zorder=3)


def _finish_lines(canvas: Canvas, over: str, lines: Iterable[Sequence[Matchup]]) -> None:
    canvas.axes.axhline(0, color=FOREGROUND, linewidth=1)
    canvas.axes.set_ylim(*_frame([matchup for line in lines for matchup in line]))
    canvas.axes.set_xlabel(over)
    canvas.axes.set_ylabel(_GAP_AXIS.replace(" (", "\n("))
    legend(canvas.axes)


def draw_lengths(canvas: Canvas, matchup: Matchup, others: Sequence[Matchup]) -> None:
    """Final losses of finished baselines over their length, and TST at its own."""
    ends: dict[int, list[RunResult]] = {}
    for group in matchup.baselines:
        for run in group.runs:
            if run.has_decayed:
                ends.setdefault(run.seed, []).append(run)
    for place, (seed, runs) in enumerate(sorted(ends.items())):
        runs.sort(key=lambda run: run.total_steps)
        x = [float(run.equivalent_tokens[-1]) for run in runs]
        y = [run.final_loss for run in runs]
        label = "baseline, a line a seed" if place == 0 else None
        canvas.axes.plot(x, y, color=COLOURS[0], marker="o", linewidth=1, label=label)
        _say_ends(canvas, runs, f"baseline, seed {seed}")
    for place, one in enumerate([matchup, *others], start=1):
        runs = [pair.tst for pair in one.pairs]
        canvas.axes.plot(
            [run.equivalent_tokens[-1] for run in runs],
            [run.final_loss for run in runs],
            MARKERS[place],
            color=COLOURS[place],
            markersize=6,
            markerfacecolor="none",
            markeredgewidth=1.6,
            label=one.tst.label,
        )
        _say_ends(canvas, runs, one.tst.label)
    canvas.axes.set_xscale("log")
    canvas.axes.set_xlabel("equivalent tokens of the whole run")
    canvas.axes.set_ylabel("final validation loss (nats/token)")
    lengths = sorted({float(run.equivalent_tokens[-1]) for runs in ends.values() for run in runs})
    canvas.axes.set_xticks(lengths, _labels_apart(lengths))
    canvas.axes.xaxis.set_minor_formatter(NullFormatter())
    legend(canvas.axes)


def _labels_apart(lengths: Sequence[float]) -> list[str]:
    """A label for each position of a logarithmic axis; none where it would touch the one before."""
    least = (lengths[-1] / lengths[0]) ** 0.08
    labels: list[str] = []
    last = 0.0
    for length in lengths:
        fits = length >= last * least
        labels.append(quantity(length) if fits else "")
        last = length if fits else last
    return labels


def _say_ends(canvas: Canvas, runs: Iterable[RunResult], label: str) -> None:
    for run in runs:
        spent = float(run.equivalent_tokens[-1])
        canvas.say(
            spent,
            run.final_loss,
            f"{label}: {run.final_loss:.4f} after {quantity(spent)} equivalent tokens",
        )


def draw_offsets(canvas: Canvas, losses: np.ndarray) -> None:
    """Training loss by position in the predicted bag, [bag_size]."""
    positions = range(1, len(losses) + 1)
    canvas.axes.plot(positions, losses, color=COLOURS[1], marker="s")
    for position, loss in zip(positions, losses, strict=True):
        canvas.say(position, loss, f"position {position}: {loss:.4f}")
    canvas.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.axes.set_xlabel("position in the predicted bag (tokens)")
    canvas.axes.set_ylabel("training loss (nats/token)")


def _gap_title(matchup: Matchup) -> str:
    gap = matchup.gap
    lost = len(matchup.tst.diverged)
    diverged = f", {lost} of {len(matchup.tst.runs)} diverged" if lost else ""
    if gap is None:
        return f"{matchup.tst.label}: no pair{diverged}"
    state = f"{seeds(gap.n)}{diverged}{_unfinished(matchup)}"
    return f"{matchup.tst.label}: {gap_text(gap, 4)} nats ({state})"
