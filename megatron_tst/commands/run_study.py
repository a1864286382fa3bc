"""Runs a grid of training runs, several at once, and collects them in one file of results."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from megatron_tst.commands.study_hours import expected_hours
from megatron_tst.commands.study_text import refuse_too_little_text
from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command
from megatron_tst.common.precision import describe_precision
from megatron_tst.report.describing import Status
from megatron_tst.report.families import with_differing_arguments
from megatron_tst.report.results import RunResult, read_result
from megatron_tst.report.results_table import write_results
from megatron_tst.study.asked_arguments import AskedArguments
from megatron_tst.study.config import StudyConfig
from megatron_tst.study.display import Display, summary
from megatron_tst.study.earlier_results import (
    in_order_of,
    read_earlier_results,
    without,
)
from megatron_tst.study.execution import gpus_of_this_machine, slots_of_this_machine
from megatron_tst.study.kept_results import refuse_to_lose_results
from megatron_tst.study.precision import leaves_precision_open, resolve_precision
from megatron_tst.study.run_folder import ENDED
from megatron_tst.study.runner import Progress, run_all
from megatron_tst.study.slurm import parse_slurm_options, submit
from megatron_tst.study.study_file import read_study
from megatron_tst.study.study_folder import RESULTS_FILE, check_same_study, executions, open_study


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a run failed, 2 for input that cannot be used."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _end)
    try:
        study = read_study(options.study)
        folder = options.output or Path("runs") / "studies" / options.study.stem
        if options.list or options.collect:
            study = resolve_precision(study, folder, starts_runs=False)
            # While another process may run it.
            check_same_study(study, folder)
            earlier = _earlier(study, options)
            if options.list:
                return _list(study, folder, earlier, options)
            print(collect(study, folder, earlier))
            return 0
        study = _in_precision_of_this_machine(study, folder, options.slurm is not None)
        earlier = _earlier(study, options)
        refuse_too_little_text(_left(study, earlier), AskedArguments(study, _parsed))
        with open_study(study, folder):
            # Before training, which may take days.
            refuse_to_lose_results(folder, earlier)
            if options.slurm is not None:
                return _submit(study, folder, earlier, options)
            return _run(study, folder, earlier, options.jobs)
    except KeyboardInterrupt:
        print("stopped: the same command goes on.", file=sys.stderr)
        return 130


def _in_precision_of_this_machine(study: StudyConfig, folder: Path, by_slurm: bool) -> StudyConfig:
    if not leaves_precision_open(study):
        return study
    if by_slurm:
        raise UsageError(
            "--slurm with bf16: auto would take the precision of the machine that submits: write "
            "bf16: true in the study file, or leave bf16 out for fp32."
        )
    resolved = resolve_precision(study, folder, starts_runs=True)
    on_gpu = bool(gpus_of_this_machine())
    print(f"bf16: auto on this machine: {describe_precision(on_gpu)}.", flush=True)
    return resolved


def _earlier(study: StudyConfig, options: argparse.Namespace) -> list[RunResult]:
    if options.earlier is None:
        return []
    earlier = read_earlier_results(options.earlier, study, _parsed)
    for note in earlier.notes:
        print(note, file=sys.stderr)
    return list(earlier.results)


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    # Here, because it imports Megatron, which takes seconds.
    from megatron_tst.checkpoint.hf_arguments import parse_arguments

    return vars(parse_arguments(arguments))


def _left(study: StudyConfig, earlier: Sequence[RunResult]) -> StudyConfig:
    return without(study, [result.name for result in earlier])


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("study", type=Path, help="YAML file, see docs/studies.md")
    add("--output", type=Path, help="default: runs/studies/<name of the study file>")
    add(
        "--earlier",
        type=Path,
        metavar="TABLE",
        help="results of the same study, such as another machine's: their runs are not run again, "
        "and the results written hold them",
    )
    add("--jobs", type=int, help="runs at once (default: what cores and GPUs suffice for)")
    add("--list", action="store_true", help="list the runs and how they stand, and run nothing")
    add(
        "--gpu",
        metavar="KIND",
        help="with --list and --mfu: the hours to expect on one such as H100",
    )
    add("--mfu", type=float, metavar="F", help="the share of its dense bf16 peak that is assumed")
    add("--vocabulary", type=int, metavar="N", help="ids, if the tokenizer is not here yet")
    add("--collect", action="store_true", help="write the results so far, and run nothing")
    add(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="submit what is left as a Slurm array: parameters of submitit, such as "
        "slurm_partition=b200 timeout_min=240 gpus_per_node=1",
    )
    options = parser.parse_args(arguments)
    if (options.gpu is None) != (options.mfu is None) or (options.gpu and not options.list):
        parser.error("--gpu and --mfu go together, and with --list")
    return options


def _run(study: StudyConfig, folder: Path, earlier: Sequence[RunResult], jobs: int | None) -> int:
    slots = slots_of_this_machine(jobs, study.processes)
    console = Console()
    with Display(console) as display:
        progress = run_all(executions(_left(study, earlier), folder), slots, display.show)
    console.print(summary(progress), markup=False, highlight=False)
    if earlier or any(state in ENDED for state in progress.states.values()):
        results = collect(study, folder, earlier)
        console.print(f"Results: {results}", markup=False, highlight=False, soft_wrap=True)
    return _report_failures(progress)


def collect(study: StudyConfig, folder: Path, earlier: Sequence[RunResult] = ()) -> Path:
    """Writes the results of all runs that have ended, and returns the file.

    Args:
        study: the grid.
        folder: its folder.
        earlier: runs of the grid that have ended elsewhere; those of the folder do not count.

    Raises:
        UsageError: none has, or results that are there would be lost.
    """
    refuse_to_lose_results(folder, earlier)
    results = list(earlier)
    for execution in executions(_left(study, earlier), folder):
        state = execution.folder.state()
        if state in ENDED:
            # The losses of a finished run may still show that it has diverged.
            status: Status | None = "diverged" if state == "diverged" else None
            results.append(read_result(execution.folder.path, execution.name, status))
    if not results:
        raise UsageError(f"no run in {folder} has ended: there are no results to collect yet.")
    ordered = in_order_of(study, with_differing_arguments(results))
    write_results(ordered, folder / RESULTS_FILE)
    return folder / RESULTS_FILE


def _report_failures(progress: Progress) -> int:
    failed = [e for e in progress.executions if progress.states[e.name] == "failed"]
    for execution in failed:
        print(
            f"failed: {execution.name}: {execution.folder.last_words()} (log: "
            f"{execution.folder.log})",
            file=sys.stderr,
        )
    if progress.count("waiting"):
        print(
            f"{progress.count('waiting')} runs were not started, because several failed in a row.",
            file=sys.stderr,
        )
    if failed:
        print("The same command runs again what has not finished.", file=sys.stderr)
    return 1 if failed else 0


def _list(
    study: StudyConfig, folder: Path, earlier: Sequence[RunResult], options: argparse.Namespace
) -> int:
    elsewhere = {result.name: result.status for result in earlier}
    runs = executions(study, folder)
    for execution in runs:
        state = elsewhere.get(execution.name) or execution.folder.state()
        print(f"{state:9} {execution.name}")
    controls = f", of them {study.controls} baselines added as controls" if study.controls else ""
    print(f"{len(runs)} runs, {sum(e.total_steps for e in runs):,} steps{controls}")
    if elsewhere:
        print(f"{len(elsewhere)} of them are in {options.earlier}")
    if options.gpu is not None:
        left = _left(study, earlier)
        print(expected_hours(left, options.gpu, options.mfu, options.vocabulary))
    return 0


def _submit(
    study: StudyConfig, folder: Path, earlier: Sequence[RunResult], options: argparse.Namespace
) -> int:
    left = _left(study, earlier)
    jobs = submit(left, folder, options.jobs, parse_slurm_options(options.slurm))
    for name, job in jobs:
        print(f"{job} {name}")
    print(f"{len(jobs)} runs submitted; --collect writes the results of those that have ended.")
    return 0
