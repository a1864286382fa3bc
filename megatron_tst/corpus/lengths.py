"""How long the documents of a corpus are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError

_CHUNK = 1 << 22
# Longer documents are so rare that their lengths fit in memory one by one: there is one at most
# for every million tokens of text.
_COUNTED_LENGTHS = 1 << 20


@dataclass(frozen=True)
class LengthDistribution:
    """How many documents have how many tokens.

    Attributes:
        lengths: [n] int64, the lengths that occur, ascending.
        counts: [n] int64, documents of each length.
    """

    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def documents(self) -> int:
        """Number of documents, empty ones included."""
        return int(self.counts.sum())

    @property
    def empty(self) -> int:
        """Number of documents without tokens."""
        return int(self.counts[self.lengths == 0].sum())

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths @ self.counts)

    @property
    def mean(self) -> float:
        """Mean length."""
        return self.tokens / self.documents

    def quantile(self, share: float) -> int:
        """The smallest length that at least this share of the documents does not exceed."""
        at_most = np.cumsum(self.counts)
        return int(self.lengths[np.searchsorted(at_most, share * at_most[-1])])

    def binned(self, edges: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents and tokens from each edge up to the next, excluded.

        Args:
            edges: [bins + 1], ascending.

        Returns:
            [bins] int64 each.
        """
        bounds = np.searchsorted(self.lengths, edges)
        sums = [
            np.concatenate(([0], np.cumsum(numbers)))
            for numbers in (self.counts, self.counts * self.lengths)
        ]
        documents, tokens = (np.diff(total[bounds]) for total in sums)
        return documents, tokens


def length_distribution(lengths: NDArray[np.int32]) -> LengthDistribution:
    """Counts the lengths of all documents, in chunks: the index stays on disk.

    Args:
        lengths: [documents] int32, such as ``IndexedDataset.sequence_lengths``.

    Raises:
        UsageError: a negative length.
    """
    counts = np.zeros(_COUNTED_LENGTHS, dtype=np.int64)
    long_documents = []
    for begin in range(0, len(lengths), _CHUNK):
        chunk = lengths[begin : begin + _CHUNK]
        if chunk.min() < 0:
            raise UsageError(
                f"document {begin + int(chunk.argmin())} has {chunk.min()} tokens in the .idx "
                "file: it is damaged. Copy the file again."
            )
        counts += np.bincount(chunk[chunk < _COUNTED_LENGTHS], minlength=_COUNTED_LENGTHS)
        long_documents.append(chunk[chunk >= _COUNTED_LENGTHS])
    occurring = np.flatnonzero(counts)
    longer, longer_counts = np.unique(np.concatenate(long_documents), return_counts=True)
    return LengthDistribution(
        np.concatenate((occurring, longer)).astype(np.int64),
        np.concatenate((counts[occurring], longer_counts)),
    )
