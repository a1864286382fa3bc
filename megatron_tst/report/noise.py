"""What chance does to a final loss, from all settings of a study at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from megatron_tst.report.families import Group
from megatron_tst.report.statistics import Estimate, t_quantile


@dataclass(frozen=True)
class Noise:
    """Spread of the final loss of one run.

    A few seeds say little about their own spread, and the interval of a single gap is wide for
    that reason; all settings of a study together say more.

    Attributes:
        deviation: standard deviation, nats a token, without the effects of setting and seed.
        degrees: degrees of freedom of ``deviation``.
    """

    deviation: float
    degrees: int

    def interval(self, gap: Estimate) -> Estimate:
        """A mean of paired differences with the 95% interval that this noise gives it."""
        error = self.deviation * sqrt(2 / gap.n)
        reach = t_quantile(self.degrees) * error
        return Estimate(gap.mean, gap.mean - reach, gap.mean + reach, error, gap.n)


def noise_of(groups: Sequence[Group]) -> Noise | None:
    """Fits final loss = setting + seed + noise to the finished runs, by least squares.

    The noise is taken to be equally large in every setting.

    Returns:
        None if the runs leave no degree of freedom, or do not differ at all.
    """
    runs = [
        (place, run.seed, run.final_loss)
        for place, group in enumerate(groups)
        for run in group.runs
        if run.status == "finished"
    ]
    if not runs:
        return None
    settings = np.array([place for place, _, _ in runs])
    seeds = np.array([seed for _, seed, _ in runs])
    losses = np.array([loss for _, _, loss in runs])
    design = np.hstack(
        [settings[:, None] == np.unique(settings), seeds[:, None] == np.unique(seeds)]
    )
    fitted, _, rank, _ = np.linalg.lstsq(design.astype(float), losses, rcond=None)
    degrees = len(runs) - int(rank)
    if degrees < 1:
        return None
    squares = float(np.sum((losses - design @ fitted) ** 2))
    return Noise(sqrt(squares / degrees), degrees) if squares > 0 else None
