"""The order of the text that a run has not read yet, in the form of Megatron's own GPTDataset.

Upstream's dataset keeps three arrays in its cache folder: the documents in order, where each sample
begins in them, and which sample is read in which place. :func:`stock_indices` writes down the rest
of a :class:`TokenStream` in these terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError
from megatron_tst.data.sample_layout import SampleLayout
from megatron_tst.data.stream import TokenStream

# Beside the permutations of the stream itself: the third word of a seed.
_LEFT_OF_PHASE_1 = 3


@dataclass(frozen=True)
class StockIndices:
    """What ``GPTDataset`` loads from its cache.

    Attributes:
        document_index: [documents of all epochs] int32.
        sample_index: [n, 2] int32: a document, by its place in ``document_index``, and the token
            in it. Rows 2 i and 2 i + 1 are where the i-th unread sample begins and ends.
        shuffle_index: [places of the run] uint32 or int64: the row at which the sample of a place
            begins; beyond the last row for places that are read already, so that reading one
            again fails.
    """

    document_index: NDArray[np.int32]
    sample_index: NDArray[np.int32]
    shuffle_index: NDArray[Any]

    def save(self, prefix: str) -> None:
        """Replaces the arrays of upstream's cache whose files begin with ``prefix``."""
        for name in ("document_index", "sample_index", "shuffle_index"):
            np.save(f"{prefix}-{name}.npy", getattr(self, name), allow_pickle=False)


def stock_indices(
    stream: TokenStream, layout: SampleLayout, samples_read: int, seed: int
) -> StockIndices:
    """Lays out what is left of a stream as plain samples.

    From the switch on these are the samples that the run itself would read, in its order. Samples
    of phase 1 that were not read come before them, each as ``s`` plain samples, shuffled.

    Args:
        stream: order of documents and samples.
        layout: of the run.
        samples_read: places of the run that are done.
        seed: random seed.

    Raises:
        UsageError: bags that keep to their document are left, which hold padding.
    """
    length, switch = layout.sequence_length, layout.phases[-1].first_sample
    layout = layout.with_more_bags(stream.more_bags.tolist())
    left_over = _left_of_bags(stream.samples[samples_read:switch], layout)
    np.random.RandomState([seed, 0, _LEFT_OF_PHASE_1]).shuffle(left_over)
    plain, _ = layout.spans(stream.samples[max(switch, samples_read) :])
    begins = np.concatenate([left_over, plain])[: len(stream.samples) - samples_read]
    return _indices(stream, begins, begins + length, samples_read)


def _left_of_bags(unread: NDArray[Any], layout: SampleLayout) -> NDArray[np.int64]:
    """Where the plain samples begin that samples of bags are made of."""
    if len(unread) and any(phase.document_multiple > 1 for phase in layout.phases):
        raise UsageError(
            f"{len(unread)} samples of phase 1 are left, and with --tst-document-boundary "
            "align they hold padding: take the checkpoint of the switch, or a later one."
        )
    firsts = np.array([phase.first_sample for phase in layout.phases])
    index = firsts.searchsorted(unread, side="right") - 1
    parts = np.array([phase.tokens_per_position for phase in layout.phases])[index]
    begins, _ = layout.spans(unread)
    part = np.arange(parts.sum()) - np.repeat(parts.cumsum() - parts, parts)
    return np.asarray(np.repeat(begins, parts) + part * layout.sequence_length, dtype=np.int64)


def _indices(
    stream: TokenStream, begins: NDArray[np.int64], ends: NDArray[np.int64], samples_read: int
) -> StockIndices:
    bounds = np.stack([begins, ends], axis=1).reshape(-1)
    # Of several documents that start there, all but the last are empty.
    documents = stream.starts.searchsorted(bounds, side="right") - 1
    if len(stream.documents) >= 2**31:
        raise UsageError(f"{len(stream.documents)} documents are too many for Megatron's index.")
    # Megatron takes the rows less one for the length of the dataset, and wants one of the run's.
    rows = max(len(bounds), len(stream.samples) + 1)
    sample_index = np.zeros((rows, 2), dtype=np.int32)
    sample_index[: len(bounds), 0] = documents
    sample_index[: len(bounds), 1] = bounds - stream.starts[documents]
    places = np.full(len(stream.samples), rows, dtype=np.uint32 if rows < 2**32 else np.int64)
    places[samples_read:] = np.arange(len(begins)) * 2
    return StockIndices(np.asarray(stream.documents, dtype=np.int32), sample_index, places)
