"""Reads the tensors in the files of a checkpoint a few megabytes at a time, whatever their size.

``torch.distributed.checkpoint`` writes each shard as ``torch.save`` does, which is a zip archive
without compression: the numbers of a shard lie in its file one after the other, and are read from
there. Nothing is unpickled freely.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_tst.checkpoint.torch_dist_index import INCOMPLETE
from megatron_tst.common.errors import UsageError, raise_interrupt

PIECE_ELEMENTS = 4_000_000
"""Numbers that are read at once, at most."""


@dataclass(frozen=True)
class StoredShard:
    """A part of a tensor as it lies in a file.

    Attributes:
        key: of the tensor.
        offsets: its first position in every dimension of the tensor.
        sizes: its shape.
        dtype: of its numbers.
        path: the file.
        start: its first byte in the file.
        length: its bytes there, with what ``torch.save`` adds.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    start: int
    length: int

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Its place in the tensor."""
        return self.offsets, self.sizes

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return self.elements * self.dtype.itemsize

    def pieces(
        self,
        start: int = 0,
        end: int | None = None,
        on_checksum: Callable[[bool], object] | None = None,
    ) -> Iterator[Tensor]:
        """Its numbers from ``start`` to ``end``, in 1-D pieces of a few megabytes.

        Args:
            start: first number.
            end: the one behind the last; by default all to the end.
            on_checksum: told at the end, where all are read, whether they are the ones whose
                checksum ``torch.save`` wrote beside them.

        Raises:
            UsageError: the file cannot be read.
        """
        end = self.elements if end is None else end
        if self._place is None:
            yield self._unusual()[start:end]
            return
        checksum = 0
        with self.path.open("rb") as file:
            for first in range(start, end, PIECE_ELEMENTS):
                data = self._read(file, first, min(first + PIECE_ELEMENTS, end))
                if on_checksum:
                    checksum = zlib.crc32(data, checksum)
                yield torch.frombuffer(data, dtype=self.dtype)
        if on_checksum and end - start == self.elements:
            on_checksum(checksum == self._place[1])

    def _read(self, file: Any, first: int, last: int) -> bytearray:
        assert self._place is not None
        size = self.dtype.itemsize
        data = bytearray((last - first) * size)
        file.seek(self._place[0] + first * size)
        found = file.readinto(data)
        if found != len(data):
            raise UsageError(f"{self.path} ends within {self.key!r}: {INCOMPLETE}.")
        return data

    @cached_property
    def _place(self) -> tuple[int, int] | None:
        """Where its numbers begin in the file, and their checksum; None if not in one row."""
        try:
            with self.path.open("rb") as file:
                part: Any = _Part(file, self.start, self.length)
                described = torch.load(part, map_location="meta", weights_only=True)
                [record] = [
                    record
                    for record in zipfile.ZipFile(part).infolist()
                    if record.filename.endswith("/data/0")
                ]
                part.seek(record.header_offset)
                header = part.read(30)
        # A damaged file can fail in any way.
        except Exception as error:
            raise_interrupt(error)
            raise self._damaged(error) from error
        if described.shape != self.sizes or described.dtype != self.dtype:
            raise UsageError(
                f"{self.path} holds {list(described.shape)} numbers of {described.dtype} as "
                f"{self.key!r}, and the index {list(self.sizes)} of {self.dtype}: {INCOMPLETE}."
            )
        if record.file_size != self.bytes or not described.is_contiguous():
            return None
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return self.start + record.header_offset + len(header) + names, record.CRC

    def _unusual(self) -> Tensor:
        try:
            with self.path.open("rb") as file:
                part: Any = _Part(file, self.start, self.length)
                return torch.load(part, map_location="cpu", weights_only=True).flatten()
        except Exception as error:
            raise_interrupt(error)
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UsageError:
        return UsageError(
            f"{self.path}: {self.key!r} cannot be read ({error or type(error).__name__}): "
            f"{INCOMPLETE}."
        )


class _Part(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file = file
        self._start = start
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        left = max(0, self._length - self._position)
        self._file.seek(self._start + self._position)
        read: int = self._file.readinto(view[: min(len(view), left)])
        self._position += read
        return read


def shards_by_key(folder: Path, index: Metadata) -> dict[str, list[StoredShard]]:
    """The stored parts of each tensor, by place.

    A part that the index names and no file holds is not among them.

    Args:
        folder: of the iteration.
        index: of its tensors.
    """
    stored = index.storage_data or {}
    shards = {}
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        # A tensor in one part may be stored without a place.
        places = [(chunk, MetadataIndex(key, chunk.offsets)) for chunk in entry.chunks]
        shards[key] = sorted(
            (
                StoredShard(
                    key=key,
                    offsets=tuple(chunk.offsets),
                    sizes=tuple(chunk.sizes),
                    dtype=entry.properties.dtype,
                    path=folder / stored[place].relative_path,
                    start=stored[place].offset,
                    length=stored[place].length,
                )
                for chunk, place in places
                if place in stored
            ),
            key=lambda shard: shard.offsets,
        )
    return shards
