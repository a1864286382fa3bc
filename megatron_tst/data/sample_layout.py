"""Where each sample of a run lies in the stream of its text: arithmetic over the phases.

Nothing here depends on torch or Megatron.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

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

    def span(self, sample: int, index: int | None = None) -> tuple[int, int]:
        """First position of a sample, and the position behind its look-ahead.

        Args:
            sample: which.
            index: of the phase in whose length it is read; None for the one it belongs to.
        """
        index = self.phase_of(sample) if index is None else index
        phase = self.phases[index]
        begin = self.begins[index] + (sample - phase.first_sample) * self.tokens(phase)
        return begin, begin + self.tokens(phase) + phase.look_ahead

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

    def samples_in(self, begin: int, end: int, index: int) -> range:
        """Samples with text or look-ahead in the positions from ``begin`` up to ``end``, excluded.

        Args:
            begin: first position.
            end: position behind the last.
            index: of their phase, which is taken to go on for ever.
        """
        phase, start = self.phases[index], self.begins[index]
        length, first = self.tokens(phase), phase.first_sample
        if begin >= end:
            return range(0)
        before = max((begin - phase.look_ahead - start) // length, 0)
        return range(first + before, first + max(-((start - end) // length), 0))

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
