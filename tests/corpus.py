"""Small corpora in Megatron's format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray


def write_documents(path_prefix: Path, documents: Iterable[NDArray[np.int64]]) -> None:
    """Writes ``<path_prefix>.bin`` and ``.idx``."""
    builder = IndexedDatasetBuilder(f"{path_prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(f"{path_prefix}.idx")


def write_corpus(
    path_prefix: Path,
    document_lengths: Sequence[int],
    vocabulary_size: int | None = None,
    eod: int | None = None,
) -> list[NDArray[np.int64]]:
    """Writes a corpus whose n-th token has the id n, so that each token can be counted.

    Args:
        path_prefix: path without ``.bin`` or ``.idx``.
        document_lengths: tokens of each document.
        vocabulary_size: ids start again from 0 here; None lets every token have its own.
        eod: id that ends each document, in place of its last token.

    Returns:
        The documents.
    """
    tokens = np.arange(sum(document_lengths), dtype=np.int64)
    if vocabulary_size is not None:
        tokens %= vocabulary_size
    documents = np.split(tokens, np.cumsum(document_lengths)[:-1])
    if eod is not None:
        for document in documents:
            document[-1:] = eod
    write_documents(path_prefix, documents)
    return documents
