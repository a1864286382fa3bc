"""The text of a training run as one stream of tokens, and where each sample lies in it.

Every epoch holds all documents of the split, in an order of its own; the epochs follow each other.
A sample is an interval of positions in that stream, found by arithmetic. Each phase goes on where
the one before it stopped: phase 1 with intervals of ``s * l`` tokens (``l`` where bags are not
read), phase 2 with intervals of ``l`` tokens::

    epoch 0                                 epoch 1
    |doc 7|doc 2|doc 9    |doc 4 |doc 0    |doc 4 |doc 9    |doc 0    | ...
    [sample 0    [sample 1    [2  [3  [4  [5  [6  [7  [8  [9  ...
    phase 1: s * l tokens     phase 2: l tokens

Where bags must not cross documents, each document fills up its last bag with ``PADDING``; phase 2
goes on behind the last token that phase 1 has read, without padding.

So a token is read once an epoch, across the switch as well. Behind its interval a sample reads a
few tokens of look-ahead, which serve as targets only. The samples are then shuffled, but only with
those of their bag size and epoch, so that an epoch is read to its end before any of its text comes
again. Where bag sizes are drawn, each step has its interval, and the samples of all steps of one
size are shuffled with each other.

The order of the samples depends on the random seed, the documents of the split, the sequence
length, and the bag size, variant and first sample of each phase. It does not depend on the batch
sizes, the number of ranks, or the length of the run beyond the switch.

Nothing here depends on torch or Megatron.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megatron_tst.common.atomic_files import replacing
from megatron_tst.common.errors import UsageError
from megatron_tst.data.sample_layout import SampleLayout

PADDING = -100
"""Stands in a bag where its document has no token left; targets know it as their ignore index."""

# Which permutation a generator is for: the third word of its seed, beside the seed and the epoch.
# All bag sizes have one of their own.
_DOCUMENTS, _FIRST_PHASE = range(2)
_DOCUMENTS_AT_ONCE = 1 << 20
_FEWEST_DOCUMENTS = 1 << 6
_ENDLESS = np.iinfo(np.int64).max


class TokenSource(Protocol):
    """Documents that can be read in part, such as Megatron's IndexedDataset."""

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """[documents] int32, in tokens."""
        ...

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """``length`` tokens of document ``idx`` from token ``offset`` on."""
        ...


def shuffle_documents(documents: NDArray[np.int32], epochs: int, seed: int) -> NDArray[np.int32]:
    """The documents of all epochs, each epoch in an order that depends on it and the seed alone.

    Returns:
        [epochs * len(documents)] int32.
    """
    order = np.tile(documents, (epochs, 1))
    for epoch in range(epochs):
        _random_state(seed, epoch, _DOCUMENTS).shuffle(order[epoch])
    return order.reshape(-1)


def shuffle_samples(
    layout: SampleLayout, num_samples: int, epoch_ends: NDArray[np.int64], seed: int
) -> NDArray[Any]:
    """The sample that is read in each place, shuffled among those of its bag size and epoch.

    A sample belongs to the epoch in which it begins. The last samples of an epoch, whose text or
    look-ahead reaches into the next one, keep their places: reading the others does not ask for the
    next epoch. The last epoch is shuffled as a whole and then cut, so that a longer run continues
    a shorter one.

    Args:
        layout: where the samples lie.
        num_samples: samples to be read.
        epoch_ends: [epochs] int64, the position behind each epoch.
        seed: random seed.

    Returns:
        [num_samples] uint32, or int64 where that is too small.
    """
    epochs = int(epoch_ends.searchsorted(layout.span(num_samples - 1)[0], side="right")) + 1
    ends = epoch_ends[:epochs].tolist()
    count = layout.first_sample_from(ends[-1])
    order = np.arange(count, dtype=np.uint32 if count < 2**32 else np.int64)
    for epoch, (epoch_begin, epoch_end) in enumerate(pairwise([0, *ends])):
        first = layout.first_sample_from(epoch_begin)
        last = layout.first_sample_from(epoch_end)
        for index, intervals in enumerate(layout.of_one_size(first, last)):
            generator = _random_state(seed, epoch, _FIRST_PHASE + index)
            _shuffle(order, intervals, layout, epoch_end, generator)
    return order[:num_samples]


def _shuffle(
    order: NDArray[Any],
    intervals: list[tuple[int, int]],
    layout: SampleLayout,
    epoch_end: int,
    generator: np.random.RandomState,
) -> None:
    """Shuffles the samples of intervals in place, but for those that read beyond the epoch."""
    while intervals:
        begin, end = intervals[-1]
        while end > begin and layout.span(end - 1)[1] > epoch_end:
            end -= 1
        intervals[-1] = begin, end
        if end > begin:
            break
        intervals.pop()
    if len(intervals) == 1:
        # In place: the plain samples are most of a run.
        generator.shuffle(order[slice(*intervals[0])])
    elif intervals:
        places = np.concatenate([np.arange(*interval) for interval in intervals])
        samples = order[places]
        generator.shuffle(samples)
        order[places] = samples


def _document_starts(
    lengths: NDArray[np.int32], order: NDArray[np.int32], layout: SampleLayout
) -> NDArray[np.int64]:
    """Where the documents begin in the given order, and where the last ends: [len(order) + 1]."""
    starts = np.zeros(len(order) + 1, dtype=np.int64)
    done = 0
    mean = max(int(lengths[order[:_DOCUMENTS_AT_ONCE]].mean()), 1) if len(order) else 1
    for index, (phase, end) in enumerate(
        zip(layout.phases, (*layout.begins[1:], _ENDLESS), strict=True)
    ):
        if not phase.aligns_documents:
            # Nor do those behind it.
            end = _ENDLESS
        while done < len(order) and starts[done] < end:
            # In chunks: all lengths in order would take half as much memory as their total.
            wanted = 2 * (end - int(starts[done])) // mean + _FEWEST_DOCUMENTS
            chunk = order[done : done + min(wanted, _DOCUMENTS_AT_ONCE)]
            positions = fill_up(lengths[chunk], phase.document_multiple)
            ends = starts[done] + np.cumsum(positions)
            inside = int(ends.searchsorted(end, side="right"))
            starts[done + 1 : done + 1 + inside] = ends[:inside]
            done += inside
            if inside < len(positions):
                # It reaches into a later phase, whose bags it fills up.
                tokens_end = int(starts[done]) + int(lengths[order[done]])
                starts[done + 1] = _filled_end(layout, index + 1, tokens_end)
                done += 1
    return starts


def _filled_end(layout: SampleLayout, first: int, position: int) -> int:
    """Where a document that ends at ``position``, in phase ``first`` or later, is filled up to."""
    index = max(first, bisect_left(layout.begins, position) - 1)
    begin, multiple = layout.begins[index], layout.phases[index].document_multiple
    return begin - (begin - position) // multiple * multiple


def fill_up(lengths: NDArray[np.int32], multiple: int) -> NDArray[np.int64]:
    """Positions of documents of these lengths that fill up their last bag of ``multiple``."""
    return -(-lengths.astype(np.int64) // multiple) * multiple


def _random_state(seed: int, epoch: int, purpose: int) -> np.random.RandomState:
    # NumPy freezes the streams of RandomState, not those of Generator: an upgrade in the middle of
    # a run must not reorder its text.
    return np.random.RandomState([seed, epoch, purpose])


@dataclass(frozen=True)
class TokenStream:
    """The order of documents and samples of one run.

    Attributes:
        documents: [epochs * documents of the split] int32, the order in which they are read.
        starts: [len(documents) + 1] int64, the stream position at which each of them begins, and
            the end of the stream. A document may have more positions than tokens.
        samples: [num_samples] uint32 or int64, the sample that is read in each place.
        more_bags: [n, 2] int64, bag size and samples of what is read in bags behind those of the
            run, in the place of samples with documents that were left out in the middle of it.
            ``samples`` counts in ``layout.with_more_bags(more_bags)``.
    """

    documents: NDArray[Any]
    starts: NDArray[Any]
    samples: NDArray[Any]
    more_bags: NDArray[Any] = field(default_factory=partial(np.zeros, (0, 2), np.int64))

    @classmethod
    def build(
        cls,
        layout: SampleLayout,
        documents: NDArray[np.int32],
        document_lengths: NDArray[np.int32],
        num_samples: int,
        seed: int,
        corpus: str,
    ) -> Self:
        """Orders the documents of a split for ``num_samples`` samples.

        Args:
            layout: where the samples lie.
            documents: [documents of the split] int32, their indices in the corpus.
            document_lengths: [documents of the corpus] int32, in tokens.
            num_samples: samples to be read.
            seed: random seed, at least 0 and below 2**32.
            corpus: what to call the corpus in an error.

        Raises:
            UsageError: the split is shorter than one sample with its look-ahead.
        """
        tokens = int(document_lengths[documents].sum(dtype=np.int64))
        largest = max(layout.phases, key=lambda phase: phase.bag_size)
        positions, look_ahead = layout.tokens(largest), largest.look_ahead
        if tokens < positions + look_ahead:
            raise UsageError(
                f"--data-path {corpus}: its train split holds {tokens} tokens, and one sample of "
                f"phase 1 needs {positions + look_ahead} ({positions} and {look_ahead} of "
                "look-ahead). Use more data, a larger first share in --split, or a smaller "
                "--tst-bag-size or --seq-length."
            )
        end = layout.end(num_samples)
        order = shuffle_documents(documents, -(-end // tokens), seed)
        starts = _document_starts(document_lengths, order, layout)
        epoch_ends = starts[len(documents) :: len(documents)]
        # Padding may make the last epochs dispensable.
        used = (int(epoch_ends.searchsorted(end)) + 1) * len(documents)
        samples = shuffle_samples(layout, num_samples, epoch_ends, seed)
        return cls(order[:used], starts[: used + 1], samples)

    @staticmethod
    def paths(prefix: Path) -> dict[str, Path]:
        """The file of each array, by attribute."""
        return {
            name: prefix.with_name(f"{prefix.name}-{name}.npy")
            for name in ("documents", "starts", "samples")
        }

    @staticmethod
    def _more_bags_path(prefix: Path) -> Path:
        return prefix.with_name(f"{prefix.name}-more_bags.npy")

    def save(self, prefix: Path) -> None:
        """Writes the arrays; a file appears under its name only when it is complete."""
        files = self.paths(prefix)
        if len(self.more_bags):
            # First: the other files are what says that all are there.
            files = {"more_bags": self._more_bags_path(prefix), **files}
        for name, path in files.items():
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, prefix: Path) -> Self:
        """Maps the saved arrays into memory."""
        files = cls.paths(prefix)
        if (more_bags := cls._more_bags_path(prefix)).is_file():
            files["more_bags"] = more_bags
        arrays = {
            # A plain array over the mapping: the memmap class makes each look-up slower.
            name: np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for name, path in files.items()
        }
        return cls(**arrays)

    def holds(
        self, documents: NDArray[Any], layout: SampleLayout, samples: NDArray[Any]
    ) -> NDArray[np.bool_]:
        """Whether samples hold tokens of some documents, in text or look-ahead.

        Args:
            documents: indices in the corpus.
            layout: where the samples lie.
            samples: [n].
        """
        places = np.flatnonzero(np.isin(self.documents, documents))
        starts, ends = self.starts[places], self.starts[places + 1]
        has_text = ends > starts
        starts, ends = starts[has_text], ends[has_text]
        begins, behind = layout.spans(samples)
        # The last of them that begins before the sample ends, if there is one.
        last = starts.searchsorted(behind) - 1
        return (last >= 0) & (np.append(ends, 0)[last] > begins)

    def read(
        self, source: TokenSource, begin: int, end: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        """Reads the positions from ``begin`` up to ``end``, excluded.

        Returns:
            the tokens, [end - begin] int64, ``PADDING`` behind the end of a document; the documents
            they come from, [n] int64; and the number of positions from each of them.
        """
        # The last document that starts at or before ``begin``: of several that start there, all
        # but the last are empty.
        first = int(self.starts.searchsorted(begin, side="right")) - 1
        last = int(self.starts.searchsorted(end, side="left"))
        bounds = self.starts[first : last + 1].tolist()
        offset = begin - bounds[0]
        bounds[0], bounds[-1] = begin, end
        lengths = [stop - start for start, stop in pairwise(bounds)]
        documents = self.documents[first:last]
        present = source.sequence_lengths[documents].tolist()
        pieces = []
        for document, length, tokens in zip(documents.tolist(), lengths, present, strict=True):
            missing = length - (tokens - offset)
            pieces.append(source.get(document, offset, length - max(missing, 0)))
            if missing > 0:
                pieces.append(np.full(missing, PADDING))
            offset = 0
        text = np.concatenate(pieces, dtype=np.int64)
        return text, documents.astype(np.int64), lengths
