"""Writes Megatron's torch_dist checkpoints in one process: no process group, no model, no GPU.

``torch.distributed.checkpoint`` writes the files. It asks for the tensors one by one, so that a
model never has to be in memory as a whole.
"""

from __future__ import annotations

import io
import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_tst.checkpoint.torch_dist_index import FORMAT_FILE

# What torch.save adds to the data of a tensor, or takes for a small object, and what the index
# says about it; measured.
_OVERHEAD = 2_000
# Beyond it another file begins.
_FILE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class PlannedChunk:
    """One layer, or one expert, of a tensor that stacks them; or a whole tensor.

    Attributes:
        key: of the tensor.
        index: into the leading dimensions, such as the layer; empty for a whole tensor.
        size: shape of ``tensor[index]``.
        dtype: in the checkpoint.
        load: gives ``tensor[index]``, of any dtype.
    """

    key: str
    index: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return prod(self.size) * self.dtype.itemsize

    @property
    def box(self) -> ChunkStorageMetadata:
        """Its place in the tensor and its shape there, a size of 1 in every stacked dimension."""
        offsets = torch.Size((*self.index, *[0] * len(self.size)))
        return ChunkStorageMetadata(offsets, torch.Size((*[1] * len(self.index), *self.size)))

    def item(self, of_tensor: Sequence[int]) -> WriteItem:
        """What torch needs to write it as a part of a tensor of this shape."""
        properties = TensorProperties(dtype=self.dtype)
        data = TensorWriteData(self.box, properties, torch.Size(of_tensor))
        return WriteItem(
            MetadataIndex(self.key, self.box.offsets), WriteItemType.SHARD, tensor_data=data
        )


def checkpoint_bytes(chunks: Sequence[PlannedChunk], objects: int) -> int:
    """Disk space that tensors and so many small objects take, rounded up."""
    return sum(chunk.bytes for chunk in chunks) + _OVERHEAD * (len(chunks) + objects)


def write_checkpoint(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    chunks: Sequence[PlannedChunk],
    objects: Mapping[str, Any],
    advance: Callable[[], object],
) -> None:
    """Writes the folder of one iteration.

    Memory: the largest chunk, and what loading it takes.

    Args:
        folder: to create.
        shapes: global shape of every tensor by key.
        chunks: parts that make up all of the tensors.
        objects: what is not a tensor by key; ``COMMON_KEY`` among it, with ``args``. Bytes are
            written as they are.
        advance: called as each chunk was loaded.
    """
    items = [[WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]]
    size = 0
    for chunk in chunks:
        if size > _FILE_BYTES:
            items.append([])
            size = 0
        items[-1].append(chunk.item(shapes[chunk.key]))
        size += chunk.bytes
    # As if each file were that of a rank.
    plans, index = create_default_global_save_plan([SavePlan(of_file) for of_file in items])
    # One tensor after the other: nothing is on a GPU that copying ahead would hide the copies of.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    source = _Source(chunks, objects, advance)
    writer.finish(index, [writer.write_data(plan, source).wait() for plan in plans])
    # Last: Megatron takes a folder without it for no checkpoint.
    settings = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / FORMAT_FILE).write_text(json.dumps(settings), encoding="utf-8")


class _Source(DefaultSavePlanner):
    """Gives the writer what it asks for."""

    def __init__(
        self,
        chunks: Sequence[PlannedChunk],
        objects: Mapping[str, Any],
        advance: Callable[[], object],
    ) -> None:
        super().__init__()
        self._advance = advance
        self._chunks = {(chunk.key, chunk.box.offsets): chunk for chunk in chunks}
        self._objects = objects
        # One for all: torch holds on to the last tensor of every key until a file is complete.
        self._buffer = mmap.mmap(-1, max([1, *(chunk.bytes for chunk in chunks)]))

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            value = self._objects[write_item.index.fqn]
            if isinstance(value, bytes):
                return io.BytesIO(value)
            data = io.BytesIO()
            # Every object is wrapped in the list of its shards.
            torch.save([value], data)
            return data
        offsets = write_item.index.offset
        assert offsets is not None
        chunk = self._chunks[write_item.index.fqn, offsets]
        tensor = chunk.load()
        assert tensor.shape == chunk.size
        self._advance()
        written = torch.frombuffer(self._buffer, dtype=chunk.dtype, count=tensor.numel())
        return written.view(tensor.shape).copy_(tensor).view(chunk.box.sizes)
