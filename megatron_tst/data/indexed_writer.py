"""Writes Megatron's indexed dataset without importing Megatron.

The import takes ten seconds and several gigabytes of packages, which a machine that prepares
data need not have. Format: ``megatron/core/datasets/indexed_dataset.py``, version 1; a test
compares every byte with that module's ``IndexedDatasetBuilder``.
"""

from __future__ import annotations

import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type of the format that holds every id of the vocabulary.

    Megatron has two rules: ``DType.optimal_dtype`` turns to int32 at 65500 entries, while
    ``GPTDatasetConfig.token_dtype_code``, used instead of the file's header under
    ``--per-dataset-sequences-path``, expects uint16 up to 65536. The second can misread a file
    that disagrees; the first cannot, so the second is followed.
    """
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.int32)


class IndexedDatasetWriter:
    """Appends documents to ``bin_path``; leaving the context writes the index to ``idx_path``.

    Args:
        bin_path: tokens of all documents, one after the other.
        idx_path: token count, byte offset and number of each document.
        dtype: uint16 or int32.
    """

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype[Any]) -> None:
        self._bin = bin_path.open("wb")
        self._idx_path = idx_path
        self._dtype = dtype
        self._lengths = array("i")

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bin.close()
        if kind is None:
            self._write_index()

    def add_documents(self, tokens: npt.NDArray[np.integer], lengths: list[int]) -> None:
        """Appends documents.

        Args:
            tokens: [sum of lengths] ids in the writer's dtype.
            lengths: tokens of each document.
        """
        assert tokens.dtype == self._dtype
        assert tokens.size == sum(lengths)
        self._bin.write(tokens.tobytes())
        self._lengths.extend(lengths)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        # Megatron's sequences and documents coincide here: document n is sequence n.
        document_bounds = np.arange(lengths.size + 1, dtype=np.int64)
        with self._idx_path.open("wb") as idx:
            idx.write(_MAGIC)
            idx.write(struct.pack("<QB", _VERSION, _DTYPE_CODES[self._dtype]))
            idx.write(struct.pack("<QQ", lengths.size, document_bounds.size))
            idx.write(lengths.tobytes())
            idx.write(np.concatenate(([0], ends[:-1])).astype(np.int64).tobytes())
            idx.write(document_bounds.tobytes())
