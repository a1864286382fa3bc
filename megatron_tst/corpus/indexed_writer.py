"""Writes Megatron's indexed dataset without importing Megatron.

The import takes ten seconds and several gigabytes of packages, which a machine that prepares
data need not have. Format: ``megatron/core/datasets/indexed_dataset.py``, version 1; a test
compares every byte with that module's ``IndexedDatasetBuilder``.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt

from megatron_tst.common.atomic_files import flush
from megatron_tst.common.errors import UsageError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_LENGTH_BYTES = np.dtype(np.int32).itemsize
_LENGTHS_AT_ONCE = 1 << 20
_MAX_DOCUMENT_TOKENS = 2**31 - 1  # the format holds lengths as int32
_DTYPE_CODES: dict[np.dtype[Any], int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type of the format that holds every id of the vocabulary.

    Megatron has two rules: ``DType.optimal_dtype`` turns to int32 at 65500 entries, while
    ``GPTDatasetConfig.token_dtype_code``, used instead of the file's header under
    ``--per-dataset-sequences-path``, expects uint16 up to 65536. The second can misread a file
    that disagrees; the first cannot, so the second is followed.
    """
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.int32)


def check_document_tokens(where: str, tokens: int) -> None:
    """Refuses a document whose length the format cannot hold.

    Args:
        where: what to call the document in the error.
        tokens: its length.

    Raises:
        UsageError: it is too long.
    """
    if tokens > _MAX_DOCUMENT_TOKENS:
        raise UsageError(
            f"{where} has {tokens} tokens, and a document of a corpus at most "
            f"{_MAX_DOCUMENT_TOKENS}: split it into several documents."
        )


@dataclass(frozen=True)
class IndexHeader:
    """Start of an index.

    Attributes:
        dtype: type of the ids.
        sequences: number of sequences, whose lengths follow as int32 at byte ``SIZE``.
        documents: number of document boundaries; one more than documents.
    """

    SIZE: ClassVar[int] = len(_MAGIC) + struct.calcsize("<QBQQ")

    dtype: np.dtype[Any]
    sequences: int
    documents: int

    @classmethod
    def read(cls, path: Path) -> IndexHeader:
        """Reads the header of an index.

        Raises:
            UsageError: the file is no index, or its ids have a type that is not written here.
        """
        with path.open("rb") as file:
            content = file.read(cls.SIZE)
        dtypes = {code: dtype for dtype, code in _DTYPE_CODES.items()}
        if len(content) == cls.SIZE and content.startswith(_MAGIC):
            version, code, sequences, documents = struct.unpack_from("<QBQQ", content, len(_MAGIC))
            if version == _VERSION and code in dtypes:
                return cls(dtypes[code], sequences, documents)
        raise UsageError(f"{path} is no index of uint16 or int32 tokens: make this corpus again.")

    def write(self, file: BinaryIO) -> None:
        """Writes the header."""
        file.write(_MAGIC)
        code = _DTYPE_CODES[self.dtype]
        file.write(struct.pack("<QBQQ", _VERSION, code, self.sequences, self.documents))


class IndexedDatasetWriter:
    """Appends documents to ``bin_path``; leaving the context writes the index to ``idx_path``.

    Memory does not grow with the documents: their lengths are in the file ``lengths_path`` beside
    the index. It stays, so that work can go on until all is known to be complete.

    Args:
        bin_path: tokens of all documents, one after the other.
        idx_path: token count, byte offset and number of each document.
        dtype: uint16 or int32.
        documents: documents to keep of files that an earlier writer left without an index; what it
            wrote behind them is cut off.
        tokens: tokens of those documents.

    Raises:
        UsageError: the files hold less than is to be kept.
    """

    def __init__(
        self,
        bin_path: Path,
        idx_path: Path,
        dtype: np.dtype[Any],
        documents: int = 0,
        tokens: int = 0,
    ) -> None:
        self.lengths_path = idx_path.with_name(idx_path.name + ".lengths")
        self._bin = _open_to_append(bin_path, tokens * dtype.itemsize)
        self._lengths = _open_to_append(self.lengths_path, documents * _LENGTH_BYTES)
        self._idx_path = idx_path
        self._dtype = dtype
        self.documents = documents
        self.tokens = tokens

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self.flush_to_disk()
        self._bin.close()
        self._lengths.close()
        if kind is None:
            self._write_index()

    def add_documents(self, tokens: npt.NDArray[np.integer], lengths: list[int]) -> None:
        """Appends documents.

        Args:
            tokens: [sum of lengths] ids in the writer's dtype.
            lengths: tokens of each document.

        Raises:
            UsageError: a document is too long for the format.
        """
        check_document_tokens(f"a document of {self._idx_path}", max(lengths, default=0))
        assert tokens.dtype == self._dtype
        assert tokens.size == sum(lengths)
        self._bin.write(np.ascontiguousarray(tokens).data)
        self._lengths.write(np.array(lengths, dtype=np.int32).tobytes())
        self.documents += len(lengths)
        self.tokens += tokens.size

    def flush_to_disk(self) -> None:
        """Returns once what was added would survive a failure of the machine."""
        for file in (self._bin, self._lengths):
            flush(file)

    def _write_index(self) -> None:
        with self._idx_path.open("wb") as idx, self.lengths_path.open("rb") as lengths:
            IndexHeader(self._dtype, self.documents, self.documents + 1).write(idx)
            shutil.copyfileobj(lengths, idx)
            end = 0
            for some in _read_lengths(self.lengths_path):
                ends = end + np.cumsum(some, dtype=np.int64) * self._dtype.itemsize
                idx.write(np.concatenate(([end], ends[:-1])).astype(np.int64).tobytes())
                end = int(ends[-1])
            # Megatron's sequences and documents coincide here: document n is sequence n.
            for first in range(0, self.documents + 1, _LENGTHS_AT_ONCE):
                last = min(first + _LENGTHS_AT_ONCE, self.documents + 1)
                idx.write(np.arange(first, last, dtype=np.int64).tobytes())
            flush(idx)


def _open_to_append(path: Path, size: int) -> BinaryIO:
    """Opens a file for writing behind its first ``size`` bytes."""
    file = path.open("r+b" if size else "wb")
    if os.fstat(file.fileno()).st_size < size:
        raise UsageError(
            f"{path} is shorter than the {size} bytes written before: pass --start-anew."
        )
    file.truncate(size)
    file.seek(size)
    return file


def _read_lengths(path: Path) -> Iterator[npt.NDArray[np.int32]]:
    with path.open("rb") as file:
        while some := file.read(_LENGTHS_AT_ONCE * _LENGTH_BYTES):
            yield np.frombuffer(some, dtype=np.int32)
