"""Looks for what is wrong in a checkpoint: its files, its numbers and its counts.

Builds no model and reads a few megabytes at a time.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from megatron_tst.checkpoint.findings import COUNTS, FILES, Verification
from megatron_tst.checkpoint.saved_accounting import check_accounting
from megatron_tst.checkpoint.saved_state import SavedState, read_saved_state
from megatron_tst.checkpoint.value_checks import check_values
from megatron_tst.common.errors import UsageError
from megatron_tst.common.progress import CountCallback, no_progress


def verify_checkpoint(folder: Path, on_progress: CountCallback = no_progress) -> Verification:
    """Reads all of a checkpoint.

    Memory: some ten times ``PIECE_ELEMENTS`` (160 MB), and the index.

    Args:
        folder: of the iteration.
        on_progress: called with the megabytes that are read, and their number.

    Raises:
        UsageError: the index or the training arguments cannot be read.
    """
    state = read_saved_state(folder)
    shards = [shard for of_key in state.shards.values() for shard in of_key]
    result = Verification(folder, bytes=sum(shard.bytes for shard in shards))
    check_files(state, result)
    common = _common(state, result)
    check_values(state, result, common["args"] if common else Namespace(), on_progress)
    if common:
        # Of the working directory too.
        counts = check_accounting(folder.absolute().name, common)
        result.summary = counts.summary
        result.notes += counts.notes
        result.looked_at[COUNTS] += counts.compared
        for text in counts.faults:
            result.count(COUNTS, folder.name, 1, 0, text)
    return result


def _common(state: SavedState, result: Verification) -> dict[str, Any] | None:
    """What is not a tensor; None where it lies in a file that is not whole."""
    try:
        return state.source.read_common()
    except UsageError:
        if not result.faults:
            raise
        result.summary = "its training arguments are lost"
        return None


def check_files(state: SavedState, result: Verification) -> None:
    """Compares the files with the index; reads none."""
    needed: Counter[str] = Counter()
    for stored in (state.source.index.storage_data or {}).values():
        end = stored.offset + stored.length
        needed[stored.relative_path] = max(end, needed[stored.relative_path])
    for name, size in needed.items():
        path = state.source.folder / name
        found = path.stat().st_size if path.is_file() else None
        problem = "is missing" if found is None else f"has {found:,} of {size:,} bytes"
        result.count(FILES, name, int(found is None or found < size), 1, problem)
    for key, shape in state.source.shapes().items():
        missing = prod(shape) - sum(shard.elements for shard in state.shards[key])
        result.count(FILES, key, max(0, missing), 0, "lies in no file, by the index")
