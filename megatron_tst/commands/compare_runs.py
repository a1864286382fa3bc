"""Compares token superposition with baselines: one self-contained HTML page, and its plots.

Pass any set of runs: folders of this project's runs, folders that hold many of them, tables of
results (.csv, .parquet), TensorBoard folders of stock Megatron-LM. Runs that differ in their seed
alone are averaged; each superposition setting is compared with the baseline of the same settings;
runs of other models, corpora, tokenizers or validation sets get sections of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command
from megatron_tst.report.comparison import Study, study_of, study_of_two
from megatron_tst.report.families import families_of, with_differing_arguments
from megatron_tst.report.html import write_report
from megatron_tst.report.markdown import write_tables
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import write_results
from megatron_tst.report.sources import read_run_folder, read_sources, read_stated
from megatron_tst.report.wording import verdict


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    args = _parse(arguments)
    sample = None if args.sample is None else _read_sample(args.sample)
    runs = _runs(args)
    studies = _studies(args, runs)
    files = write_report(studies, args.output, sample, args.figures)
    if args.tables is not None:
        write_tables(studies, args.tables)
        files.append(args.tables)
    if args.results is not None:
        write_results(runs, args.results)
        files.append(args.results)
    for study in studies:
        print("\n".join([f"{study.name}:", *verdict(study), ""]))
    print("\n".join(map(str, files)))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", help="folders and tables of results")
    add(
        "--run",
        action="append",
        default=[],
        metavar="NAME=FOLDER[,KEY=VALUE...]",
        help="a run by name; KEY=VALUE states what its folder does not record: tokens_per_step, "
        "bag_size, switch_step, seed, or any setting of the report",
    )
    add("--baseline", type=Path, help="one comparison: run folder of the baseline")
    add("--tst", type=Path, help="one comparison: run folder of the TST run")
    add("--output", type=Path, required=True, help="HTML file to write")
    add(
        "--figures",
        type=Path,
        help="folder for the plots as PNG and PDF; default: PNG, beside the page",
    )
    add("--results", type=Path, help="also write all runs to this table (.csv or .parquet)")
    add("--tables", type=Path, help="also write the verdicts and tables to this Markdown file")
    add("--sample", type=Path, help="text file with a sample that the trained model generated")
    args = parser.parse_args(arguments)
    if (args.baseline is None) != (args.tst is None):
        parser.error("--baseline and --tst go together: pass both, or pass the runs without flags")
    if (args.baseline is None) == (not args.runs and not args.run):
        parser.error("pass runs, or --baseline with --tst, and not both")
    return args


def _read_sample(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--sample {path} is not text in UTF-8 ({error}).") from error


def _runs(args: argparse.Namespace) -> list[RunResult]:
    if args.baseline is not None:
        names = (args.baseline.name, args.tst.name)
        if names[0] == names[1]:
            names = (str(args.baseline), str(args.tst))
        folders = (args.baseline, args.tst)
        runs = [read_run_folder(f, n) for f, n in zip(folders, names, strict=True)]
    else:
        runs = [*read_sources(args.runs), *map(read_stated, args.run)]
    return with_differing_arguments(runs)


def _studies(args: argparse.Namespace, runs: list[RunResult]) -> list[Study]:
    if args.baseline is not None:
        baseline, tst = runs
        return [study_of_two(baseline, tst)]
    return [study_of(family) for family in families_of(runs)]
