"""Finds the baselines of groups of TST runs, and ranks what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tst.common.errors import UsageError
from megatron_tst.report.compared_settings import (
    LENGTH_SETTINGS,
    SUPERPOSITION_SETTINGS,
    TUNED_SETTINGS,
    decay_share,
    differing,
)
from megatron_tst.report.families import Family, Group, incomparable
from megatron_tst.report.labels import superposition_label
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.pairs import Pair
from megatron_tst.report.results import RunResult
from megatron_tst.settings.phases import is_superposed


@dataclass(frozen=True, eq=False)
class Study:
    """What is said about runs whose losses can be compared.

    Attributes:
        name: heading.
        groups: all groups of runs, compared or not.
        matchups: each TST group that has a baseline.
        alone: TST groups without a baseline of the same settings.
    """

    name: str
    groups: tuple[Group, ...]
    matchups: tuple[Matchup, ...]
    alone: tuple[Group, ...] = ()

    @property
    def ranked(self) -> list[Matchup]:
        """Matchups with a pair that counts: finished first, then against the best baseline first.

        The best of their length. Among these, and among the others, the largest mean gap comes
        first: a gap to a baseline whose learning rate does not suit it says little.
        """
        found = [(matchup.gap.mean, matchup) for matchup in self.matchups if matchup.gap]

        def order(one: tuple[float, Matchup]) -> tuple[bool, bool, float]:
            gap, matchup = one
            return not matchup.is_finished, not self.has_best_baseline(matchup), -gap

        return [matchup for _, matchup in sorted(found, key=order)]

    @property
    def best(self) -> Matchup | None:
        """What the verdict is about: of those that are finished, then of those against a best
        baseline, and then of those with the most seeds, the first by rank.

        Where no gap can be read, one of those that have pairs.
        """
        found = self.ranked or [one for one in self.matchups if one.pairs]

        def order(matchup: Matchup) -> tuple[bool, bool, int]:
            is_best = self.has_best_baseline(matchup)
            return matchup.is_finished, is_best, len(matchup.pairs)

        return max(found, key=order, default=None)

    @property
    def picked_from(self) -> list[Matchup]:
        """Of those ranked what :attr:`best` is chosen from: the finished ones, if there are any."""
        return [one for one in self.ranked if one.is_finished] or self.ranked

    def has_best_baseline(self, matchup: Matchup) -> bool:
        """Whether no baseline of other optimizer settings and of as many seeds ends lower."""
        return not self.lower_baselines(matchup, len(matchup.baseline.counted))

    def lower_baselines(self, matchup: Matchup, fewest: int = 1) -> list[Group]:
        """Baselines of at least ``fewest`` seeds that end lower than its own, in the mean.

        They differ from it in settings of the optimizer alone; TST need not have been trained so.
        Those of finished runs: the last losses of others are of any step.
        """
        if not matchup.baseline.is_finished:
            return []
        own, wanted = matchup.baseline, _key(matchup.baseline, TUNED_SETTINGS)
        return [
            group
            for group in self.groups
            if group.is_baseline
            and group.is_finished
            and len(group.counted) >= fewest
            and _key(group, TUNED_SETTINGS) == wanted
            and mean_end(group) < mean_end(own)
        ]


def mean_end(group: Group) -> float:
    """Mean final loss of the runs that count, nats a token."""
    return float(np.mean([run.final_loss for run in group.counted]))


def study_of(family: Family) -> Study:
    """Compares what can be compared in a family."""
    matchups, alone = matchups_of(family)
    return Study(family.name, family.groups, tuple(matchups), tuple(alone))


def study_of_two(baseline: RunResult, tst: RunResult) -> Study:
    """Compares two runs that the user named; see :func:`match_two`."""
    matchup = match_two(baseline, tst)
    return Study("Token superposition", (matchup.baseline, matchup.tst), (matchup,))


def matchups_of(family: Family) -> tuple[list[Matchup], list[Group]]:
    """Pairs each TST group with its baseline.

    Returns:
        The matchups, and the TST groups without a baseline of the same settings.
    """
    baselines = {_key(group, ()): group for group in family.groups if group.is_baseline}
    found, alone = [], []
    for group in family.groups:
        if group.is_baseline:
            continue
        baseline = baselines.get(_key(group, ()))
        if baseline is None:
            alone.append(group)
            continue
        by_seed = {run.seed: run for run in baseline.counted}
        pairs = [Pair(by_seed[run.seed], run) for run in group.counted if run.seed in by_seed]
        found.append(
            Matchup(baseline, group, tuple(pairs), of_all_lengths(group, list(baselines.values())))
        )
    return found, alone


def match_two(baseline: RunResult, tst: RunResult) -> Matchup:
    """Pairs two runs that the user named, whatever their seeds and settings.

    Raises:
        UsageError: the arms are swapped, or their losses cannot be compared.
    """
    if is_superposed(baseline.settings):
        raise UsageError(
            f"--baseline {baseline.name} is a TST run (bag size {baseline.bag_size}): "
            "swap the folders, or pass an ordinary run."
        )
    if not is_superposed(tst.settings):
        raise UsageError(
            f"--tst {tst.name} is a run without superposition (bag size 1): "
            "swap the folders, or pass a run with --tst-bag-size of 2 or more."
        )
    if apart := incomparable(baseline, tst):
        raise UsageError(
            f"the losses of {baseline.name} and {tst.name} cannot be compared: they differ in "
            f"{', '.join(apart)}. Pass runs of one model, one tokenizer and one validation set."
        )
    groups = (
        Group("baseline", baseline.settings, (baseline,)),
        Group(f"TST ({superposition_label(tst.settings)})", tst.settings, (tst,)),
    )
    pairs = (Pair(baseline, tst),) if all(group.counted for group in groups) else ()
    expected = (*SUPERPOSITION_SETTINGS, "parameters")
    differences = [
        name for name in differing([baseline.settings, tst.settings]) if name not in expected
    ]
    return Matchup(groups[0], groups[1], pairs, (groups[0],), tuple(differences))


def of_all_lengths(group: Group, baselines: Sequence[Group]) -> tuple[Group, ...]:
    """The baselines that differ from a group in their length and in superposition alone.

    One of each length. Their decay is the same share of them; a warm-up may be as long or scaled.
    """
    wanted, same = _key(group, LENGTH_SETTINGS), _key(group, ())
    found = [
        one
        for one in baselines
        if _key(one, LENGTH_SETTINGS) == wanted
        and _decay_alike(one, group)
        and (one.total_steps != group.total_steps or _key(one, ()) == same)
    ]
    nearest = sorted(found, key=lambda one: _warmup_apart(one, group), reverse=True)
    by_length = {one.total_steps: one for one in nearest}
    return tuple(one for one in found if by_length[one.total_steps] is one)


def _decay_alike(one: Group, other: Group) -> bool:
    """Whether two decays are one share of their runs, up to the rounding to whole steps."""
    shares = [decay_share(group.settings) for group in (one, other)]
    if shares[0] is None or shares[1] is None:
        return shares[0] == shares[1]
    return abs(shares[0] - shares[1]) <= 1 / min(one.total_steps, other.total_steps)


def _warmup_apart(one: Group, other: Group) -> float:
    """How far a warm-up is from that of another group, in steps or scaled, whichever is nearer."""
    steps, others = (float(group.settings.get("lr_warmup_iters", 0)) for group in (one, other))
    return min(abs(steps - others), abs(steps - others * one.total_steps / other.total_steps))


def _key(group: Group, left_out: Sequence[str]) -> frozenset[tuple[str, object]]:
    ignored = {*SUPERPOSITION_SETTINGS, *left_out}
    return frozenset(item for item in group.settings.items() if item[0] not in ignored)
