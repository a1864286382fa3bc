"""Configuration of the phase-aware GPT dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError
from megatron_tst.data.blend import Blend, check_blend, samples_by_corpus, samples_by_corpus_at
from megatron_tst.data.exclusion import Exclusion
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.phases import Phase

# Field of the configuration, the flag that sets it, and why bags cannot have it.
_UNSUPPORTED = (
    ("reset_position_ids", "--reset-position-ids", "a bag may hold tokens of two documents"),
    ("reset_attention_mask", "--reset-attention-mask", "a bag may hold tokens of two documents"),
    (
        "hybrid_context_parallel",
        "--hybrid-context-parallel",
        "it gives each document a number of ranks of its own",
    ),
    ("mock", "A data set without corpora", "there are no tokens to read in bags"),
)


@dataclass
class SuperpositionGPTDatasetConfig(GPTDatasetConfig):
    """Configuration of a phase-aware GPT dataset.

    Attributes:
        superposition: settings of phase 1.
        phases: stretches of the run, from ``SuperpositionSchedule``.
        left_out: documents that are left out of the train split: the sample of the run from which
            on, and pairs of a corpus, by its place in the blend, and a document.
        reads_train_split: whether the train split is built; without it a run only evaluates, on
            whatever text.

    Raises:
        UsageError: a setting that does not go together with superposition.
    """

    superposition: SuperpositionConfig = field(default_factory=SuperpositionConfig)
    phases: tuple[Phase, ...] = (Phase(0, 0),)
    left_out: Sequence[tuple[int, Sequence[tuple[int, int]]]] = ()
    reads_train_split: bool = True
    whole_split_matrix: Any = field(init=False, default=None)
    """Upstream's matrix of splits before the train split was left out of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.whole_split_matrix = self.split_matrix
        if not self.reads_train_split:
            self._leave_out_train_split()
            return
        if not self.superposition.enabled:
            return
        if not any(phase.is_superposed for phase in self.phases):
            raise UsageError(
                f"phases is {self.phases}, without bags: pass SuperpositionSchedule.stretches."
            )
        bag_size = self.superposition.bag_size
        for name, flag, reason in _UNSUPPORTED:
            if getattr(self, name):
                raise UsageError(
                    f"{flag} does not work with --tst-bag-size {bag_size}: {reason}. "
                    "Remove it, or use --tst-bag-size 1."
                )
        if self.inter_document_masking and not self.superposition.aligns_documents:
            raise UsageError(
                f"--dataloader-inter-document-masking does not work with --tst-bag-size {bag_size} "
                "and --tst-document-boundary cross: a bag may hold tokens of two documents. Use "
                "--tst-document-boundary align."
            )
        if not self.add_extra_token_to_sequence:
            raise UsageError(
                "add_extra_token_to_sequence is False: samples of phase 2 would not have the "
                f"tokens that --tst-bag-size {bag_size} plans with. Leave it True."
            )
        paths, weights = self.train_blend
        if len(paths) > 1 and weights is None:
            raise UsageError(
                f"--data-path or --train-data-path {' '.join(paths)}: --tst-bag-size {bag_size} "
                "needs the weight of each of several corpora. Put it in front of its path."
            )
        check_blend(paths, weights)

    def _leave_out_train_split(self) -> None:
        # What upstream's builder takes for a split without text.
        for splits in ("split_matrix", "blend_per_split"):
            if getattr(self, splits) is not None:
                setattr(self, splits, [None, *getattr(self, splits)[1:]])

    def phases_of(self, path: str) -> tuple[Phase, ...]:
        """The phases with the samples that the run takes from a corpus."""
        if len(self.train_blend[0]) == 1:
            return self.phases
        place = self.train_blend[0].index(path)
        return tuple(
            phase.from_sample(int(first[place]))
            for phase, first in zip(self.phases, self._first_samples, strict=True)
        )

    def exclusions_of(self, path: str) -> list[Exclusion]:
        """The documents of a corpus that are left out, from which of its samples on."""
        paths, weights = self.train_blend
        found = []
        for first_sample, pairs in self.left_out:
            number, first_place = paths.index(path), first_sample
            if len(paths) > 1 and first_sample:
                assert weights is not None
                first_place = samples_by_corpus(weights, first_sample)[number]
            documents = [document for corpus, document in pairs if corpus == number]
            if documents:
                found.append(Exclusion(first_place, np.array(sorted(documents))))
        return found

    @cached_property
    def _first_samples(self) -> NDArray[np.int64]:
        """Of each phase in each corpus."""
        _, weights = self.train_blend
        assert weights is not None
        return samples_by_corpus_at(weights, [phase.first_sample for phase in self.phases])

    @property
    def train_blend(self) -> Blend:
        """Corpora of the train split and their weights; no corpora without data."""
        return self.blend_of(Split.train) or ([], None)

    def blend_of(self, split: Split) -> Blend | None:
        """Corpora of a split and their weights; None for a split without text."""
        blend: Blend | None = self.blend
        if blend is None:
            return (self.blend_per_split or [None] * len(Split))[split.value]
        # Without superposition there may be neither text nor a split of it.
        is_empty = self.split_matrix is not None and self.split_matrix[split.value] is None
        return None if is_empty else blend
