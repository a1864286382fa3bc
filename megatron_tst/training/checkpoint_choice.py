"""Finds the checkpoint that Megatron will load, as its ``_load_base_checkpoint`` does."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

from megatron_tst.checkpoint.tracker import (
    RELEASE,
    TRACKER_FILE,
    missing_checkpoint,
    tracked_name,
)
from megatron_tst.common.atomic_files import write_file
from megatron_tst.common.errors import UsageError

_logger = logging.getLogger(__name__)


def checkpoint_to_load(args: Namespace) -> Path | None:
    """Folder of the checkpoint that Megatron will load, None without one.

    Raises:
        UsageError: it is not there, or is not what the command line asks for.
    """
    if args.load is None:
        return None
    persistent, newest = _persistent(args), _non_persistent(args)
    if newest is None or (persistent is not None and _steps(persistent) > _steps(newest)):
        if persistent is None and args.exit_on_missing_checkpoint and not _start(args):
            # Megatron builds the model first, and then exits with 0 (pull request 6321).
            raise UsageError(
                f"--load {args.load} holds no checkpoint, and --exit-on-missing-checkpoint is "
                "given: pass a --load that does, or start a new run without "
                "--exit-on-missing-checkpoint."
            )
        return persistent
    if args.ckpt_step and args.ckpt_step < _steps(newest):
        raise UsageError(
            f"--ckpt-step {args.ckpt_step} is not what Megatron would load: {newest} is newer, and "
            f"not persistent. Remove {newest.parent} to go back."
        )
    if _start(args) and not (Path(args.load) / TRACKER_FILE).is_file():
        raise UsageError(
            f"--pretrained-checkpoint {_start(args)} is what Megatron would start from anew, as "
            f"--load {args.load} holds no persistent checkpoint: leave it out to go on with "
            f"{newest}, or remove {newest.parent}."
        )
    return newest


def damaged_checkpoint(folder: Path, args: Namespace, problem: str) -> UsageError:
    """Says what to load in place of a damaged checkpoint."""
    if folder.parent == _non_persistent_folder(args):
        return UsageError(
            f"{folder} is damaged ({problem}): remove {folder.parent} to go on with the last "
            "persistent checkpoint."
        )
    # Written last: a folder without it is half-written.
    whole = {path.parent for path in folder.parent.glob("iter_*/.metadata")}
    others = sorted(path.name for path in whole - {folder})
    return UsageError(
        f"{folder} is damaged ({problem}): pass --ckpt-step with another checkpoint of its folder "
        f"({', '.join(others) or 'there is none'})."
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that the tracker of a folder names, None without a tracker."""
    tracker = folder / TRACKER_FILE
    return folder / _read_tracker(tracker) if tracker.is_file() else None


def _start(args: Namespace) -> str | None:
    return getattr(args, "pretrained_checkpoint", None)


def _steps(folder: Path) -> int:
    return 0 if folder.name == RELEASE else int(folder.name.removeprefix("iter_"))


def _persistent(args: Namespace) -> Path | None:
    load = Path(args.load)
    # Megatron takes a step of 0 for none.
    if args.ckpt_step:
        folder, source = load / f"iter_{args.ckpt_step:07d}", f"--ckpt-step {args.ckpt_step}"
    elif (last := last_checkpoint(load)) is not None:
        folder, source = last, str(load / TRACKER_FILE)
    else:
        return None
    if not folder.is_dir():
        remedy = "Pass --ckpt-step with a checkpoint that is, or another --load."
        raise missing_checkpoint(f"--load {args.load}: {source}", folder, remedy)
    return folder


def _non_persistent(args: Namespace) -> Path | None:
    parent = _non_persistent_folder(args)
    folder = None if parent is None else last_checkpoint(parent)
    if folder is not None and not folder.is_dir():
        # Megatron removes all but the last folder before it saves, which may be half-written.
        raise UsageError(
            f"{folder.parent / TRACKER_FILE} names the checkpoint {folder.name}, which is not "
            f"there, as after two saves that were interrupted: remove {folder.parent} to go on "
            "with the last persistent checkpoint."
        )
    return folder


def _non_persistent_folder(args: Namespace) -> Path | None:
    if args.non_persistent_ckpt_type != "global":
        return None
    return Path(args.non_persistent_global_ckpt_dir or Path(args.load) / "non_persistent")


def _read_tracker(tracker: Path) -> str:
    name = tracked_name(tracker, "pass --ckpt-step") or _mend_tracker(tracker)
    if not name:
        raise UsageError(
            f"{tracker} is empty and no checkpoint beside it is whole: pass another folder, or "
            "remove the file to start anew."
        )
    return name


def _mend_tracker(tracker: Path) -> str:
    """Writes the last whole checkpoint into an empty tracker, and returns its name.

    Megatron empties the file before it writes the step, once the checkpoint is whole: a run that is
    killed in between leaves it empty, and could not be continued. Several ranks write the same.
    """
    named = (path.parent.name for path in tracker.parent.glob("iter_*/.metadata"))
    whole = sorted(name for name in named if name.removeprefix("iter_").isdecimal())
    if not whole:
        return ""
    step = str(int(whole[-1].removeprefix("iter_")))
    write_file(tracker, step)
    _logger.warning(
        "%s was empty, as a run leaves it that is killed while it is written: the last whole "
        "checkpoint of the folder is %s.",
        *(tracker, whole[-1]),
    )
    return f"iter_{int(step):07d}"
