"""Finds the steps at which the training loss jumps up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_tst.report.events import Series
from megatron_tst.settings.phases import phase_at
from megatron_tst.settings.schedule import SuperpositionSchedule

_WINDOW = 50
# Fewer logged steps before a value do not tell what is usual.
_FEWEST = 8
# Standard deviations above the median of the steps before.
_THRESHOLD = 6.0
_DEVIATIONS_PER_MAD = 1.4826


@dataclass(frozen=True)
class Spike:
    """A logged loss far above those before it.

    Attributes:
        step: at which it was logged, counted from 1.
        first_step: the first step that the logged value is the mean of.
        loss: the value.
        usual: median of the logged losses before it.
    """

    step: int
    first_step: int
    loss: float
    usual: float

    @property
    def height(self) -> float:
        """Nats above what was usual."""
        return self.loss - self.usual


def find_spikes(losses: Series, schedule: SuperpositionSchedule) -> list[Spike]:
    """Looks for losses more than six robust deviations above the median of the fifty before.

    A loss is compared with those of its phase and bag size only: the switch is no spike. Deviations
    are median absolute ones, so that one spike does not hide the next.

    Args:
        losses: logged training loss.
        schedule: of the run.

    Returns:
        The spikes, the highest first. Of a loss that stays up, those until it has become usual.
    """
    found = []
    steps = [int(step) - 1 for step in losses.steps]
    phases = np.array(
        [(phase_at(schedule.phases, step).first_step, schedule.bag_size_at(step)) for step in steps]
    ).reshape(-1, 2)
    for index, (step, loss) in enumerate(zip(losses.steps, losses.values, strict=True)):
        window = slice(max(index - _WINDOW, 0), index)
        before = losses.values[window][(phases[window] == phases[index]).all(axis=1)]
        before = before[np.isfinite(before)]
        if len(before) < _FEWEST:
            continue
        usual = float(np.median(before))
        deviation = _DEVIATIONS_PER_MAD * float(np.median(np.abs(before - usual)))
        if not loss - usual <= _THRESHOLD * deviation:
            first = int(losses.steps[index - 1]) + 1
            found.append(Spike(int(step), first, float(loss), usual))
    return sorted(found, key=lambda spike: -np.nan_to_num(spike.height, nan=np.inf))
