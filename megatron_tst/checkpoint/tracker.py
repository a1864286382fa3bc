"""The file that names the latest checkpoint, in a folder of ``--save``."""

from __future__ import annotations

from pathlib import Path

from megatron_tst.common.errors import UsageError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""What Megatron calls a checkpoint without optimizer: training starts at step 0 from it."""


def tracked_name(tracker: Path, or_else: str) -> str:
    """Name of the folder that a tracker names; empty where the file is.

    Args:
        tracker: the file.
        or_else: what can be done besides mending it.

    Raises:
        UsageError: it holds something else.
    """
    latest = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not latest or latest == RELEASE:
        return latest
    if not latest.isdecimal():
        raise UsageError(
            f"{tracker} holds {latest[:40]!r} instead of the step of the last checkpoint: write "
            f"the number of a complete iter_* folder into it, or {or_else}."
        )
    return f"iter_{int(latest):07d}"


def missing_checkpoint(source: str, folder: Path, remedy: str) -> UsageError:
    """Says what there is in the place of a checkpoint that is not there.

    Args:
        source: the flag, and the file that names the checkpoint.
        folder: of the checkpoint.
        remedy: a sentence.
    """
    return UsageError(
        f"{source} names the checkpoint {folder.name}, which is not there "
        f"(found: {found_in(folder.parent)}). {remedy}"
    )


def found_in(save: Path) -> str:
    """Names of the checkpoints in a folder of ``--save``."""
    return ", ".join(sorted(path.name for path in save.glob("iter_*"))) or "none"
