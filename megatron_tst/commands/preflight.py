"""Checks a launch on a CPU: will it start, will it fit, what does it read and write?"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_tst.common.atomic_files import write_json
from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command
from megatron_tst.common.quiet import quiet_libraries
from megatron_tst.preflight.launch_command import LaunchCommand, read_launch

_PIPED_WIDTH = 170


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this tool, and those behind ``--``, which the launch gets."""
    own, _, extra = _split(list(arguments))
    parser = command_parser(
        __doc__, epilog="Exit code: 0 fits, 1 errors were found, 2 the input cannot be used."
    )
    add = parser.add_argument
    add("script", type=Path, metavar="SCRIPT", help="launch script, or a file of arguments")
    add("--world-size", type=_whole, required=True, metavar="N", help="GPUs of the run")
    add("--gpu-memory", type=_positive, default=192.0, metavar="GB", help="of a GPU (default 192)")
    add("--compute-capability", default="10.0", metavar="X.Y", help="B200 10.0 (default), H100 9.0")
    add(
        "--rank",
        type=int,
        nargs="+",
        default=[],
        metavar="R",
        help="ranks to show (default: the first of each pipeline stage)",
    )
    add("--vocabulary", type=_whole, metavar="N", help="ids, if the tokenizer is not here")
    add("--strict", action="store_true", help="warnings count as errors")
    add("--json", type=Path, metavar="FILE", help="write the report there too; whole or not at all")
    return parser.parse_args(own), extra


def _split(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    if "--" not in arguments:
        return arguments, "", []
    place = arguments.index("--")
    return arguments[:place], "--", arguments[place + 1 :]


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**9):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a launch with errors, 2 for input that cannot be used."""
    # Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args, extra = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    capability = _capability(args.compute_capability)
    for rank in args.rank:
        if not 0 <= rank < args.world_size:
            raise UsageError(
                f"--rank {rank} is outside of --world-size {args.world_size}: pass ranks from "
                f"0 to {args.world_size - 1}."
            )
    found = read_launch(args.script, extra)
    return _check(args, found, capability)


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise UsageError(f"--compute-capability is {text!r}: pass one such as 10.0 or 9.0.")
    return int(major), int(minor)


def _check(args: argparse.Namespace, found: LaunchCommand, capability: tuple[int, int]) -> int:
    # These take seconds, and bad input needs none of them.
    quiet_libraries()
    from megatron_tst import cpu
    from megatron_tst.preflight.engine_path import make_engine_importable

    make_engine_importable()
    cpu.activate()
    from megatron_tst.preflight import rank_simulation
    from megatron_tst.preflight.checks import Launch, check_launch
    from megatron_tst.preflight.wording import (
        finding_lines,
        memory_table,
        report_as_json,
        summary_lines,
    )

    rank_simulation.assume_machine(capability)
    gpu_bytes = args.gpu_memory * 1e9
    launch = Launch(
        found.arguments, args.world_size, gpu_bytes, args.rank, args.vocabulary, found.environment
    )
    report = check_launch(rank_simulation.launch_parser(), launch)
    if args.json is not None:
        write_json(args.json, report_as_json(report, gpu_bytes))
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
    for line in summary_lines(report):
        console.print(line, markup=False, soft_wrap=True)
    if report.stages:
        console.print(memory_table(report, gpu_bytes))
    for line in finding_lines(report):
        console.print(line, markup=False, soft_wrap=True)
    is_warned = any(finding.level == "warning" for finding in report.findings)
    return 1 if report.has_errors or (args.strict and is_warned) else 0
