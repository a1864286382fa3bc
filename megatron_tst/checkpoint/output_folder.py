"""Folders that a conversion writes: never over something else, and only where they fit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_tst.common.errors import UsageError, interrupt_code


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


def what_is_read(output: Path, inputs: Sequence[Path]) -> str | None:
    """Says which of some inputs would go with a folder; None if it is none of them.

    Args:
        output: folder to write, resolved.
        inputs: folders that are read.
    """
    for path in inputs:
        if (folder := path.resolve()) == output:
            return f"is {path}, which is read"
        if output in folder.parents:
            return f"holds {path}, which is read"
    return None


@contextmanager
def saying_what_is_left(output: Path, written: str = "was written") -> Iterator[None]:
    """Says of a command that Ctrl-C or SIGTERM ends whether its folder was written by then.

    Args:
        output: folder that the body writes, whole or not at all.
        written: said of it where it was.

    Raises:
        SystemExit: with 130 or 143, after either.
    """
    before = _identity(output)
    try:
        yield
    except BaseException as error:
        code = interrupt_code(error)
        if code is None:
            raise
        is_new = _identity(output) != before
        left = f"{output} {written}" if is_new else "nothing was written"
        print(f"interrupted: {left}", file=sys.stderr)
        raise SystemExit(code) from None


def _identity(folder: Path) -> int | None:
    """Tells a folder from another one that was there before."""
    return folder.stat().st_ino if folder.exists() else None


def check_disk(output: Path, needed: int, flag: str = "--output") -> None:
    """Compares what will be written with the space that there is.

    Args:
        output: folder to write.
        needed: bytes.
        flag: what the user passed it with.

    Raises:
        UsageError: naming both in bytes.
    """
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"{flag} {output} needs {needed:,} bytes and its disk has {free:,} free: make room, "
            "or name a folder on another disk."
        )
