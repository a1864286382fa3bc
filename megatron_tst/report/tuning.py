"""Both arms at the best of the optimizer settings that they were trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tst.report.compared_settings import TUNED_SETTINGS
from megatron_tst.report.comparison import Study, mean_end
from megatron_tst.report.families import Group
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.statistics import FEWEST_SEEDS, Estimate, estimate


@dataclass(frozen=True, eq=False)
class Tuned:
    """The best of each arm.

    Attributes:
        baseline: of the length of TST.
        tst: of one setting of superposition.
        gap: final loss of the baseline minus that of TST, seed by seed, nats a token.
    """

    baseline: Group
    tst: Group
    gap: Estimate


def tuned_arms(study: Study, matchup: Matchup) -> Tuned | None:
    """Each arm of a matchup at its best learning rate and other settings of the optimizer.

    Settings of fewer than three seeds count only where none has more, and unfinished runs never:
    their last losses are of any step.

    Returns:
        None where the arms of the matchup are these, or these have no seed in common; where all
        runs of an arm are unfinished.
    """
    baseline, tst = (_best(study.groups, arm) for arm in (matchup.baseline, matchup.tst))
    if baseline is None or tst is None or (baseline, tst) == (matchup.baseline, matchup.tst):
        return None
    losses = {run.seed: run.final_loss for run in baseline.counted}
    gaps = [losses[run.seed] - run.final_loss for run in tst.counted if run.seed in losses]
    return Tuned(baseline, tst, estimate(gaps)) if gaps else None


def _differs_in_tuning(group: Group, other: Group) -> bool:
    """Whether two groups are equal but for settings of the optimizer."""
    settings = [
        {name: value for name, value in one.settings.items() if name not in TUNED_SETTINGS}
        for one in (group, other)
    ]
    return settings[0] == settings[1]


def _best(groups: Sequence[Group], arm: Group) -> Group | None:
    """The group that ends lowest of those that differ from an arm in their tuning, or are it."""
    alike = [group for group in groups if group is arm or _differs_in_tuning(group, arm)]
    found = [group for group in alike if group.is_finished]
    enough = min(FEWEST_SEEDS, max((len(group.counted) for group in found), default=0))
    enough_seeds = (group for group in found if len(group.counted) >= enough)
    return min(enough_seeds, key=mean_end, default=None)
