"""Looks for what is wrong in a Megatron checkpoint (torch_dist): files, numbers and counts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_tst.checkpoint.findings import Verification
from megatron_tst.checkpoint.output_folder import saying_what_is_left
from megatron_tst.checkpoint.rebuilding import rebuild_masters, refuse_existing
from megatron_tst.checkpoint.torch_dist_index import find_checkpoint
from megatron_tst.checkpoint.verification import verify_checkpoint
from megatron_tst.checkpoint.verification_wording import description
from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command
from megatron_tst.common.progress import TaskProgress


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a checkpoint with faults, 2 for input that is no use."""
    options = _parser().parse_args(arguments)
    output = options.rebuild_masters
    if output:
        # Before all of a checkpoint is read.
        refuse_existing(output)
    folder = find_checkpoint(options.checkpoint)
    result = _verify(folder, options)
    print(description(result), end="")
    if output and result.faults:
        with saying_what_is_left(output, "was written and not verified"):
            return _rebuild(result, options)
    if output:
        print(f"There is nothing to rebuild: {output} was not written.")
    return 1 if result.faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="an iter_... folder, or a --save folder")
    add(
        "--rebuild-masters",
        type=Path,
        metavar="OUTPUT",
        help="where only the state of the optimizer has faults: write a checkpoint to load whose "
        "masters are made from the weights and whose moments start at zero",
    )
    add("--progress", action="store_true", help="draw a bar, not lines, without a terminal too")
    return parser


def _verify(folder: Path, options: argparse.Namespace) -> Verification:
    with TaskProgress(Console(stderr=True), with_bars=options.progress) as display:
        return verify_checkpoint(folder, display.counting("Reading", "MB"))


def _rebuild(result: Verification, options: argparse.Namespace) -> int:
    if not all(fault.is_of_optimizer for fault in result.faults):
        raise UsageError(
            "--rebuild-masters: more than the state of the optimizer is wrong: copy the checkpoint "
            "again, or use an older one."
        )
    output = options.rebuild_masters
    with TaskProgress(Console(stderr=True), with_bars=options.progress) as display:
        rebuilt = rebuild_masters(result.checkpoint, output, display.counting("Writing", "parts"))
    faults = _verify(rebuilt, options).faults
    print(
        f"{rebuilt}: masters made from the weights, moments at zero, "
        f"{'FAULTS FOUND' if faults else 'no fault found'}. Continue with --load "
        f"{output.absolute()}."
    )
    return 1 if faults else 0
