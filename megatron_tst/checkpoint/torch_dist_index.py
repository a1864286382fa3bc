"""Finds torch_dist checkpoints, and reads the pickles in them without running what they say.

Three things in such a folder are pickles. None of them is unpickled freely: the index of the
tensors may hold the classes of ``torch.distributed.checkpoint``, the training arguments may hold
the classes that Megatron itself lists as safe, and tensors are read with ``weights_only``.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import warnings
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.distributed.checkpoint.metadata import Metadata

from megatron_tst.checkpoint.tracker import (
    TRACKER_FILE,
    found_in,
    missing_checkpoint,
    tracked_name,
)
from megatron_tst.common.errors import UsageError, raise_interrupt

INDEX_FILE = ".metadata"
"""The index of the tensors, in the folder of an iteration."""
FORMAT_FILE = "metadata.json"
"""Names the format, in the folder of an iteration."""
COMMON_KEY = "common_state/shard_0_1"
"""Stands for what is not a tensor, in the index."""
INCOMPLETE = "the save was interrupted or the copy is incomplete; copy it again or use an older one"
"""What a missing or damaged file means."""

_INDEX_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    # The prefix is that of a plan that --ckpt-assume-constant-structure keeps for the next save.
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
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
        UsageError: neither, a tracker that names none, or a checkpoint in another format.
    """
    if not path.is_dir():
        raise UsageError(f"--checkpoint {path} is not a folder.")
    tracker = path / TRACKER_FILE
    folder = _tracked(tracker, f"--checkpoint {path}") if tracker.is_file() else path
    if not (folder / FORMAT_FILE).is_file():
        if list(folder.glob("*.distcp")):
            if _is_of_torch(folder / INDEX_FILE):
                raise UsageError(
                    f"{folder} is a torch_dcp or fsdp_dtensor checkpoint, which no tool reads: "
                    "train with --ckpt-format torch_dist (--use-torch-fsdp2 works with it)."
                )
            raise UsageError(f"{folder} has no {FORMAT_FILE}: {INCOMPLETE}.")
        raise UsageError(
            f"--checkpoint {path} holds no torch_dist checkpoint: pass an iter_... folder or the "
            f"folder of --save, which has {TRACKER_FILE}, of a run with --ckpt-format torch_dist."
        )
    found = _read_format(folder / FORMAT_FILE)
    if found != "torch_dist":
        raise UsageError(
            f"{folder} is a {found} checkpoint: convert it with Megatron's --ckpt-convert-format "
            "torch_dist first."
        )
    return folder


def _tracked(tracker: Path, named: str) -> Path:
    name = tracked_name(tracker, "pass such a folder")
    folder = tracker.parent / name
    if not name:
        raise UsageError(
            f"{named}: {tracker} is empty, as a run leaves it that is killed while it is written: "
            f"pass one of its checkpoints (found: {found_in(tracker.parent)})."
        )
    if not folder.is_dir():
        raise missing_checkpoint(f"{named}: {tracker}", folder, "Pass one that is.")
    return folder


def whole_checkpoints(save: Path) -> dict[int, Path]:
    """The checkpoints by step that are in a folder of ``--save`` and were written to their end.

    Megatron writes :data:`FORMAT_FILE` when all other files of an iteration are there.
    """
    found = {}
    for file in save.glob(f"iter_*/{FORMAT_FILE}"):
        step = file.parent.name.removeprefix("iter_")
        if step.isdecimal() and (file.parent / INDEX_FILE).is_file() and is_torch_dist(file):
            found[int(step)] = file.parent
    return dict(sorted(found.items()))


def _is_of_torch(index: Path) -> bool:
    """Whether an index is that of a format of torch's own, which names the parts of the state."""
    try:
        return any(key.startswith("model.") for key in read_index(index).state_dict_metadata)
    except UsageError:
        return False


def is_torch_dist(format_file: Path) -> bool:
    """Whether a file is that of :data:`FORMAT_FILE` and names the format that is read here."""
    try:
        return _read_format(format_file) == "torch_dist"
    # Not written yet, or deleted since.
    except (UsageError, OSError):
        return False


def _read_format(path: Path) -> str:
    try:
        found: str = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path} names no format of a checkpoint ({error}): {INCOMPLETE}."
        ) from None
    return found


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Python 3.13 names the module that has the class, which 3.12 has not.
        module = "pathlib" if module == "pathlib._local" else module
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in an index of tensors")


def is_of_newer_torch(index: Path) -> bool:
    """Whether an index that this torch cannot read is whole: a newer torch wrote it then.

    Runs nothing of the file. What torch 2.15 writes, 2.14 cannot read; the other way round works.
    """
    try:
        data = index.read_bytes()
        *_, (last, _, end) = pickletools.genops(data)
    # A damaged pickle can fail in any way.
    except Exception:
        return False
    if last.name != "STOP" or end != len(data) - 1:
        return False
    try:
        _IndexUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        return "torch.distributed.checkpoint." in str(error)
    except Exception:
        return True
    return False


def newer_torch(index: Path) -> str:
    """What to say of an index that a newer torch wrote."""
    writer, remedy = "a newer torch", "that torch"
    recorded = torch_of_writer(index.parent)
    if recorded and is_newer_torch(recorded, torch.__version__):
        writer, remedy = f"torch {recorded}, a newer one", f"torch {recorded}"
    return (
        f"{index} is whole and was written by {writer} than {torch.__version__}, which runs "
        f"here and cannot read it: use {remedy} or a newer one. The files are not damaged"
    )


def older_torch(folder: Path, recorded: str) -> str:
    """What to say where a newer torch than that of a checkpoint will save."""
    return (
        f"{folder.name} was written by torch {recorded}, and torch {torch.__version__} runs here: "
        "the older one may not be able to read what this run saves."
    )


def is_newer_torch(version: str, other: str) -> bool:
    """Compares two versions of torch by their release, whatever they were compiled for."""
    return Version(version).release > Version(other).release


class _Unread:
    """Stands for what another torch may write otherwise, and what does not say where things lie."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _PlacesUnpickler(_IndexUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Python 3.13 names the module that has the class, which 3.12 has not.
        module = "pathlib" if module == "pathlib._local" else module
        is_of_index = module.startswith("torch.distributed.checkpoint.")
        if is_of_index and name not in ("Metadata", "MetadataIndex", "_StorageInfo"):
            return _Unread
        return super().find_class(module, name)


def torch_of_writer(folder: Path) -> str | None:
    """Version of the torch that wrote a checkpoint, which may be newer than the one that runs.

    Args:
        folder: ``iter_...`` or a release.

    Returns:
        None where it is not recorded, as by plain Megatron, or cannot be read.
    """
    try:
        index = _PlacesUnpickler(io.BytesIO((folder / INDEX_FILE).read_bytes())).load()
        [place] = [at for key, at in index.storage_data.items() if key.fqn == COMMON_KEY]
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            data = io.BytesIO(file.read(place.length))
        [common] = load_safely(data, folder)
        found = common["args"].tst_torch_version
        return found if isinstance(found, str) and Version(found) else None
    # Files of another torch, or of no torch, can be anything.
    except Exception:
        return None


def read_index(path: Path) -> Metadata:
    """The index of a checkpoint.

    Raises:
        UsageError: it is missing, damaged, written by a newer torch, or holds a class that is not
            allowed.
    """
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: {INCOMPLETE}.") from None
    # A damaged pickle can fail in any way.
    except Exception as error:
        raise_interrupt(error)
        if is_of_newer_torch(path):
            raise UsageError(f"{newer_torch(path)}.") from error
        raise UsageError(f"{path} cannot be read ({error}): {INCOMPLETE}.") from error
    if not isinstance(index, Metadata):
        raise UsageError(f"{path} holds a {type(index).__name__} and no index: {INCOMPLETE}.")
    return index


def load_safely(data: io.BytesIO, origin: Path) -> Any:
    """Unpickles what Megatron saved besides tensors.

    Args:
        data: as ``torch.save`` wrote it.
        origin: named in errors.

    Raises:
        UsageError: it is damaged, or holds a class that Megatron does not list as safe.
    """
    # Here, because importing Megatron takes seconds. It warns of GPU libraries not needed here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.safe_globals import SAFE_GLOBALS

    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(data, weights_only=True, map_location="cpu")
    # A damaged pickle can fail in any way.
    except Exception as error:
        raise_interrupt(error)
        raise UsageError(
            f"{origin}: the training arguments cannot be read ({error or type(error).__name__}): "
            "they are damaged, or hold a class that Megatron does not list as safe."
        ) from error
