"""What superposition gained over the baseline, by bag size and step ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_tst.planning.published import (
    LossGrid,
    grid_600m,
    published_grids,
    published_tst_runs,
)

# Of step ratios: published ones are quotients of step counts.
_ROUNDING = 0.01


@dataclass(frozen=True, eq=False)
class GainTable:
    """What superposition gained over the baseline at one length of run.

    Attributes:
        equivalent_tokens: length of the run.
        grid: of the model itself, or of the smaller one whose shape it borrows.
        scale: by which the gains of the grid are multiplied.
        stretch: bag sizes of the grid, counted from 1, for each one of the model.
        trained: the one setting (s, r) that was trained, where the shape is borrowed.
    """

    equivalent_tokens: int
    grid: LossGrid
    scale: float = 1.0
    stretch: float = 1.0
    trained: tuple[int, float] | None = None

    def gain(self, bag_size: int, step_ratio: float) -> float:
        """Baseline loss minus TST loss; at the largest bag size of the grid for any larger one."""
        last = self.grid.largest_bag_size - 1
        position = min((bag_size - 1) * self.stretch, float(last))
        left = min(int(position), last - 1)
        share = position - left
        losses = (1 - share) * self.grid.losses[:, left] + share * self.grid.losses[:, left + 1]
        loss = float(np.interp(step_ratio, self.grid.ratios, losses))
        return self.scale * (self.grid.baseline_loss - loss)

    def outside(self, bag_size: int, step_ratio: float) -> tuple[str, ...]:
        """In what way a setting lies outside of what was trained."""
        if self.trained is None:
            if bag_size <= self.grid.largest_bag_size:
                return ()
            return (f"bag sizes above {self.grid.largest_bag_size} were not trained",)
        if bag_size == self.trained[0] and abs(step_ratio - self.trained[1]) < _ROUNDING:
            return ()
        return (
            f"at this size only s={self.trained[0]}, r={self.trained[1]:.2g} was trained: the "
            "shape of the 600M grid is scaled to it",
        )


def own_tables(name: str) -> tuple[GainTable, ...]:
    """The grids of a model, by length of run; none for the models without one."""
    return tuple(GainTable(grid.equivalent_tokens, grid) for grid in published_grids(name))


def borrowed_table(name: str, gain: float) -> GainTable:
    """The 600M grid, scaled to the gain of the one TST run of a larger model.

    The best bag size grows with the model. Where it used a larger one than the grid has its minimum
    at, the bag sizes are stretched so that the minimum lies there.

    Args:
        name: of the model.
        gain: baseline loss minus TST loss of that run, in nats a token.
    """
    run, grid = published_tst_runs(name)[0], grid_600m()
    ratio = run.tst_steps / run.total_steps
    stretch = min(1.0, (_best_bag_size(grid) - 1) / (run.bag_size - 1))
    shape = GainTable(run.equivalent_tokens, grid, stretch=stretch)
    return GainTable(
        run.equivalent_tokens,
        grid,
        scale=gain / shape.gain(run.bag_size, ratio),
        stretch=stretch,
        trained=(run.bag_size, ratio),
    )


def _best_bag_size(grid: LossGrid) -> int:
    ratio = int(np.searchsorted(grid.ratios, 0.3))
    return int(np.argmin(grid.losses[ratio])) + 1


@cache
def gain_decay() -> float:
    """Power of the length of a run with which the gain falls: at 270M, s=6, r=0.3."""
    short, long = own_tables("270M")
    ratio = long.equivalent_tokens / short.equivalent_tokens
    return math.log(short.gain(6, 0.3) / long.gain(6, 0.3)) / math.log(ratio)
