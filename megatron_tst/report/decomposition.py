"""Splits what TST gains on a longer baseline into the decay of the learning rate and the bags.

A run that ends has decayed its learning rate; a longer baseline, read at the same step, has not,
and loses to any run that ends there. The control is a baseline of the length of TST with its own
complete decay: what it gains on the longer one is the decay, what TST gains on it are the bags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tst.report.comparison import Study, of_all_lengths
from megatron_tst.report.families import Group
from megatron_tst.report.matchup import Matchup
from megatron_tst.report.pairs import Pair
from megatron_tst.report.readings import decay_begin, loss_reached
from megatron_tst.report.results import RunResult
from megatron_tst.report.statistics import Estimate, estimate, estimate_ratio

# How far from the last step of TST a longer baseline may have been evaluated: before its decay the
# loss falls so slowly that 2% of the steps move it by less than seeds do.
_NEAR = 0.02
# Schedules whose learning rate falls from the warm-up on.
_DECAYS_THROUGHOUT = ("cosine", "linear")


@dataclass(frozen=True)
class SplitPair:
    """One seed: TST, its control, and the loss of the longer baseline at the same step.

    Attributes:
        pair: the control and TST.
        longer: the run of the longer baseline.
        loss: its next-token loss at the last step of TST, nats a token.
        step: of the validation that is read.
    """

    pair: Pair
    longer: RunResult
    loss: float
    step: int

    @property
    def total(self) -> float:
        """What TST gains on the longer baseline, nats a token."""
        return self.loss - self.pair.tst.final_loss

    @property
    def decay(self) -> float:
        """What the control gains on it: the decay, and nothing else."""
        return self.loss - self.pair.baseline.final_loss

    @property
    def bags(self) -> float:
        """What TST gains on the control."""
        return self.pair.baseline.final_loss - self.pair.tst.final_loss

    def steps_to(self, loss: float) -> float | None:
        """Steps of the longer baseline to a loss, in lengths of TST.

        None if it never has it, or was evaluated too seldom around it to tell.
        """
        length = self.pair.tst.total_steps
        steps = self.longer.steps.astype(np.float64)
        reached = loss_reached(self.longer, steps, loss, length)
        return None if reached is None or reached.at is None else reached.at / length


@dataclass(frozen=True, eq=False)
class Gain:
    """What a TST setting gains on a longer baseline, in parts.

    Attributes:
        tst: the TST runs.
        longer: the baseline that was planned for more steps.
        pairs: a seed each; empty where the gain cannot be split.
        not_separable: why it cannot; empty where it can.
    """

    tst: Group
    longer: Group
    pairs: tuple[SplitPair, ...]
    not_separable: str = ""

    @property
    def total(self) -> Estimate:
        """On the longer baseline at the last step of TST, nats a token."""
        return estimate([one.total for one in self.pairs])

    @property
    def decay(self) -> Estimate:
        """The part that a finished baseline of the same length has too."""
        return estimate([one.decay for one in self.pairs])

    @property
    def bags(self) -> Estimate:
        """The rest: the gap at equal FLOPs."""
        return estimate([one.bags for one in self.pairs])

    @property
    def decay_share(self) -> float | None:
        """The decay's share of the gain; None where the two do not add up to a certain gain."""
        total = self.total
        is_there = total.mean > 0 and (total.n == 1 or total.excludes(0.0))
        adds_up = self.decay.mean >= 0 and self.bags.mean >= 0
        return self.decay.mean / total.mean if is_there and adds_up else None

    @property
    def apparent_speed_up(self) -> Estimate | None:
        """Steps of the longer baseline to the final loss of TST, in lengths of TST.

        Read off a baseline that has not ended: it holds the decay as well.
        """
        return self._speed_up([one.pair.tst.final_loss for one in self.pairs])

    @property
    def apparent_speed_up_of_control(self) -> Estimate | None:
        """The same reading of the control: what the decay alone makes of it."""
        return self._speed_up([one.pair.baseline.final_loss for one in self.pairs])

    def _speed_up(self, losses: Sequence[float]) -> Estimate | None:
        found = [one.steps_to(loss) for one, loss in zip(self.pairs, losses, strict=True)]
        reached = [steps for steps in found if steps is not None]
        return estimate_ratio(reached) if reached and len(reached) == len(found) else None


def gains_of(study: Study) -> list[Gain]:
    """Every TST setting against every longer baseline that was evaluated where TST ends.

    The settings come as the study ranks them, each with the longest baseline first.
    """
    baselines = [group for group in study.groups if group.is_baseline]
    order = {matchup.tst: place for place, matchup in enumerate(study.ranked)}
    matchups = sorted(study.matchups, key=lambda matchup: order.get(matchup.tst, len(order)))
    found = [
        gain
        for matchup in matchups
        for longer in _longer(matchup.tst, baselines)
        if (gain := _gain(matchup, longer)) is not None
    ]
    for tst in study.alone:
        found += [_without_control(tst, longer) for longer in _longer(tst, baselines)]
    return found


def _without_control(tst: Group, longer: Group) -> Gain:
    reason = f"no finished baseline of {tst.total_steps} steps has the same settings"
    return Gain(tst, longer, (), reason)


def _longer(tst: Group, baselines: Sequence[Group]) -> list[Group]:
    """Those planned for more steps that were evaluated where TST ends, the longest first."""
    step = tst.total_steps
    found = [
        group
        for group in of_all_lengths(tst, baselines)
        if group.total_steps > step and any(_validation_near(run, step) for run in group.runs)
    ]
    return sorted(found, key=lambda group: -group.total_steps)


def _gain(matchup: Matchup, longer: Group) -> Gain | None:
    """None if no seed has all three runs, though some have a control."""
    if matchup.baseline.total_steps != matchup.tst.total_steps:
        # Of two runs that the user named; the longer baseline is no control of itself.
        return _without_control(matchup.tst, longer)
    by_seed = {run.seed: run for run in longer.runs if run.status != "diverged"}
    found = []
    for pair in matchup.pairs:
        run = by_seed.get(pair.tst.seed)
        read = None if run is None else _validation_near(run, pair.tst.total_steps)
        if run is not None and read is not None:
            found.append(SplitPair(pair, run, loss=read[1], step=read[0]))
    if not matchup.pairs:
        return _without_control(matchup.tst, longer)
    if not found:
        return None
    ends = (run for one in found for run in (one.pair.baseline, one.pair.tst))
    cut = [run.name for run in ends if not run.has_decayed]
    if cut:
        return Gain(matchup.tst, longer, (), f"cut off before the end of a decay: {', '.join(cut)}")
    decaying = [one.longer.name for one in found if not _is_before_decay(one.longer, one.step)]
    if decaying:
        return Gain(matchup.tst, longer, (), f"read within its own decay: {', '.join(decaying)}")
    return Gain(matchup.tst, longer, tuple(found))


def _is_before_decay(run: RunResult, step: int) -> bool:
    """Whether a baseline is read at its full learning rate, as far as its settings tell."""
    if run.settings.get("lr_decay_style") in _DECAYS_THROUGHOUT:
        return False
    begin = decay_begin(run)
    return begin is None or step <= begin


def _validation_near(run: RunResult, step: int) -> tuple[int, float] | None:
    """Step and loss of the validation nearest to a step; None if that is not near."""
    if not run.steps.size:
        return None
    nearest = int(np.argmin(np.abs(run.steps - step)))
    is_near = abs(int(run.steps[nearest]) - step) <= _NEAR * step
    return (int(run.steps[nearest]), float(run.validation_loss[nearest])) if is_near else None
