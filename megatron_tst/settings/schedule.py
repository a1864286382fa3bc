"""When a run switches from bags to tokens, and how much text it has read: pure arithmetic."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.phases import Bags, Phase, lay_out
from megatron_tst.settings.setting_fields import SettingError
from megatron_tst.settings.size_schedule import lay_out_sizes
from megatron_tst.settings.step_sizes import StepSizes
from megatron_tst.settings.variants import VARIANTS


@dataclass(frozen=True)
class SuperpositionSchedule:
    """The phases of a run.

    Attributes:
        config: superposition settings; those with several bag sizes become ``bags``, and keep the
            largest size and the steps of all.
        total_steps: optimizer steps of the whole run (N).
        batch_sizes: sequences a step.
        sequence_length: latent positions a sequence (l), the same in all phases.
        text_share: share of the places in bags that hold text; below 1 where documents are
            aligned, whose last bags are filled up with padding.
        text_shares: the same for bags of each size, of which larger ones hold more padding; sizes
            that are not among them have ``text_share``.
        bags: where there are several phases with bags, the bag size and the steps of each. The
            settings then have the largest bag size, and the steps of all of them.
        seed: of the bag sizes that are drawn.

    Raises:
        UsageError: the switch falls on step 0 or on the last step, or bags do not go with the
            settings.
    """

    config: SuperpositionConfig
    total_steps: int
    batch_sizes: BatchSizes
    sequence_length: int
    text_share: float = 1.0
    text_shares: tuple[tuple[int, float], ...] = ()
    bags: Bags = ()
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.config.schedule is not None:
            self._take_sizes(self.config.schedule)
        if self.bags:
            self._check_bags()
        if not self.config.enabled:
            return
        name = "step_ratio" if self.config.steps is None else "steps"
        values = {"length": getattr(self.config, name), "total": self.total_steps}
        if self._length_of_bags < 1:
            raise SettingError(
                f"{{{name}:{{length}}}} of {{total}} steps puts the switch at step 0: "
                "raise it, lengthen the run, or use {bag_size:1}.",
                **values,
            )
        if self._length_of_bags >= self.total_steps:
            raise SettingError(
                f"{{{name}:{{length}}}} of {{total}} steps leaves no step for phase 2, which turns "
                "the weights into an ordinary model: lower it or lengthen the run.",
                **values,
            )

    def _take_sizes(self, text: str) -> None:
        bags = lay_out_sizes(text, self.total_steps)
        length = sum(steps for _, steps in bags)
        if length >= self.total_steps:
            raise SettingError(
                "{schedule:{text}} of {total} steps leaves no step for the last phase, which turns "
                "the weights into an ordinary model: lower it or lengthen the run.",
                text=text,
                total=self.total_steps,
            )
        object.__setattr__(self, "config", self.config.resolved(length))
        object.__setattr__(self, "bags", bags if len(bags) > 1 else ())

    def _check_bags(self) -> None:
        sizes, steps = zip(*self.bags, strict=True)
        largest, length = self.config.bag_size, self._length_of_bags
        if min(sizes) < 2 or min(steps) < 1 or (max(sizes), sum(steps)) != (largest, length):
            raise UsageError(
                f"bags are {self.bags}: pass bag sizes of 2 and more, the largest {largest}, and "
                f"{length} steps in all, 1 or more for each, as the settings have it."
            )

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """In the order of their steps; the first begins at step 0."""
        config, length = self.config, self._length_of_bags
        bags = self.bags or (((config.bag_size, length),) if length else ())
        variant = VARIANTS[config.variant]
        return lay_out(bags, variant, config.aligns_documents, self.batch_sizes.samples_at)

    @cached_property
    def stretches(self) -> tuple[Phase, ...]:
        """The phases as text is laid out: cut where a bag size that is drawn changes."""
        if self.config.bag_sizes is None:
            return self.phases
        bags, plain = self.phases
        found: list[Phase] = []
        sizes = StepSizes.parse(self.config.bag_sizes).draw(self.seed, plain.first_step)
        for step, size in enumerate(sizes):
            if not found or found[-1].bag_size != size:
                first_sample = self.batch_sizes.samples_at(step)
                found.append(
                    replace(bags, first_step=step, first_sample=first_sample, bag_size=size)
                )
        return (*found, plain)

    @property
    def _length_of_bags(self) -> int:
        if not self.config.enabled:
            return 0
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.step_ratio is not None
        return round(self.config.step_ratio * self.total_steps)

    @property
    def switch_step(self) -> int:
        """First step of the last phase; 0 when superposition is off."""
        return self.phases[-1].first_step

    def phase_at(self, step: int) -> Phase:
        """What the optimizer step with this zero-based index is of: one of the stretches."""
        return self.stretches[bisect_right(self._first_steps, step) - 1]

    def phase_of_sample(self, sample: int) -> Phase:
        """What the sample with this zero-based index is of: one of the stretches."""
        return self.stretches[bisect_right(self._first_samples, sample) - 1]

    @cached_property
    def _first_steps(self) -> list[int]:
        return [phase.first_step for phase in self.stretches]

    @cached_property
    def _first_samples(self) -> list[int]:
        return [phase.first_sample for phase in self.stretches]

    def begins_phase(self, step: int) -> bool:
        """Whether a phase ends before the step with this index."""
        return any(phase.first_step == step for phase in self.phases[1:])

    def bag_size_at(self, step: int) -> int:
        """Tokens that share a latent position, on the side that the variant superposes."""
        return self.phase_at(step).bag_size

    def equivalent_tokens(self, step: int) -> int:
        """Latent positions processed by the first ``step`` steps; FLOPs are proportional to it."""
        return self.batch_sizes.samples_at(step) * self.sequence_length

    def positions_by_phase(self, step: int) -> list[tuple[Phase, int]]:
        """Each phase with its latent positions among the first ``step`` steps.

        A phase whose bag sizes are drawn comes once for each of them.
        """
        if self.config.bag_sizes is not None:
            return self._positions_by_size(step)
        ends = [phase.first_step for phase in self.phases[1:]] + [step]
        return [
            (
                phase,
                max(
                    self.equivalent_tokens(min(end, step))
                    - self.equivalent_tokens(min(phase.first_step, step)),
                    0,
                ),
            )
            for phase, end in zip(self.phases, ends, strict=True)
        ]

    def _positions_by_size(self, step: int) -> list[tuple[Phase, int]]:
        last = bisect_right(self._first_steps, step) - 1
        now, samples = self.stretches[last], self.batch_sizes.samples_at(step)
        bags, plain = self.phases
        kinds = [replace(bags, bag_size=size) for size in self._samples_before if size > 1]
        return [
            (
                kind,
                self.sequence_length
                * (
                    self._samples_before[kind.bag_size][last]
                    + (samples - now.first_sample if kind.bag_size == now.bag_size else 0)
                ),
            )
            for kind in (*kinds, plain)
        ]

    @cached_property
    def _samples_before(self) -> dict[int, list[int]]:
        """For each bag size, its samples before each stretch."""
        sizes = sorted({phase.bag_size for phase in self.stretches})
        found: dict[int, list[int]] = {}
        for size in sizes:
            counts = [
                (later.first_sample - phase.first_sample) * (phase.bag_size == size)
                for phase, later in pairwise(self.stretches)
            ]
            found[size] = list(accumulate(counts, initial=0))
        return found

    def data_tokens(self, step: int) -> int:
        """Tokens of text read by the first ``step`` steps."""
        total, shares = 0, dict(self.text_shares)
        for phase, positions in self.positions_by_phase(step):
            places = positions * phase.tokens_per_position
            share = shares.get(phase.bag_size, self.text_share) if phase.is_superposed else 1.0
            # Exact without padding, however many tokens there are.
            total += places if share == 1.0 else round(places * share)
        return total
