"""Where each sample of a run lies in the stream of its text: arithmetic over the phases.

Nothing here depends on torch or Megatron.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tst.settings.phases import Phase

# More of them, whose bag sizes are drawn, stand for themselves by a fingerprint.
_FEW_PHASES = 64


@dataclass(frozen=True)
class SampleLayout:
    """Where each sample lies in the stream, before shuffling.

    Attributes:
        sequence_length: latent positions a sequence (l).
        phases: stretches of the run, each with bags of one size, with the samples that it takes
            from this stream.
    """

    sequence_length: int
    phases: tuple[Phase, ...]

    def phase_of(self, sample: int) -> int:
        """Index of the phase that a sample belongs to."""
        return bisect_right(self._first_samples, sample) - 1

    @cached_property
    def _first_samples(self) -> tuple[int, ...]:
        return tuple(phase.first_sample for phase in self.phases)

    def tokens(self, phase: Phase) -> int:
        """Positions of a sample of a phase, without look-ahead."""
        return self.sequence_length * phase.tokens_per_position

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Where each phase begins."""
        lengths = [
            (later.first_sample - phase.first_sample) * self.tokens(phase)
            for phase, later in pairwise(self.phases)
        ]
        return (0, *accumulate(lengths))

    def with_more_bags(self, more: Iterable[Sequence[int]]) -> SampleLayout:
        """With further samples of bags behind those of the run, and plain ones behind them.

        Args:
            more: bag size, of the run, and samples of each stretch of them.
        """
        *bags, plain = self.phases
        by_size = {phase.bag_size: phase for phase in bags}
        end = plain.first_sample
        for size, samples in more:
            bags.append(by_size[size].from_sample(end))
            end += samples
        return replace(self, phases=(*bags, plain.from_sample(end)))

    def span(self, sample: int) -> tuple[int, int]:
        """First position of a sample, and the position behind its look-ahead."""
        index = self.phase_of(sample)
        phase = self.phases[index]
        begin = self.begins[index] + (sample - phase.first_sample) * self.tokens(phase)
        return begin, begin + self.tokens(phase) + phase.look_ahead

    def spans(self, samples: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same of many samples: [n] int64 each."""
        index = np.searchsorted(self._first_samples, samples, side="right") - 1
        tokens = np.array([self.tokens(phase) for phase in self.phases])[index]
        look_ahead = np.array([phase.look_ahead for phase in self.phases])[index]
        behind = samples.astype(np.int64) - np.array(self._first_samples)[index]
        begins = np.array(self.begins, dtype=np.int64)[index] + behind * tokens
        return begins, begins + tokens + look_ahead

    def end(self, num_samples: int) -> int:
        """Position behind all that the first samples read."""
        # The look-ahead of the last bags may reach further than a short phase behind them.
        ends = [phase.first_sample for phase in self.phases[1:]] + [num_samples]
        return max(self.span(min(end, num_samples) - 1)[1] for end in ends)

    def first_sample_from(self, position: int) -> int:
        """Index of the first sample that begins at ``position`` or later."""
        index = bisect_left(self.begins, position, lo=1) - 1
        phase = self.phases[index]
        return phase.first_sample - (self.begins[index] - position) // self.tokens(phase)

    def samples_on(self, begin: int, end: int) -> range:
        """Samples with text or look-ahead in the positions from ``begin`` up to ``end``, excluded.

        Near the ends there may be some that have none.
        """
        if begin >= end:
            return range(0)
        return range(
            self.first_sample_from(max(begin - self._longest, 0)), self.first_sample_from(end)
        )

    @cached_property
    def _longest(self) -> int:
        return max(self.tokens(phase) + phase.look_ahead for phase in self.phases)

    def of_one_size(self, first: int, end: int) -> list[list[tuple[int, int]]]:
        """The samples from ``first`` up to ``end``, excluded, by bag size, as intervals.

        Returns:
            For each bag size of the run, in the order in which the run comes to it.
        """
        found: dict[int, list[tuple[int, int]]] = {phase.bag_size: [] for phase in self.phases}
        ends = [*self._first_samples[1:], max(end, self._first_samples[-1])]
        for phase, stop in zip(self.phases, ends, strict=True):
            begin, stop = max(phase.first_sample, first), min(stop, end)
            if begin < stop:
                found[phase.bag_size].append((begin, stop))
        return list(found.values())

    def text_order(self) -> list[dict[str, Any]] | str:
        """All that the order of the text depends on, as plain values."""
        order = [phase.text_order() for phase in self.phases]
        if len(order) <= _FEW_PHASES:
            return order
        return hashlib.sha256(json.dumps(order).encode()).hexdigest()
