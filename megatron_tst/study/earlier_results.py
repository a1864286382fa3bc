"""Runs of a study that another machine has trained, known by their table of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.report.describing import describe_data, describe_settings
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import read_results
from megatron_tst.study.config import StudyConfig, StudyRun


def read_earlier_results(path: Path, study: StudyConfig) -> list[RunResult]:
    """Reads a table of ``results.csv``'s kind whose runs are some of a study's.

    Raises:
        UsageError: naming the file and the run that is not of the study, or what it differs in.
    """
    results = read_results(path)
    runs = {run.name: run for run in study.runs()}
    for result in results:
        if result.name not in runs:
            raise UsageError(
                f"--earlier {path}: run {result.name} is none of the study: use a table of this "
                "study, or take the run out of it."
            )
        different = _different(result, runs[result.name])
        if different:
            raise UsageError(
                f"--earlier {path}: run {result.name} is of another study, which differs in "
                f"{', '.join(different)}: use a table of this study."
            )
    return results


def without(study: StudyConfig, names: Iterable[str]) -> StudyConfig:
    """A study without the runs of these names."""
    done = set(names)
    added = study.grid[len(study.grid) - study.controls :]
    return replace(
        study,
        grid=tuple(run for run in study.grid if run.name not in done),
        controls=sum(run.name not in done for run in added),
    )


def in_order_of(study: StudyConfig, results: Sequence[RunResult]) -> list[RunResult]:
    """Results as the runs of the study come, whatever machine they are of."""
    order = {run.name: i for i, run in enumerate(study.runs())}
    return sorted(results, key=lambda result: order[result.name])


def _different(result: RunResult, run: StudyRun) -> list[str]:
    """What the table has otherwise than the study asks for, with both values."""
    arguments = {"bf16": False, **_by_name(run.arguments)}
    asked = {**describe_settings(arguments), **describe_data(arguments)}
    found = {**result.settings, **result.data}
    return [
        f"{name} ({found[name]}, not {value})"
        for name, value in asked.items()
        if name in found and found[name] != value
    ]


def _by_name(arguments: Sequence[str]) -> dict[str, Any]:
    """``["--lr", "0.1", "--bf16"]`` as ``{"lr": 0.1, "bf16": True}``."""
    found: dict[str, Any] = {}
    name = ""
    for part in arguments:
        if part.startswith("--"):
            name = part.removeprefix("--").replace("-", "_")
            found[name] = True
        elif found[name] is True:
            found[name] = _value(part)
        else:
            before = found[name] if isinstance(found[name], list) else [found[name]]
            found[name] = [*before, _value(part)]
    return found


def _value(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
