"""How much text a run reads of each of its corpora, and how much there is."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError
from megatron_tst.data.blend import samples_by_corpus_at
from megatron_tst.data.stream import fill_up
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.phases import Phase, bags_name
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.settings.variants import OUTPUT_ONLY

_CHUNK = 1 << 24
# Of an epoch: rounding to whole tokens is no repetition.
_ROUNDING = 1e-6

_Fits = Callable[[SuperpositionConfig], bool]


class TrainText:
    """The text of a corpus that training may read.

    Args:
        path_prefix: path without ``.bin`` or ``.idx``; its files have passed
            ``check_indexed_dataset``.
        documents_share: share of its documents in the train split, from 0 to 1.
        left_out: [n] documents that are no part of it.

    Attributes:
        tokens: of the train split, found without reading the lengths of documents.
    """

    def __init__(
        self,
        path_prefix: str,
        documents_share: float = 1.0,
        left_out: NDArray[Any] | None = None,
    ) -> None:
        self.path_prefix = path_prefix
        self._corpus = IndexedDataset(path_prefix)
        index = self._corpus.index
        # As upstream splits. Documents lie behind each other, so that the text ends where the last
        # one does: every rank asks, and the lengths may be gigabytes.
        self._documents = round(documents_share * len(index.sequence_lengths))
        if self._documents == len(index.sequence_lengths):
            last = self._documents - 1
            end = int(index.sequence_pointers[last])
            end += int(index.sequence_lengths[last]) * index.dtype_size
        else:
            end = int(index.sequence_pointers[self._documents])
        absent = np.unique([] if left_out is None else left_out).astype(np.int64)
        self._left_out = index.sequence_lengths[absent[absent < self._documents]]
        self.tokens: int = end // index.dtype_size - int(self._left_out.sum(dtype=np.int64))
        self._positions = {1: self.tokens}

    def positions(self, multiple: int) -> int:
        """Places that an epoch takes where each document fills up its last bag of ``multiple``.

        Reads all lengths for each multiple above 1, once.
        """
        if multiple not in self._positions:
            self._positions[multiple] = self._count_positions(multiple)
        return self._positions[multiple]

    def _count_positions(self, multiple: int) -> int:
        lengths = self._corpus.index.sequence_lengths[: self._documents]
        total = 0
        for begin in range(0, len(lengths), _CHUNK):
            total += int(fill_up(lengths[begin : begin + _CHUNK], multiple).sum())
        return total - int(fill_up(self._left_out, multiple).sum())


@dataclass(frozen=True)
class CorpusBudget:
    """What a run reads of one corpus, in tokens.

    Attributes:
        path: of the corpus, without ``.bin`` or ``.idx``.
        available: tokens of its train split.
        phase_1: tokens read in bags; without the padding of aligned ones.
        phase_1_padding: places of bags that hold no token.
        phase_2: tokens read one by one, as all are in a run without superposition.
    """

    path: str
    available: int
    phase_1: int
    phase_1_padding: int
    phase_2: int

    @property
    def needed(self) -> int:
        """Tokens read in all phases."""
        return self.phase_1 + self.phase_2

    @property
    def epochs(self) -> float:
        """How many times its text is read."""
        return self.needed / self.available if self.available else math.inf


def data_budget(
    schedule: SuperpositionSchedule, texts: Sequence[TrainText], weights: Sequence[float]
) -> list[CorpusBudget]:
    """What a run needs of each corpus: its weight in each phase, to within two samples.

    Where bag sizes are drawn, the samples of each size are counted as the blend takes them.

    Of aligned bags it knows the padding of the whole corpus, and of the part that is read only
    that it is about as much.

    Args:
        schedule: phases of the run.
        texts: the corpora of the train split.
        weights: of the corpora, in any unit.
    """
    phases_of = _positions_of(schedule, weights)
    return [_corpus_budget(text, phases) for text, phases in zip(texts, phases_of, strict=True)]


def text_shares(
    schedule: SuperpositionSchedule, texts: Sequence[TrainText], weights: Sequence[float]
) -> tuple[tuple[int, float], ...]:
    """Each bag size with the share of the places of its bags that hold text, 1 without padding.

    Args:
        schedule: phases of the run.
        texts: the corpora of the train split.
        weights: of the corpora, in any unit.
    """
    tokens_of: Counter[int] = Counter()
    places_of: Counter[int] = Counter()
    for text, phases in zip(texts, _positions_of(schedule, weights), strict=True):
        for phase, positions in phases:
            if phase.is_superposed:
                tokens, padding = _in_bags(text, phase, positions)
                tokens_of[phase.bag_size] += tokens
                places_of[phase.bag_size] += tokens + padding
    return tuple((size, tokens_of[size] / places) for size, places in places_of.items() if places)


def _positions_of(
    schedule: SuperpositionSchedule, weights: Sequence[float]
) -> list[list[tuple[Phase, float]]]:
    """For each corpus, the phases with their latent positions."""
    if schedule.config.bag_sizes is not None and len(weights) > 1:
        return _drawn_positions(schedule, weights)
    phases = schedule.positions_by_phase(schedule.total_steps)
    shares = [weight / sum(weights) for weight in weights]
    return [[(phase, share * count) for phase, count in phases] for share in shares]


def _drawn_positions(
    schedule: SuperpositionSchedule, weights: Sequence[float]
) -> list[list[tuple[Phase, float]]]:
    """For each corpus, each bag size with its latent positions."""
    stretches = schedule.stretches
    bounds = [phase.first_sample for phase in stretches]
    bounds.append(schedule.batch_sizes.samples_at(schedule.total_steps))
    counts = np.diff(samples_by_corpus_at(weights, bounds), axis=0)
    sizes = np.array([phase.bag_size for phase in stretches])
    kinds = {phase.bag_size: phase for phase in stretches}
    return [
        [
            (phase, schedule.sequence_length * int(of_corpus[sizes == size].sum()))
            for size, phase in kinds.items()
        ]
        for of_corpus in counts.T
    ]


def _corpus_budget(text: TrainText, phases: Sequence[tuple[Phase, float]]) -> CorpusBudget:
    """What phases with so many positions need of a corpus."""
    in_bags = padding = plain = 0
    for phase, positions in phases:
        if phase.is_superposed:
            tokens, empty = _in_bags(text, phase, positions)
            in_bags, padding = in_bags + tokens, padding + empty
        else:
            plain += round(positions * phase.tokens_per_position)
    return CorpusBudget(text.path_prefix, text.tokens, in_bags, padding, plain)


def _in_bags(text: TrainText, phase: Phase, positions: float) -> tuple[int, int]:
    """Tokens and padding in so many latent positions of bags."""
    places = round(positions * phase.tokens_per_position)
    epoch = text.positions(phase.document_multiple)
    tokens = round(places * text.tokens / epoch) if epoch else places
    return tokens, places - tokens


def refuse_repetition(
    schedule: SuperpositionSchedule,
    texts: Sequence[TrainText],
    weights: Sequence[float],
    max_epochs: float,
) -> None:
    """Refuses a run that would read a corpus more often than it may.

    Raises:
        UsageError: naming the corpus, the largest settings that fit, and the ways out.
    """
    worst = max(data_budget(schedule, texts, weights), key=lambda budget: budget.epochs)
    if worst.epochs <= max_epochs + _ROUNDING:
        return

    def fits(config: SuperpositionConfig) -> bool:
        budgets = data_budget(replace(schedule, config=config), texts, weights)
        return all(budget.epochs <= max_epochs + _ROUNDING for budget in budgets)

    raised = math.ceil(worst.epochs * 100) / 100
    raise UsageError(
        f"--tst-max-epochs is {max_epochs:g} and this run reads {worst.path} {raised:g} times: "
        f"{worst.needed:,} tokens ({worst.phase_1:,} in {bags_name(schedule.phases)}) of "
        f"{worst.available:,}. "
        f"{' '.join(_ways_out(schedule, fits))} Or use more data, or --tst-max-epochs {raised:g}."
    )


def _ways_out(schedule: SuperpositionSchedule, fits: _Fits) -> list[str]:
    config, steps = schedule.config, schedule.switch_step
    as_steps = config.resolved(steps)
    without_bags = replace(as_steps, variant=OUTPUT_ONLY.name)
    if not fits(without_bags):
        return ["Even without bags its tokens would not suffice: shorten the run."]
    if not config.superposes_input:
        return []
    output_only = (
        f"--tst-variant {OUTPUT_ONLY.name} reads no more tokens than a run without phase 1; no "
        "gain of it is shown (docs/choosing-s-and-r.md)."
    )
    if schedule.bags:
        return ["Use smaller bags or fewer steps in --tst-schedule.", output_only]
    if config.bag_sizes is not None:
        return ["Use smaller bags in --tst-bag-sizes, or fewer steps of them.", output_only]
    sizes = [s for s in range(2, config.bag_size) if fits(replace(as_steps, bag_size=s))]
    longest = bisect_right(
        range(1, steps), 0, key=lambda count: not fits(replace(as_steps, steps=count))
    )
    found = [f"What fits: --tst-bag-size {max(sizes)}"] if sizes else []
    if longest:
        found.append(f"{'or' if found else 'What fits:'} {_phase_length(schedule, longest)}")
    fitting = " ".join(found) + "." if found else "No bag size and no length of phase 1 fits."
    return [fitting, output_only]


def _phase_length(schedule: SuperpositionSchedule, steps: int) -> str:
    ratio = math.floor(1000 * steps / schedule.total_steps) / 1000
    if schedule.config.step_ratio is None or ratio == 0:
        return f"--tst-steps {steps}"
    return f"--tst-step-ratio {ratio:g}"
