"""Finds the runs that a user names: folders, folders of runs, tables, TensorBoard folders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from megatron_tst.common.errors import UsageError
from megatron_tst.report.describing import Setting, check_numbers
from megatron_tst.report.results import RunResult, read_result
from megatron_tst.report.results_table import read_results
from megatron_tst.report.runs import RUN_FILE
from megatron_tst.report.stock_runs import read_stock_run

_TABLES = (".csv", ".parquet")
_EVENTS = "events.out.tfevents.*"


def read_sources(paths: Iterable[Path]) -> list[RunResult]:
    """Reads every run in tables of results and below folders.

    A run is named by its folder, with as many of the folders above it as tell the runs apart.

    Raises:
        UsageError: naming a path without runs, or a run that cannot be read.
    """
    results: list[RunResult] = []
    folders: list[Path] = []
    for path in paths:
        if path.suffix in _TABLES:
            results += read_results(path)
        elif not path.is_dir():
            raise UsageError(
                f"{path} is neither a folder nor a table of results (.csv, .parquet): pass run "
                "folders, folders of runs, TensorBoard folders or tables."
            )
        elif found := find_runs(path):
            folders += found
        else:
            raise UsageError(
                f"{path} holds no TensorBoard event files: pass the folder of a run that logged "
                "with --tensorboard-dir."
            )
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    names = _names(folders)
    return [*results, *(read_run_folder(f, n) for f, n in zip(folders, names, strict=True))]


def find_runs(folder: Path) -> list[Path]:
    """Run folders at or below a folder, by name; a TensorBoard folder without one is its own."""
    events = {path.parent for path in folder.rglob(_EVENTS)}
    return sorted({one.parent if (one / RUN_FILE).exists() else one for one in events})


def read_run_folder(folder: Path, name: str) -> RunResult:
    """Reads a run of this project or of stock Megatron, whichever the folder holds."""
    if (folder / "tensorboard" / RUN_FILE).exists():
        return read_result(folder, name)
    if (folder / RUN_FILE).exists():
        return read_result(folder.parent, name)
    return read_stock_run(folder, name, {})


def read_stated(text: str) -> RunResult:
    """Reads a run given as ``NAME=FOLDER[,KEY=VALUE...]``.

    The pairs state settings that the folder does not record or records wrongly.

    Raises:
        UsageError: the text has another form, or the run cannot be read.
    """
    run, *pairs = text.split(",")
    name, _, folder = run.partition("=")
    if not (name and folder) or any("=" not in pair for pair in pairs):
        raise UsageError(
            f"--run {text!r} cannot be read: write NAME=FOLDER,KEY=VALUE,... such as "
            "mine=logs/a,bag_size=4,switch_step=3000,tokens_per_step=1048576."
        )
    path = Path(folder)
    stated = {key: _value(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    check_numbers(stated, f"--run {text!r}")
    if any((place / RUN_FILE).exists() for place in (path, path / "tensorboard")):
        result = read_run_folder(path, name)
        return replace(result, settings={**result.settings, **stated})
    return read_stock_run(path, name, stated)


def _value(text: str) -> Setting:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, str | int | float | bool) else text


def _names(folders: list[Path]) -> list[str]:
    # The folder tensorboard/ of a run says nothing about it.
    parts = [
        folder.parts[:-1] if folder.name == "tensorboard" else folder.parts for folder in folders
    ]
    depth = 1
    while len({one[-depth:] for one in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]
