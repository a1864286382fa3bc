"""Reads TST runs of one setting against their baselines, seed by seed. Arithmetic only.

A gap is the baseline's loss minus that of TST: positive where TST is ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import numpy as np

from megatron_tst.report.curves import first_reached, value_at
from megatron_tst.report.events import FloatArray
from megatron_tst.report.families import Group
from megatron_tst.report.pairs import Pair
from megatron_tst.report.runs import Budget
from megatron_tst.report.statistics import Estimate, estimate, estimate_ratio

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
    def is_finished(self) -> bool:
        """Whether its pairs reached their last step: a gap before it says less than one there."""
        runs = [run for pair in self.pairs for run in (pair.baseline, pair.tst)]
        return bool(runs) and all(run.status == "finished" for run in runs)

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


def _loss_at_length(lengths: FloatArray, losses: FloatArray, length: float) -> float | None:
    if not lengths.size:
        return None
    nearest = int(np.argmin(np.abs(lengths - length)))
    # A schedule rounds its switch to whole steps.
    if abs(lengths[nearest] - length) <= 0.005 * length:
        return float(losses[nearest])
    return value_at(np.log(lengths), losses, log(length))
