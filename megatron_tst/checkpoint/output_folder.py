"""Folders that a conversion writes: whole or not at all, and never over something else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(output: Path, overwrite: bool, problem: str | None) -> None:
    """Refuses to replace a folder without being told to, and what such a tool has not written.

    Args:
        output: folder to write.
        overwrite: whether it may be replaced.
        problem: what an existing ``output`` is instead of an earlier result; None if it is one.

    Raises:
        ValueError: it exists and must stay.
    """
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"--output {output} exists: pass --overwrite to replace it.")
    if problem:
        raise ValueError(
            f"--output {output} {problem}, so --overwrite does not remove it: name another folder."
        )


def check_disk(output: Path, needed: int) -> None:
    """Compares what will be written with the space that there is.

    Raises:
        ValueError: naming both in bytes.
    """
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"--output {output} needs {needed:,} bytes and its disk has {free:,} free: make room, "
            "or name a folder on another disk."
        )


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Gives a temporary folder beside ``output`` that takes its place at the end.

    Where the body fails, ``output`` stays as it was and the temporary folder is removed.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.writing-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        _move_into_place(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, output: Path) -> None:
    # A folder cannot be replaced in one step: the old one steps aside and is removed last.
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(temporary, output)
    except OSError:
        if old.exists():
            os.replace(old, output)
        raise
    if old.is_dir():
        shutil.rmtree(old)
