"""The torch of a launch, and whether it can read the checkpoint that the launch loads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_tst.checkpoint.torch_dist_index import (
    INDEX_FILE,
    find_checkpoint,
    is_newer_torch,
    older_torch,
    read_index,
    torch_of_writer,
)
from megatron_tst.common.errors import UsageError
from megatron_tst.preflight.findings import Finding, error, note, warning


def torch_findings(args: argparse.Namespace) -> Iterator[Finding]:
    """Names the torch that runs, and says whether it fits the one that wrote the checkpoint."""
    yield note(f"torch {torch.__version__} runs here, and was assumed for the launch.")
    for flag, path in _loaded(args):
        # A first start has none; what else is wrong the run says before it builds anything.
        try:
            folder = find_checkpoint(path)
        except UsageError:
            continue
        yield from _compared(flag, folder)
        return


def _loaded(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Where Megatron looks for a checkpoint, in its order."""
    if args.load is not None:
        step = f"iter_{args.ckpt_step:07d}" if args.ckpt_step else "."
        yield f"--load {args.load}", Path(args.load) / step
    if args.pretrained_checkpoint is not None:
        yield (
            f"--pretrained-checkpoint {args.pretrained_checkpoint}",
            Path(args.pretrained_checkpoint),
        )


def _compared(flag: str, folder: Path) -> Iterator[Finding]:
    try:
        read_index(folder / INDEX_FILE)
    except UsageError as problem:
        yield error(f"{flag}: {problem}")
        return
    recorded = torch_of_writer(folder)
    if recorded is None:
        return
    if is_newer_torch(recorded, torch.__version__):
        yield warning(
            f"{flag}: {folder.name} was written by torch {recorded}, a newer one than "
            f"{torch.__version__}, which runs here. Its files are whole and this torch reads their "
            f"index, but torch may move up between two starts of a run and not back: use torch "
            f"{recorded} or a newer one."
        )
    elif is_newer_torch(torch.__version__, recorded):
        yield note(f"{flag}: {older_torch(folder, recorded)}")
