"""Folders that a conversion writes: never over something else, and only where they fit."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_tst.common.errors import UsageError


def check_output(output: Path, overwrite: bool, problem: str | None) -> None:
    """Refuses to replace a folder without being told to, and what such a tool has not written.

    Args:
        output: folder to write.
        overwrite: whether it may be replaced.
        problem: what an existing ``output`` is instead of an earlier result; None if it is one.

    Raises:
        UsageError: it exists and must stay.
    """
    if not output.exists():
        return
    if not overwrite:
        raise UsageError(f"--output {output} exists: pass --overwrite to replace it.")
    if problem:
        raise UsageError(
            f"--output {output} {problem}, so --overwrite does not remove it: name another folder."
        )


def check_disk(output: Path, needed: int) -> None:
    """Compares what will be written with the space that there is.

    Raises:
        UsageError: naming both in bytes.
    """
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"--output {output} needs {needed:,} bytes and its disk has {free:,} free: make room, "
            "or name a folder on another disk."
        )
