"""Text from random places of a corpus, for estimates that need not read all of it.

Nothing here depends on torch or Megatron.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError
from megatron_tst.data.stream import TokenSource

GROUP_BITS = 11
"""The documents of a sample are dealt out to at most two to this power groups."""

ID_BITS = 26
"""Token ids lie below two to this power."""

# Short, so that a sample comes from as many documents as can be: few documents share words of
# their own at every distance, which a sample of them takes for mutual information.
_STRETCH = 32
# Stretches without usable positions (short documents) must not lead through a whole corpus.
_READ_LIMIT = 8


class IndexedCorpus(TokenSource, Protocol):
    """Megatron's IndexedDataset, as far as it is read here."""

    sequence_lengths: NDArray[np.int32]
    index: Any


@dataclass(frozen=True)
class TokenSample:
    """Text from random places of a corpus.

    Attributes:
        tokens: [n] int32, pieces of documents one after the other.
        positions: [m] int32, indices into ``tokens`` whose piece goes on for ``max_distance``
            tokens.
        groups: [m] int16, the group of the document of each position. The documents are dealt out
            to the groups; each has its own where they are few.
        max_distance: largest distance that can be measured.
        documents: documents with a position.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    groups: NDArray[np.int16]
    max_distance: int
    documents: int

    def quarter(self) -> TokenSample:
        """Every fourth position."""
        return TokenSample(
            self.tokens,
            self.positions[::4],
            self.groups[::4],
            self.max_distance,
            self.documents,
        )


def sample_tokens(
    corpus: IndexedCorpus,
    max_distance: int,
    pairs: int,
    across_documents: bool = False,
    seed: int = 0,
) -> TokenSample:
    """Reads stretches of text at random places, without replacement, until there are enough pairs.

    All positions that have ``max_distance`` tokens behind them in their document are equally
    likely. Memory grows with ``pairs`` only.

    Args:
        corpus: the corpus.
        max_distance: largest distance to measure.
        pairs: pairs at each distance; fewer if the corpus has fewer.
        across_documents: pair tokens of neighbouring documents too.
        seed: of the choice of places.

    Raises:
        UsageError: no document is long enough, or an id is no token.
    """
    stretches = -(-_total_tokens(corpus) // _STRETCH)
    count = min(stretches, _READ_LIMIT * -(-pairs // _STRETCH))
    tokens: list[NDArray[np.int32]] = []
    starts: list[NDArray[np.int32]] = []
    documents: list[tuple[int, int]] = []
    length = found = 0
    for place in random.Random(seed).sample(range(stretches), count):
        end = (place + 1) * _STRETCH
        for document, piece in _pieces(corpus, end, max_distance, across_documents):
            usable = min(len(piece) - max_distance, pairs - found)
            if usable > 0:
                tokens.append(piece.astype(np.int32))
                starts.append(np.arange(length, length + usable, dtype=np.int32))
                documents.append((document, usable))
                length += len(piece)
                found += usable
        if found >= pairs:
            break
    if not found:
        raise UsageError(
            f"no document has more than {max_distance} tokens: use a smaller --max-distance, or "
            "pair tokens of neighbouring documents with --across-documents."
        )
    numbers, usable_positions = np.array(documents, dtype=np.int64).T
    text = np.concatenate(tokens)
    _check_ids(text)
    distinct, order = np.unique(numbers, return_inverse=True)
    groups = (order % (1 << GROUP_BITS)).astype(np.int16)
    return TokenSample(
        tokens=text,
        positions=np.concatenate(starts),
        groups=np.repeat(groups, usable_positions),
        max_distance=max_distance,
        documents=len(distinct),
    )


def _total_tokens(corpus: IndexedCorpus) -> int:
    last_start = int(corpus.index.sequence_pointers[-1]) // corpus.index.dtype_size
    return last_start + int(corpus.sequence_lengths[-1])


def _pieces(
    corpus: IndexedCorpus, stretch_end: int, look_ahead: int, across_documents: bool
) -> Iterator[tuple[int, NDArray[Any]]]:
    """The documents in a stretch and its look-ahead, or all of that text as one piece."""
    begin, end = stretch_end - _STRETCH, min(stretch_end + look_ahead, _total_tokens(corpus))
    offsets, size = corpus.index.sequence_pointers, corpus.index.dtype_size
    # Not searchsorted, which first copies an array that is not aligned, as this one in its file.
    # The last document that starts at or before ``begin``: of several, all but it are empty.
    first = bisect_right(offsets, begin * size) - 1
    last = bisect_left(offsets, end * size)
    pieces = []
    for document in range(first, last):
        start = int(offsets[document]) // size
        skipped = max(begin - start, 0)
        length = min(end - start, int(corpus.sequence_lengths[document])) - skipped
        pieces.append((document, corpus.get(document, skipped, length)))
    if across_documents:
        pieces = [(first, np.concatenate([piece for _, piece in pieces]))]
    yield from pieces


def _check_ids(tokens: NDArray[np.int32]) -> None:
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < 1 << ID_BITS:
            raise UsageError(
                f"the corpus holds {token}, which is no token id (0 to {(1 << ID_BITS) - 1}): "
                "tokenize it again with tst preprocess."
            )
