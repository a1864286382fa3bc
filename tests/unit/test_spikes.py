"""Spikes in a logged loss."""

from __future__ import annotations

import numpy as np

from megatron_tst import BatchSizes, SuperpositionConfig, SuperpositionSchedule
from megatron_tst.report.events import Series
from megatron_tst.report.spikes import find_spikes

SCHEDULE = SuperpositionSchedule(
    SuperpositionConfig(bag_size=4, steps=600), 1000, BatchSizes.constant(8), 32
)


def test_spikes_are_found_and_the_switch_is_none() -> None:
    steps = np.arange(10, 1001, 10)
    noise = np.random.RandomState(1).normal(0, 0.01, len(steps))
    losses = 3 - steps / 10_000 + noise
    # The switch lies behind step 600.
    losses[steps > 600] += 1.5
    clean = find_spikes(Series(steps, losses), SCHEDULE)
    losses[[30, 31, 80]] += [0.4, 0.3, 2.0]
    losses[90] = np.nan
    found = find_spikes(Series(steps, losses), SCHEDULE)
    assert clean == []
    assert [spike.step for spike in found] == [910, 810, 310, 320]
    assert found[1].first_step == 801
    assert 1.9 < found[1].height < 2.1


def test_too_few_losses_have_no_spike() -> None:
    assert find_spikes(Series(np.arange(1, 9), np.array([1.0] * 7 + [9.0])), SCHEDULE) == []
    assert find_spikes(Series(np.zeros(0, dtype=np.int64), np.zeros(0)), SCHEDULE) == []
