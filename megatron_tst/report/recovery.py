"""When TST is back under its baseline after the switch, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tst.common.units import DASH
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.pairs import Pair


@dataclass(frozen=True)
class Recovery:
    """What the seeds of a setting say.

    Attributes:
        pairs: number of seeds.
        seeds: those whose two runs were evaluated so that they can be read at one step behind the
            switch.
        recovered: those whose validation loss comes under the baseline's within the run, and stays.
        steps: from the switch until then, the mean over these; None if there are none, or one was
            evaluated too seldom to tell.
        earliest: steps from the switch until which none is known to be back.
        latest: steps until which all of these are.
    """

    pairs: int
    seeds: int
    recovered: int
    steps: float | None
    earliest: float
    latest: float

    @property
    def text(self) -> str:
        """In a cell of a table: steps, or within which, and of how many seeds if not of all."""
        if not self.recovered:
            return DASH
        steps = f"{self.earliest:.0f} to {self.latest:.0f}"
        if self.steps is not None:
            steps = f"{self.steps:.0f}"
        some = "" if self.recovered == self.pairs else f" in {self.recovered} of {self.seeds}"
        return steps + some


def recovery_of(matchup: Matchup) -> Recovery:
    """Reads the crossing of every pair of a matchup."""
    return recovery_over(matchup.pairs)


def recovery_over(pairs: Sequence[Pair]) -> Recovery:
    """Reads the crossing of every pair, a seed each."""
    switches = [pair.switch() for pair in pairs]
    found = [one.crossing for one in switches if one.crossing is not None]
    told = [one.at for one in found if one.at is not None]
    is_told = bool(found) and len(told) == len(found)
    return Recovery(
        pairs=len(switches),
        seeds=sum(one.is_read for one in switches),
        recovered=len(found),
        steps=sum(told) / len(told) if is_told else None,
        earliest=min((one.low for one in found), default=0.0),
        latest=max((one.high for one in found), default=0.0),
    )
