"""Reads Megatron's torch_dist checkpoints in one process: no process group, no model, no GPU.

A tensor can be read a layer, or an expert, at a time, at whatever parallel layout it was saved.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_tst.checkpoint.argument_names import add_current_names
from megatron_tst.checkpoint.torch_dist_index import (
    COMMON_KEY,
    INCOMPLETE,
    INDEX_FILE,
    load_safely,
    read_index,
)
from megatron_tst.common.errors import UsageError, raise_interrupt

_LEGACY_COMMON_FILE = "common.pt"


class TorchDistCheckpoint:
    """A torch_dist checkpoint of one iteration.

    Args:
        folder: ``iter_...``, with ``.metadata`` and ``.distcp`` files.

    Raises:
        UsageError: the index is missing, damaged, or holds a class that is not allowed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_index(folder / INDEX_FILE)
        self._reader = _IndexedReader(folder, self._metadata)
        # By key and number of indices: the shards that overlap each index.
        self._shards: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    @property
    def index(self) -> Metadata:
        """What lies where."""
        return self._metadata

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor by key, optimizer state included."""
        return {
            key: tuple(entry.size)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def dtype(self, key: str) -> torch.dtype:
        """The stored dtype of a tensor."""
        return self._entry(key).properties.dtype

    def check_complete(self, keys: Collection[str]) -> None:
        """Checks, without reading any data, that all shards of some tensors are there.

        Raises:
            UsageError: naming a file that is missing or cut off, or a tensor that lacks a shard.
        """
        for key in keys:
            # Rows that no shard covers would stay uninitialised.
            entry = self._metadata.state_dict_metadata[key]
            if isinstance(entry, TensorStorageMetadata) and (
                sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size)
            ):
                raise UsageError(f"{self.folder}: shards of {key!r} are missing: {INCOMPLETE}.")
        sizes: dict[str, int | None] = {}
        for index, stored in self._metadata.storage_data.items():
            if index.fqn not in keys:
                continue
            path = self.folder / stored.relative_path
            if stored.relative_path not in sizes:
                sizes[stored.relative_path] = path.stat().st_size if path.is_file() else None
            size = sizes[stored.relative_path]
            if size is None or size < stored.offset + stored.length:
                problem = "is missing" if size is None else f"ends after {size} bytes"
                raise UsageError(f"{path} {problem}, and {index.fqn!r} lies in it: {INCOMPLETE}.")

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """``tensor[index]``, joined from the shards that overlap it, on the CPU.

        Memory: the result and the largest of these shards. Megatron saves every layer and every
        expert as a shard of its own, or as several.

        Args:
            key: of the tensor.
            index: into the leading dimensions, such as the layer; empty for the whole tensor.

        Returns:
            A contiguous tensor of the stored dtype.

        Raises:
            UsageError: a shard is missing or damaged.
        """
        size = self._entry(key).size[len(index) :]
        zeros = (0,) * len(size)
        return self.read_chunk(key, (*index, *zeros), size, len(index))

    def read_chunk(
        self, key: str, offsets: Sequence[int], size: Sequence[int], indices: int = 0
    ) -> Tensor:
        """A box of a tensor, read like :meth:`read`.

        Args:
            key: of the tensor.
            offsets: first position of the box in every dimension.
            size: of the box, in the dimensions after the leading ``indices``.
            indices: number of leading dimensions in which the box has size 1, and which the result
                does not have.
        """
        entry = self._entry(key)
        shards = self._overlapping(key, tuple(offsets[:indices]))
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size((*[1] * indices, *size)))
        items = create_read_items_for_chunk_list(
            key, TensorStorageMetadata(entry.properties, entry.size, shards), [box]
        )
        if sum(prod(item.lengths) for item in items) != prod(box.sizes):
            raise UsageError(f"{self.folder}: shards of {key!r} are missing: {INCOMPLETE}.")
        target = torch.empty(box.sizes, dtype=entry.properties.dtype)
        self._read(items, _Target(target))
        return target.view(tuple(size))

    def read_common(self) -> dict[str, Any]:
        """What is not a tensor: training arguments (``args``), ``iteration``, ...

        Arguments that have another name today have both.

        Raises:
            UsageError: it is missing, damaged, or holds a class that is not allowed, or there are
                no training arguments in it.
        """
        legacy = self.folder / _LEGACY_COMMON_FILE
        if legacy.is_file():
            return _checked(load_safely(io.BytesIO(legacy.read_bytes()), legacy), legacy)
        if COMMON_KEY not in self._metadata.state_dict_metadata:
            raise UsageError(f"{self.folder} has no training arguments: {INCOMPLETE}.")
        self.check_complete([COMMON_KEY])
        position = MetadataIndex(COMMON_KEY)
        zero = torch.Size([0])
        item = ReadItem(LoadItemType.BYTE_IO, position, zero, position, zero, zero)
        target = _Target(torch.empty(0))
        self._read([item], target)
        # Every saved object is wrapped in the list of its shards.
        [common] = load_safely(target.data, self.folder)
        return _checked(common, self.folder)

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def _overlapping(self, key: str, index: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """Shards of ``tensor[index]``: looking at all shards for every slice takes minutes."""
        depth = len(index)
        if (key, depth) not in self._shards:
            by_index = defaultdict(list)
            for shard in self._entry(key).chunks:
                ends = map(sum, zip(shard.offsets[:depth], shard.sizes[:depth], strict=True))
                for overlapped in product(*map(range, shard.offsets[:depth], ends)):
                    by_index[overlapped].append(shard)
            self._shards[key, depth] = dict(by_index)
        return self._shards[key, depth].get(index, [])

    def _read(self, items: list[ReadItem], target: _Target) -> None:
        try:
            self._reader.read_data(LoadPlan(items), target).wait()
        # Damaged data can fail in any way.
        except Exception as error:
            raise_interrupt(error)
            stored = self._metadata.storage_data
            files = sorted({stored[item.storage_index].relative_path for item in items})
            raise UsageError(
                f"{self.folder}: {items[0].dest_index.fqn!r} cannot be read from "
                f"{', '.join(files)} ({error or type(error).__name__}): {INCOMPLETE}."
            ) from error


def _checked(common: Any, origin: Path) -> dict[str, Any]:
    """Other programs save in this format as well, and without Megatron's arguments."""
    if not isinstance(common, dict) or not isinstance(common.get("args"), Namespace):
        raise UsageError(
            f"{origin} holds no training arguments: pass a checkpoint that megatron.training saved."
        )
    add_current_names(common["args"])
    return common


class _IndexedReader(FileSystemReader):
    """Takes the index that was read safely; the base class would unpickle it freely."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.storage_data = metadata.storage_data


class _Target(DefaultLoadPlanner):
    """Takes what is read: a tensor, or an object as the bytes it is, which are never unpickled."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensor = tensor
        self.data = io.BytesIO()

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.data = value
