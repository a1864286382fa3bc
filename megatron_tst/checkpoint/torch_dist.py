"""Reads Megatron's torch_dist checkpoints in one process: no process group, no model, no GPU.

Three things in such a folder are pickles. None of them is unpickled freely: the index of the
tensors may hold the classes of ``torch.distributed.checkpoint``, the training arguments may hold
the classes that Megatron itself lists as safe, and tensors are read with ``weights_only``.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

_TRACKER_FILE = "latest_checkpointed_iteration.txt"
_FORMAT_FILE = "metadata.json"
_INDEX_FILE = ".metadata"
_LEGACY_COMMON_FILE = "common.pt"
_COMMON_KEY = "common_state/shard_0_1"
_INCOMPLETE = (
    "the save was interrupted or the copy is incomplete; copy it again or use an older one"
)

_INDEX_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


def find_checkpoint(path: Path) -> Path:
    """The folder of one iteration: ``path`` itself, or the latest one saved under it.

    Raises:
        ValueError: neither, or a checkpoint in another format.
    """
    if not path.is_dir():
        raise ValueError(f"--checkpoint {path} is not a folder.")
    folder = path
    tracker = path / _TRACKER_FILE
    if tracker.is_file():
        latest = tracker.read_text(encoding="utf-8").strip()
        folder = path / (f"iter_{int(latest):07d}" if latest.isdecimal() else latest)
    if not (folder / _FORMAT_FILE).is_file():
        if list(folder.glob("*.distcp")):
            raise ValueError(f"{folder} has no {_FORMAT_FILE}: {_INCOMPLETE}.")
        raise ValueError(
            f"--checkpoint {path} holds no torch_dist checkpoint: pass an iter_... folder or the "
            f"folder of --save, which has {_TRACKER_FILE}, of a run with --ckpt-format torch_dist."
        )
    found = json.loads((folder / _FORMAT_FILE).read_text(encoding="utf-8")).get("sharded_backend")
    if found != "torch_dist":
        raise ValueError(
            f"{folder} is a {found} checkpoint: convert it with Megatron's --ckpt-convert-format "
            "torch_dist first."
        )
    return folder


class TorchDistCheckpoint:
    """A torch_dist checkpoint of one iteration.

    Args:
        folder: ``iter_...``, with ``.metadata`` and ``.distcp`` files.

    Raises:
        ValueError: the index is missing, damaged, or holds a class that is not allowed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = _read_index(folder / _INDEX_FILE)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor by key, optimizer state included."""
        return {
            key: tuple(entry.size)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read_tensor(self, key: str) -> Tensor:
        """One tensor, joined from all its shards, on the CPU in its stored dtype.

        Raises:
            ValueError: a shard is missing or damaged.
        """
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        # Rows that no shard covers would stay uninitialised.
        if sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size):
            raise ValueError(f"{self.folder}: shards of {key!r} are missing: {_INCOMPLETE}.")
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        self._load({key: tensor})
        return tensor

    def read_common(self) -> dict[str, Any]:
        """What is not a tensor: training arguments (``args``), ``iteration``, ...

        Raises:
            ValueError: it is missing, damaged, or holds a class that is not allowed.
        """
        legacy = self.folder / _LEGACY_COMMON_FILE
        if legacy.is_file():
            return dict(_load_safely(io.BytesIO(legacy.read_bytes()), legacy))
        if _COMMON_KEY not in self._metadata.state_dict_metadata:
            raise ValueError(f"{self.folder} has no training arguments: {_INCOMPLETE}.")
        state: dict[str, Any] = {_COMMON_KEY: io.BytesIO()}
        self._load(state)
        # Every saved object is wrapped in the list of its shards.
        return dict(_load_safely(state[_COMMON_KEY], self.folder)[0])

    def _load(self, state: dict[str, Any]) -> None:
        for key in state:
            self._check_files(key)
        reader = _IndexedReader(self.folder, self._metadata)
        try:
            with warnings.catch_warnings():
                # It warns that there is no process group, which is the point.
                warnings.simplefilter("ignore", UserWarning)
                load(state, storage_reader=reader, planner=_RawBytesPlanner(), no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise ValueError(
                f"{self.folder}: {', '.join(state)} cannot be read ({cause}): {_INCOMPLETE}."
            ) from error

    def _check_files(self, key: str) -> None:
        for index, stored in self._metadata.storage_data.items():
            if index.fqn != key:
                continue
            path = self.folder / stored.relative_path
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < stored.offset + stored.length:
                problem = "is missing" if size is None else f"ends after {size} bytes"
                raise ValueError(f"{path} {problem}, and {key!r} lies in it: {_INCOMPLETE}.")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in an index of tensors")


def _read_index(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: {_INCOMPLETE}.") from None
    # A damaged pickle can fail in any way.
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}): {_INCOMPLETE}.") from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{path} holds a {type(index).__name__} and no index: {_INCOMPLETE}.")
    return index


class _IndexedReader(FileSystemReader):
    """Takes the index as read above; the base class would unpickle it freely."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._index = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _RawBytesPlanner(DefaultLoadPlanner):
    """Hands objects over as the bytes they are; the base class would unpickle them freely."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = value


def _load_safely(data: io.BytesIO, origin: Path) -> Any:
    # Here, because importing Megatron takes seconds. It warns of GPU libraries not needed here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.safe_globals import SAFE_GLOBALS

    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(data, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{origin}: the training arguments cannot be read ({error}): "
            "they are damaged, or hold a class that Megatron does not list as safe."
        ) from error
