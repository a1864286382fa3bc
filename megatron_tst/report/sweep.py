"""Arranges matchups that differ in bag size and step ratio alone as a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tst.report.labels import weighting_label
from megatron_tst.report.matchup import Matchup

_SWEPT = ("bag_size", "step_ratio", "switch_step", "target_weighting", "power_law_exponent")


@dataclass(frozen=True, eq=False)
class Sweep:
    """Matchups over bag size s and step ratio r.

    Attributes:
        cells: by (s, r).
    """

    cells: dict[tuple[int, float], Matchup]

    @property
    def bag_sizes(self) -> list[int]:
        """Ascending."""
        return sorted({size for size, _ in self.cells})

    @property
    def step_ratios(self) -> list[float]:
        """Ascending."""
        return sorted({ratio for _, ratio in self.cells})

    def over_bag_sizes(self) -> dict[float, list[Matchup]]:
        """For each r with several s: its matchups by s."""
        return {
            ratio: line
            for ratio in self.step_ratios
            if len(line := [m for s in self.bag_sizes if (m := self.cells.get((s, ratio)))]) > 1
        }

    def over_step_ratios(self) -> dict[int, list[Matchup]]:
        """For each s with several r: its matchups by r."""
        return {
            size: line
            for size in self.bag_sizes
            if len(line := [m for r in self.step_ratios if (m := self.cells.get((size, r)))]) > 1
        }


def cell_of(matchup: Matchup) -> tuple[int, float]:
    """Bag size and step ratio."""
    settings = matchup.tst.settings
    return int(settings["bag_size"]), round(float(settings["step_ratio"]), 4)


def largest_sweep(matchups: Sequence[Matchup]) -> Sweep | None:
    """The largest grid of matchups that are otherwise equal; None if there is no second cell.

    Target weights count as equal where they are the default of the bag size.
    """
    by_rest: dict[object, dict[tuple[int, float], Matchup]] = {}
    for matchup in matchups:
        settings = matchup.tst.settings
        rest = frozenset(item for item in settings.items() if item[0] not in _SWEPT)
        by_rest.setdefault((rest, weighting_label(settings)), {})[cell_of(matchup)] = matchup
    cells = max(by_rest.values(), key=len, default={})
    return Sweep(cells) if len(cells) > 1 else None
