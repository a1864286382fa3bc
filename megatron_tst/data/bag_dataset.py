"""The samples of a run for loops without Megatron: bags up to the switch, plain ones from it on.

The text, its order and the samples are those of Megatron's runs (``SuperpositionGPTDataset``).
Needs torch and NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megatron_tst.data.bags import BagFolder
from megatron_tst.data.sample_layout import SampleLayout
from megatron_tst.data.stream import TokenSource, TokenStream
from megatron_tst.settings.schedule import SuperpositionSchedule


class ArraySource:
    """Documents in one array of token ids, such as a ``numpy.memmap``.

    Args:
        tokens: [n] ids of any integer type.
        document_ends: [documents], the index behind each document; None: all is one document.

    Raises:
        ValueError: ids are no integers, or the ends do not rise up to n.
    """

    def __init__(self, tokens: NDArray[Any], document_ends: NDArray[Any] | None = None) -> None:
        ends = np.array([len(tokens)] if document_ends is None else document_ends, dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens has dtype {tokens.dtype}: pass token ids.")
        if len(ends) == 0 or ends[-1] != len(tokens) or (ends < starts).any():
            raise ValueError(
                f"document_ends does not rise up to the number of tokens, {len(tokens)}: pass the "
                "index behind each document."
            )
        self._tokens, self._starts = tokens, starts
        self.sequence_lengths: NDArray[np.int32] = (ends - starts).astype(np.int32)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """``length`` tokens of document ``idx`` from token ``offset`` on."""
        begin = int(self._starts[idx]) + offset
        count = int(self.sequence_lengths[idx]) - offset if length is None else length
        return self._tokens[begin : begin + count]


class BagDataset(Dataset[dict[str, Tensor]]):
    """Samples in the order in which a run reads them: no shuffling is needed, nor wanted.

    Args:
        source: the text.
        schedule: phases and batch sizes of the run.
        seed: of the order of documents and samples.
        documents: [n] int32, those to train on; None: all.
        eod: id of the end of a document, for ``--tst-document-boundary align``.

    Raises:
        ValueError: the text is shorter than a sample.
    """

    def __init__(
        self,
        source: TokenSource,
        schedule: SuperpositionSchedule,
        seed: int = 1234,
        documents: NDArray[np.int32] | None = None,
        eod: int = -1,
    ) -> None:
        lengths = source.sequence_lengths
        if documents is None:
            documents = np.arange(len(lengths), dtype=np.int32)
        self.schedule = schedule
        self._source = source
        self._samples = schedule.batch_sizes.samples_at(schedule.total_steps)
        self._layout = SampleLayout(schedule.sequence_length, schedule.stretches)
        self._stream = TokenStream.build(
            self._layout, documents, lengths, self._samples, seed, type(source).__name__
        )
        phases = {phase.bag_size: phase for phase in schedule.stretches}
        self._folders = {
            size: BagFolder(
                phase,
                schedule.sequence_length,
                eod,
                None,
                eod_mask_loss=False,
                target_weights=schedule.config.target_weights(size),
            )
            for size, phase in phases.items()
        }

    def __len__(self) -> int:
        """Samples of the whole run."""
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """tokens and labels, int64 [l, s] or [l] by phase and variant; loss_mask, float32 [l]."""
        sample = int(self._stream.samples[index])
        phase = self._layout.phases[self._layout.phase_of(sample)]
        text, _, lengths = self._stream.read(self._source, *self._layout.span(sample))
        tokens = torch.from_numpy(text)
        if phase.is_superposed:
            return self._folders[phase.bag_size].fold(tokens, lengths)
        ones = torch.ones(self.schedule.sequence_length)
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": ones}

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
        """What a step reads, or one of several equal ranks in it: [b, ...] of each entry.

        A loop that goes on after an interruption asks for the steps that are left.

        Raises:
            ValueError: the batch cannot be shared equally.
        """
        size = self.schedule.batch_sizes.size_at(step)
        if size % ranks:
            raise ValueError(
                f"step {step} reads {size} sequences, which {ranks} ranks cannot share: use a "
                "batch size that is a multiple of them."
            )
        first = self.schedule.batch_sizes.samples_at(step) + rank * (size // ranks)
        samples = [self[index] for index in range(first, first + size // ranks)]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
