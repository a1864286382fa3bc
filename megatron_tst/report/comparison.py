"""Compares groups of TST runs with their baselines, seed by seed. Arithmetic only.

A gap is the baseline's loss minus that of TST: positive where TST is ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from megatron_tst.common.errors import UsageError
from megatron_tst.report.curves import first_reached, value_at
from megatron_tst.report.events import FloatArray
from megatron_tst.report.families import (
    LENGTH_SETTINGS,
    SUPERPOSITION_SETTINGS,
    TUNED_SETTINGS,
    Family,
    Group,
    decay_share,
    differing,
    incomparable,
    superposition_label,
)
from megatron_tst.report.pairs import Pair
from megatron_tst.report.results import RunResult
from megatron_tst.report.runs import Budget
from megatron_tst.report.statistics import Estimate, estimate, estimate_ratio
from megatron_tst.settings.phases import is_superposed

# Where steps of equal runs differ by more, something else had the machine.
LARGEST_TIME_SPREAD = 1.1


@dataclass(frozen=True)
class Length:
    """How long a baseline must train, in units of the TST run, as far as the runs tell.

    Attributes:
        estimate: over seeds; None if a seed lies outside of the lengths that were trained.
        beyond: seeds whose baselines of all lengths ended above the target.
        below: seeds whose baselines of all lengths ended below it.
        seeds: number of seeds.
        longest: length, in units of the TST run, up to which all seeds of ``beyond`` were trained;
            the longest that was trained if there are none.
        shortest: length down to which all seeds of ``below`` were; likewise.
        lengths: number of lengths.
    """

    estimate: Estimate | None
    beyond: int
    below: int
    seeds: int
    longest: float
    shortest: float
    lengths: int


@dataclass(frozen=True, eq=False)
class Matchup:
    """TST runs of one setting against baselines of the same settings, seed by seed.

    Attributes:
        baseline: the baseline of the same length.
        tst: the TST runs.
        pairs: runs that count, by seed.
        baselines: finished baselines that differ in nothing but their length, ``baseline``
            included.
        differences: settings outside of superposition in which the arms differ.
    """

    baseline: Group
    tst: Group
    pairs: tuple[Pair, ...]
    baselines: tuple[Group, ...]
    differences: tuple[str, ...] = ()

    @property
    def gap(self) -> Estimate | None:
        """Mean and interval of the paired differences of the final losses; see :attr:`Pair.gap`."""
        return self.mean_of(lambda pair: pair.gap)

    @property
    def times_are_comparable(self) -> bool:
        """Whether all runs were timed, with one loss on one kind of machine, an arm's alike."""
        runs = [run for pair in self.pairs for run in (pair.baseline, pair.tst)]
        timed = all(np.isfinite(run.seconds).all() for run in runs)
        is_one_machine = len({run.machine for run in runs}) == 1
        is_fair = is_one_machine and len(self.losses) <= 1
        return timed and is_fair and self.time_spread <= LARGEST_TIME_SPREAD

    @property
    def losses(self) -> set[str]:
        """What computed the losses: with more than one, times compare kernels and not methods."""
        runs = [run for pair in self.pairs for run in (pair.baseline, pair.tst)]
        return {loss for run in runs for loss in run.loss_impl.split("+")}

    @property
    def time_spread(self) -> float:
        """How many times as long a step of an arm's slowest run took as one of its fastest."""
        arms = zip(*((pair.baseline, pair.tst) for pair in self.pairs), strict=True)
        times = [[float(run.seconds[-1] / run.steps[-1]) for run in arm] for arm in arms]
        return max((max(arm) / min(arm) for arm in times if min(arm) > 0), default=1.0)

    def mean_of(self, reading: Callable[[Pair], float | None]) -> Estimate | None:
        """Mean over seeds of a reading; None if a seed has none."""
        values = [reading(pair) for pair in self.pairs]
        found = [value for value in values if value is not None]
        return estimate(found) if found and len(found) == len(values) else None

    def speed_up_off_curve(self, budget: Budget) -> Estimate | None:
        """Speed-up read off one curve; None if a seed has none."""
        values = [pair.speed_up_off_curve(budget) for pair in self.pairs]
        found = [value for value in values if value is not None]
        return estimate_ratio(found) if found and len(found) == len(values) else None

    def speed_up_off_ends(self) -> Length | None:
        """Speed-up read off finished baselines of several lengths; None without a second one.

        Each seed's final losses are interpolated linearly over the logarithm of the length. Seeds
        that were trained at one length only are left out.
        """
        pairs = self.pairs_with_lengths
        curves = [self._ends(pair) for pair in pairs]
        if not curves:
            return None
        found, beyond, below = [], [], []
        for pair, (lengths, losses) in zip(pairs, curves, strict=True):
            target = pair.tst.final_loss
            if losses[0] < target:
                below.append(lengths[0])
                continue
            reached = first_reached(np.log(lengths), losses, target)
            if reached is None:
                beyond.append(lengths[-1])
            else:
                found.append(float(np.exp(reached)))
        trained = [length for lengths, _ in curves for length in lengths]
        is_whole = len(found) == len(curves)
        return Length(
            estimate=estimate_ratio(found) if is_whole else None,
            beyond=len(beyond),
            below=len(below),
            seeds=len(curves),
            longest=min(beyond, default=max(trained)),
            shortest=max(below, default=min(trained)),
            lengths=len(set(trained)),
        )

    def equal_data_off_ends(self) -> Estimate | None:
        """Gap to a finished baseline that read as much text as TST.

        Interpolated between baselines of neighbouring lengths. Seeds whose baselines were not
        trained as long are left out; None if all are.
        """
        losses = [(self.loss_at_equal_data(pair), pair.tst.final_loss) for pair in self.pairs]
        gaps = [loss - final for loss, final in losses if loss is not None]
        return estimate(gaps) if gaps else None

    def loss_at_equal_data(self, pair: Pair) -> float | None:
        """Final loss of a seed's baseline that read as much text; None if none was so long."""
        length = pair.tst.data_tokens[-1] / pair.tst.equivalent_tokens[-1]
        return _loss_at_length(*self._ends(pair), length)

    @property
    def pairs_with_lengths(self) -> list[Pair]:
        """Those of seeds whose baselines were trained at several lengths, to the end of a decay."""
        return [pair for pair in self.pairs if len(self._ends(pair)[0]) > 1]

    def _ends(self, pair: Pair) -> tuple[FloatArray, FloatArray]:
        """Lengths of a seed's baselines, in units of the TST run, ascending; their final losses."""
        total = pair.tst.equivalent_tokens[-1]
        ends = sorted(
            (float(run.equivalent_tokens[-1] / total), run.final_loss)
            for group in self.baselines
            for run in group.runs
            if run.has_decayed and pair.tst.has_decayed and run.seed == pair.baseline.seed
        )
        return np.array([length for length, _ in ends]), np.array([loss for _, loss in ends])


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
        """Matchups with a pair that counts: against the best baseline of their length first.

        Among these, and among the others, the largest mean gap comes first: a gap to a baseline
        whose learning rate does not suit it says little.
        """
        found = [(matchup.gap.mean, matchup) for matchup in self.matchups if matchup.gap]

        def order(one: tuple[float, Matchup]) -> tuple[bool, float]:
            gap, matchup = one
            return not self.has_best_baseline(matchup), -gap

        return [matchup for _, matchup in sorted(found, key=order)]

    @property
    def best(self) -> Matchup | None:
        """What the verdict is about: of those against a best baseline, and then of those with the
        most seeds, the first by rank."""

        def order(matchup: Matchup) -> tuple[bool, int]:
            return self.has_best_baseline(matchup), len(matchup.pairs)

        return max(self.ranked, key=order, default=None)

    def has_best_baseline(self, matchup: Matchup) -> bool:
        """Whether no baseline of other optimizer settings and of as many seeds ends lower."""
        return not self.lower_baselines(matchup, len(matchup.baseline.counted))

    def lower_baselines(self, matchup: Matchup, fewest: int = 1) -> list[Group]:
        """Baselines of at least ``fewest`` seeds that end lower than its own, in the mean.

        They differ from it in settings of the optimizer alone; TST need not have been trained so.
        """
        own, wanted = matchup.baseline, _key(matchup.baseline, TUNED_SETTINGS)
        return [
            group
            for group in self.groups
            if group.is_baseline
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


def _loss_at_length(lengths: FloatArray, losses: FloatArray, length: float) -> float | None:
    if not lengths.size:
        return None
    nearest = int(np.argmin(np.abs(lengths - length)))
    # A schedule rounds its switch to whole steps.
    if abs(lengths[nearest] - length) <= 0.005 * length:
        return float(losses[nearest])
    return value_at(np.log(lengths), losses, log(length))


def _key(group: Group, left_out: Sequence[str]) -> frozenset[tuple[str, object]]:
    ignored = {*SUPERPOSITION_SETTINGS, *left_out}
    return frozenset(item for item in group.settings.items() if item[0] not in ignored)
