"""What a run gains on a longer baseline, drawn in its parts."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tst.report.curve_plots import COLOURS, legend
from megatron_tst.report.decomposition import Gain
from megatron_tst.report.drawing import FOREGROUND, Canvas
from megatron_tst.report.units import gap_text


def draw_gain_parts(canvas: Canvas, gains: Sequence[Gain]) -> None:
    """A bar for each gain: first the decay, then the bags, to the right where they add to it.

    Where bags cost more than they bring, their part goes back from the end of the first.
    """
    rows = list(enumerate(reversed(gains)))
    for row, gain in rows:
        decay, bags = gain.decay, gain.bags
        end = decay.mean + bags.mean
        canvas.axes.barh(
            row,
            decay.mean,
            height=0.55,
            color=COLOURS[0],
            alpha=0.55,
            label="decay" if row == 0 else None,
        )
        canvas.axes.plot(
            [decay.mean, end],
            [row, row],
            color=COLOURS[1],
            linewidth=5,
            solid_capstyle="butt",
            label="bags" if row == 0 else None,
        )
        if bags.half_width is not None:
            reach = [end - bags.half_width, end + bags.half_width]
            canvas.axes.plot(reach, [row, row], color=FOREGROUND, linewidth=1)
        canvas.say(decay.mean, row, f"{gain.tst.label}: decay {gap_text(decay)} nats")
        canvas.say(end, row, f"{gain.tst.label}: bags {gap_text(bags)} nats")
    canvas.axes.axvline(0, color=FOREGROUND, linewidth=1)
    several = len({gain.longer.label for gain in gains}) > 1
    labels = [
        f"{gain.tst.label} / {gain.longer.label}" if several else gain.tst.label for _, gain in rows
    ]
    canvas.axes.set_yticks([row for row, _ in rows], labels)
    canvas.axes.set_ylim(-0.7, len(rows) - 0.3)
    canvas.axes.set_xlabel("gain on the longer baseline (nats/token)")
    legend(canvas.axes)
