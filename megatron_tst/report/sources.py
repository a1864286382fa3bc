"""Finds the runs that a user names: folders, folders of runs, tables, TensorBoard folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from megatron_tst.common.errors import UsageError
from megatron_tst.report.checked_settings import checked_settings, checked_value
from megatron_tst.report.describing import DATA_KEYS, Setting
from megatron_tst.report.results import RunResult, read_result
from megatron_tst.report.results_table import read_results
from megatron_tst.report.runs import RUN_FILE
from megatron_tst.report.stock_runs import read_stock_run
from megatron_tst.report.tables import value_of

_TABLES = (".csv", ".parquet")
_EVENTS = "events.out.tfevents.*"
_TEXTS = ("data_path", "split", "tokenizer_type", "tokenizer_model")
_MEASURED = (
    *("bag_size", "switch_step", "step_ratio", "bags", "bag_sizes", "variant"),
    *("total_steps", "sequence_length", "tokens_per_step"),
)
"""What the curves of a run of this project were made of."""


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
    where = f"--run {text!r}"
    stated = _stated((pair.partition("=")[::2] for pair in pairs), where)
    path = Path(folder)
    if any((place / RUN_FILE).exists() for place in (path, path / "tensorboard")):
        return _with_stated(read_run_folder(path, name), stated, where)
    return read_stock_run(path, name, stated, where)


def _stated(pairs: Iterable[tuple[str, str]], where: str) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for key, text in pairs:
        value = text if key in _TEXTS else checked_value(key, value_of(text), where)
        if value is None or not text:
            raise UsageError(f"{where}: {key} is {text!r}: write a value, or leave it out.")
        if key in found:
            raise UsageError(f"{where} states {key} twice: leave one of them out.")
        found[key] = value
    return found


def _with_stated(result: RunResult, stated: Mapping[str, Setting], where: str) -> RunResult:
    """A run of this project, which knows its phases and its tokens itself."""
    for key in _MEASURED:
        if key in stated and stated[key] != result.settings.get(key):
            raise UsageError(
                f"{where}: {key} is {stated[key]!r}, and {result.settings.get(key, 'another')} in "
                f"the record of this run: leave {key} out."
            )
    data = {key: value for key, value in stated.items() if key in DATA_KEYS}
    settings = {key: value for key, value in stated.items() if key not in DATA_KEYS}
    return replace(
        result,
        settings=checked_settings({**result.settings, **settings}, where),
        data={**result.data, **data},
    )


def _names(folders: list[Path]) -> list[str]:
    # The folder tensorboard/ of a run says nothing about it.
    parts = [
        folder.parts[:-1] if folder.name == "tensorboard" else folder.parts for folder in folders
    ]
    depth = 1
    while len({one[-depth:] for one in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]
