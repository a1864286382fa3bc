"""Where both arms can be read though one was not evaluated near the end of the other."""

from __future__ import annotations

from functools import reduce

import numpy as np

from megatron_tst.report.matchup import Matchup
from megatron_tst.report.results import RunResult


def unread(matchup: Matchup) -> list[tuple[RunResult, int]]:
    """The runs that were not evaluated near the step where the other of their pair ends.

    Returns:
        Each with that step; empty where all gaps can be read.
    """
    found = []
    for pair in matchup.pairs:
        reading = pair.equal_budget("equivalent tokens")
        arms = ((pair.baseline, reading.baseline_loss), (pair.tst, reading.tst_loss))
        for run, loss in arms:
            if loss is None:
                step = np.interp(reading.amount, run.spent("equivalent tokens"), run.steps)
                found.append((run, round(float(step))))
    return found


def last_common_step(matchup: Matchup) -> int | None:
    """The last step at which all runs of all pairs were evaluated; None if there is none."""
    runs = [run for pair in matchup.pairs for run in (pair.baseline, pair.tst)]
    common = reduce(np.intersect1d, [run.steps for run in runs])
    return int(common[-1]) if common.size else None


def loss_of(run: RunResult, step: int) -> float:
    """Validation loss at a step at which a run was evaluated, nats a token."""
    return float(run.validation_loss[int(np.searchsorted(run.steps, step))])
