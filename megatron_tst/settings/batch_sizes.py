"""How many sequences each step of a run reads: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from megatron_tst.common.errors import UsageError

_MULTIPLIERS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Stage(NamedTuple):
    """Steps of one batch size.

    Attributes:
        first_step: zero-based index of its first step.
        first_sample: index of the first sample of that step.
        batch_size: sequences a step.
    """

    first_step: int
    first_sample: int
    batch_size: int


@dataclass(frozen=True)
class BatchSizes:
    """The global batch size as a function of the samples that were read.

    A step has the size of the last entry whose first sample is not beyond the samples read before
    the step, as in ``StepBatchsizeNumMicroBatchesCalculator`` of
    megatron/core/num_microbatches_calculator.py. So a size comes into effect at the first step that
    starts at or beyond its first sample, and an entry that is shorter than a step may have none.

    Attributes:
        entries: pairs of first sample and batch size, by first sample, from sample 0 on.

    Raises:
        UsageError: the entries do not start at 0, do not rise, or have a size below 1.
    """

    entries: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.entries or self.entries[0][0] != 0:
            raise UsageError("no batch size is given for the start, sample 0")
        for (earlier, _), (later, _) in pairwise(self.entries):
            if later <= earlier:
                raise UsageError(f"two batch sizes start at sample {later}")
        for _, batch_size in self.entries:
            if batch_size < 1:
                raise UsageError(f"a batch size is {batch_size}")

    @classmethod
    def constant(cls, batch_size: int) -> BatchSizes:
        """One size for the whole run."""
        return cls(((0, batch_size),))

    @classmethod
    def parse(cls, text: str, sequence_length: int) -> BatchSizes:
        """Reads the value of ``--step-batch-size-schedule``.

        Args:
            text: pairs THRESHOLD:BATCH_SIZE, separated by blanks or commas; the thresholds are in
                equivalent tokens. Numbers may end in K, M, B or T.
            sequence_length: latent positions a sequence (l).

        Raises:
            UsageError: the text has another form.
        """
        try:
            pairs = [pair.split(":", 1) for pair in text.replace(",", " ").split()]
            if any(len(pair) != 2 for pair in pairs):
                raise UsageError("an entry has no colon")
            entries = [
                (_number(tokens) // sequence_length, _number(batch_size))
                for tokens, batch_size in pairs
            ]
            return cls(tuple(sorted(entries)))
        except (ValueError, OverflowError) as error:
            raise UsageError(
                f"--step-batch-size-schedule {text!r} cannot be used: {error}. Write pairs "
                "THRESHOLD:BATCH_SIZE with thresholds in equivalent tokens, such as "
                "'0:256 10B:512'; two thresholds lie at least a sequence apart."
            ) from error

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The sizes that have a step, by step; the last one never ends."""
        stages = []
        step = sample = 0
        for (_, batch_size), (threshold, _) in pairwise(self.entries):
            steps = -(-max(threshold - sample, 0) // batch_size)
            if steps:
                stages.append(Stage(step, sample, batch_size))
            step, sample = step + steps, sample + steps * batch_size
        return (*stages, Stage(step, sample, self.entries[-1][1]))

    def samples_at(self, step: int) -> int:
        """Samples read by the first ``step`` steps."""
        stage = self._stage_at(step)
        return stage.first_sample + (step - stage.first_step) * stage.batch_size

    def size_at(self, step: int) -> int:
        """Sequences in the step with this zero-based index."""
        return self._stage_at(step).batch_size

    def changes_at(self, step: int) -> bool:
        """Whether the step with this index has another size than the one before it."""
        return step > 0 and self.size_at(step) != self.size_at(step - 1)

    def stages_from(self, step: int) -> tuple[Stage, ...]:
        """The stages of the steps from this index on."""
        now = Stage(step, self.samples_at(step), self.size_at(step))
        return (now, *(stage for stage in self.stages if stage.first_step > step))

    def largest(self, first_step: int, end: int) -> int:
        """The largest size of the steps from ``first_step`` up to ``end``, without the latter."""
        now, *later = self.stages_from(first_step)
        sizes = (stage.batch_size for stage in later if stage.first_step < end)
        return max((now.batch_size, *sizes))

    def steps_to(self, samples: int) -> int:
        """The fewest steps that read this many samples."""
        stage = max(
            (stage for stage in self.stages if stage.first_sample < samples),
            default=self.stages[0],
        )
        return stage.first_step - (stage.first_sample - samples) // stage.batch_size

    def continued_by(self, other: BatchSizes, sample: int) -> BatchSizes:
        """These sizes up to a sample, and those of another run from there on."""
        past = [entry for entry in self.entries if entry[0] < sample]
        size = [size for first, size in other.entries if first <= sample][-1]
        future = [entry for entry in other.entries if entry[0] > sample]
        return BatchSizes((*past, (sample, size), *future))

    def text(self, sequence_length: int) -> str:
        """The value of ``--step-batch-size-schedule`` that means these sizes."""
        return " ".join(f"{first * sequence_length}:{size}" for first, size in self.entries)

    def _stage_at(self, step: int) -> Stage:
        return [stage for stage in self.stages if stage.first_step <= step][-1]


def _number(text: str) -> int:
    """A number as Megatron reads it, which is by way of a float."""
    text = text.strip().upper()
    multiplier = _MULTIPLIERS.get(text[-1:], 1)
    return int(float(text[:-1] if multiplier > 1 else text) * multiplier)
