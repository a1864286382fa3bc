"""Shows where a gain comes from: losses by position, the switch, and Adam's state there.

    tst explain --arm "baseline" BASE_SEED_1 BASE_SEED_2 --arm "s = 2" TST_SEED_1 TST_SEED_2 \\
      --text held_out.txt --tokenizer TOKENIZER --output explained.csv --tables explained.md

Each --arm has a name and folders of runs that differ in their seed alone: tensorboard/ and
checkpoints/ are read. The first arm is what the others are held to, pair by pair of one seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_tst.common.atomic_files import write_file
from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command
from megatron_tst.common.progress import TaskProgress
from megatron_tst.report.origin_plots import origin_plots
from megatron_tst.report.origin_settings import unrecorded
from megatron_tst.report.origin_tables import markdown
from megatron_tst.report.origins import Trace, arms_of, read_traces, write_traces


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    args = _parser().parse_args(arguments)
    _check(args)
    traces = (
        _measured(args) if args.arm else [t for path in args.tables_read for t in read_traces(path)]
    )
    arms = arms_of(traces)
    text = markdown(arms)
    if args.output is not None:
        write_traces(traces, args.output)
    if args.tables is not None:
        write_file(args.tables, text.encode())
    if args.figures is not None:
        args.figures.mkdir(parents=True, exist_ok=True)
        for plot in origin_plots(arms):
            write_file(args.figures / f"{plot.name}.png", plot.png)
            write_file(args.figures / f"{plot.name}.pdf", plot.pdf)
    print(text)
    if note := unrecorded(arms):
        print(note, file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add(
        "tables_read",
        type=Path,
        nargs="*",
        metavar="TABLE",
        help="instead of --arm: what --output wrote, one or more",
    )
    add(
        "--arm",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "RUN"),
        help="a name, and folders of runs; of one seed several, which are joined",
    )
    add("--text", type=Path, help="file, or folder of files: also measure losses by position")
    add("--tokenizer", type=Path, help="folder of the Hugging Face tokenizer, for --text")
    add("--batch-size", type=int, default=64, help="sequences of --text at once (default: 64)")
    add("--output", type=Path, help="file to write all numbers to, .csv or .parquet")
    add("--tables", type=Path, help="Markdown file to write")
    add("--figures", type=Path, help="folder for the plots as PNG and PDF")
    return parser


def _check(args: argparse.Namespace) -> None:
    if bool(args.tables_read) == bool(args.arm):
        raise UsageError("pass --arm for each setting, or tables that --output wrote.")
    if args.tables_read and args.text is not None:
        raise UsageError(
            f"--text {args.text}: {args.tables_read[0]} has its numbers; leave it out."
        )
    for name, *folders in args.arm:
        if not folders:
            raise UsageError(f"--arm {name} has no runs: pass a name, and then folders of runs.")
    names = [name for name, *_ in args.arm]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--arm {twice[0]} is given twice: pass all its runs in one --arm.")
    if args.arm and args.output is None:
        raise UsageError("pass --output with a .csv file for the numbers that are measured.")
    if (args.text is None) != (args.tokenizer is None):
        raise UsageError("--text and --tokenizer go together: pass both, or neither.")


def _measured(args: argparse.Namespace) -> list[Trace]:
    # Here, because it is not needed for a table.
    from megatron_tst.checkpoint.tracing_gains import trace_arms

    arms = {name: [Path(folder) for folder in folders] for name, *folders in args.arm}
    with TaskProgress(Console(stderr=True)) as display:
        return trace_arms(arms, args.output, args.text, args.tokenizer, args.batch_size, display)
