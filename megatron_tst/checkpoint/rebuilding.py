"""Writes a checkpoint anew with master weights that are made from its weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_tst.checkpoint.output_folder import check_disk
from megatron_tst.checkpoint.saved_accounting import param_groups
from megatron_tst.checkpoint.saved_state import SavedState, read_saved_state
from megatron_tst.checkpoint.torch_dist_index import COMMON_KEY
from megatron_tst.checkpoint.torch_dist_writer import (
    PlannedChunk,
    checkpoint_bytes,
    write_checkpoint,
)
from megatron_tst.checkpoint.tracker import TRACKER_FILE
from megatron_tst.common.atomic_files import replacing_folder
from megatron_tst.common.errors import UsageError
from megatron_tst.common.progress import CountCallback, no_progress

# Megatron stacks layers, and experts, before the two dimensions of a matrix.
_MATRIX = 2


_FLAG = "--rebuild-masters"


def refuse_existing(output: Path) -> None:
    """Refuses to replace anything.

    Raises:
        UsageError: ``output`` exists.
    """
    if output.exists():
        raise UsageError(f"{_FLAG} {output} exists: name a folder that does not.")


def rebuild_masters(folder: Path, output: Path, on_progress: CountCallback = no_progress) -> Path:
    """Writes a checkpoint with masters made from the weights, and moments of zero.

    The moments start anew, and with them Adam's count of steps, because nothing tells which of them
    are right. Step, data, learning rate and random numbers go on where they were. Weights are
    masters rounded to the dtype of the model: what the masters had beyond it is lost.

    Memory: the largest matrix, which is mostly the embedding, and its copies while it is written.

    Args:
        folder: of the iteration.
        output: folder to write, for ``--load``; it appears whole or not at all.
        on_progress: called with the parts that are written, and their number.

    Returns:
        The folder of the iteration that was written.

    Raises:
        UsageError: there are no masters by weight in it, a weight is missing, ``output`` exists, or
            the disk is too small.
    """
    # A link stays, and what it points to is written.
    output = output.resolve()
    refuse_existing(output)
    state = read_saved_state(folder)
    if state.buckets or not any(weight.masters for weight in state.weights.values()):
        raise UsageError(
            f"{_FLAG}: {folder} has no master weights beside its weights"
            f"{', only rows of many of them' if state.buckets else ''}: resume with "
            "--no-load-optim, which makes the masters from the weights."
        )
    chunks = _chunks(state)
    objects = _objects(state)
    needed = checkpoint_bytes(chunks, len(objects)) + sum(map(_size, objects.values()))
    check_disk(output, needed, _FLAG)
    step = int(objects[COMMON_KEY]["iteration"])
    # As Megatron looks for it, whatever the folder is called.
    name = f"iter_{step:07d}"
    on_progress(0, len(chunks))
    done = itertools.count(1)
    with replacing_folder(output) as temporary:

        def advance() -> None:
            on_progress(next(done), len(chunks))

        write_checkpoint(temporary / name, state.source.shapes(), chunks, objects, advance)
        (temporary / TRACKER_FILE).write_text(str(step), encoding="utf-8")
    return output / name


def _chunks(state: SavedState) -> list[PlannedChunk]:
    chunks = []
    for weight in state.weights.values():
        masters = [shard.key for shard in weight.masters[:1]]
        if masters and not weight.shards:
            raise UsageError(f"{_FLAG}: {masters[0]} has no weight {weight.key} to be made from.")
        if weight.shards:
            chunks += _of_tensor(state, weight.key, partial(state.source.read, weight.key))
        for key in {shards[0].key for shards in weight.state.values() if shards}:
            load = partial(state.source.read, weight.key) if key in masters else None
            chunks += _of_tensor(state, key, load)
    return chunks


def _of_tensor(
    state: SavedState, key: str, load: Callable[[tuple[int, ...]], Tensor] | None
) -> list[PlannedChunk]:
    """A chunk for each matrix; zeros without ``load``."""
    shape, dtype = state.source.shapes()[key], state.source.dtype(key)
    stacked, size = shape[:-_MATRIX], shape[-_MATRIX:]
    make = load or (lambda index: torch.zeros(size, dtype=dtype))
    return [
        PlannedChunk(key, index, size, dtype, partial(make, index))
        for index in product(*map(range, stacked))
    ]


def _objects(state: SavedState) -> dict[str, Any]:
    """What is not a tensor: as it is, but for the optimizer's count of steps."""
    source = state.source
    objects: dict[str, Any] = {
        key: _raw(state, key)
        for key, entry in source.index.state_dict_metadata.items()
        if not isinstance(entry, TensorStorageMetadata) and key != COMMON_KEY
    }
    common = source.read_common()
    for group in param_groups(common.get("optimizer")):
        if "step" in group:
            group["step"] = 0 * group["step"]
    _clear_common_step(common.get("optimizer"))
    return {COMMON_KEY: common, **objects}


def _clear_common_step(state: Any) -> None:
    """Where the count is not in the groups of parameters, but once beside them."""
    if not isinstance(state, dict):
        return
    for name, value in state.items():
        if name == "common_step":
            state[name] = 0 * value
        else:
            _clear_common_step(value)


def _raw(state: SavedState, key: str) -> bytes:
    stored = state.source.index.storage_data[MetadataIndex(key)]
    with (state.source.folder / stored.relative_path).open("rb") as file:
        file.seek(stored.offset)
        return file.read(stored.length)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, bytes) else 40_000
