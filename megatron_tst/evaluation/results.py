"""What an evaluation leaves behind, and the table of one or two of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tst.common.atomic_files import write_json
from megatron_tst.common.errors import UsageError

FORMAT = 1
Results = dict[str, Any]

# Results under other settings are results of another test.
_COMPARED_SETTINGS = ("limit", "window", "stride", "text_sha256")


def check_output(path: Path, overwrite: bool) -> None:
    """Refuses a place where results cannot be written, before they are computed.

    Raises:
        UsageError: the file exists, or its folder does not.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        raise UsageError(f"--output {path} exists: choose another file, or pass --overwrite.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output {path}: the folder {path.parent} does not exist.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"--output {path}: nothing can be written into {path.parent}.")


def read_results(path: Path, flag: str = "--compare") -> Results:
    """Results of an earlier evaluation.

    Raises:
        UsageError: the file is something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {path} cannot be read as JSON ({error}).") from error
    if (
        not isinstance(results, dict)
        or results.get("format") != FORMAT
        or not all(isinstance(results.get(part), dict) for part in ("model", "settings", "tasks"))
    ):
        raise UsageError(f"{flag} {path} is no result of tst evaluate of this version.")
    return results


def write_results(path: Path, results: Results, other: Results | None) -> None:
    """Writes the JSON of an evaluation, with the results that it was compared with."""
    write_json(path, {**results, "compared_with": other})


def check_comparable(settings: Results, other: Results, path: Path) -> None:
    """Refuses results that were obtained under other settings.

    Args:
        settings: of the evaluation to be done.
        other: earlier results, from ``path``.

    Raises:
        UsageError: naming the setting and both values.
    """
    for name in _COMPARED_SETTINGS:
        ours, theirs = settings[name], other["settings"].get(name)
        if ours != theirs:
            raise UsageError(
                f"--compare {path} was made with {name} {theirs}, and this command has {ours}: "
                "evaluate both models with the same settings."
            )
    absent = [name for name in settings["tasks"] if name not in other["tasks"]]
    if absent:
        raise UsageError(
            f"--compare {path} has no result of {', '.join(absent)}: evaluate both models on the "
            "same tasks."
        )


class Row(NamedTuple):
    """A number of one or two models.

    Attributes:
        task: name of the task, or of the text.
        metric: what is measured.
        in_percent: whether it is a share.
        value: and its standard error, None where there is none.
        other: the same of the second model; None without one.
    """

    task: str
    metric: str
    in_percent: bool
    value: tuple[float, float | None]
    other: tuple[float, float | None] | None

    @property
    def difference(self) -> tuple[float, float | None] | None:
        """First model minus second, with the standard error of independent samples."""
        if self.other is None:
            return None
        (value, stderr), (other, other_stderr) = self.value, self.other
        if stderr is None or other_stderr is None:
            return value - other, None
        return value - other, math.hypot(stderr, other_stderr)


def rows(results: Results, other: Results | None = None) -> Iterator[Row]:
    """What the tasks that were asked for and the text gave, the main metric of a task first."""
    for task in results["settings"]["tasks"]:
        entry = results["tasks"][task]
        metrics = sorted(entry["metrics"], key=lambda name: name != entry["main_metric"])
        for metric in metrics:
            pair = None if other is None else other["tasks"][task]["metrics"].get(metric)
            yield Row(task, metric, True, _number(entry["metrics"][metric]), pair and _number(pair))
    if results["text"] is not None:
        ours = results["text"]
        pair = None if other is None else other["text"]
        yield Row(
            "text",
            "bits per byte",
            False,
            (ours["bits_per_byte"], ours["stderr"]),
            pair and (pair["bits_per_byte"], pair["stderr"]),
        )


def _number(metric: Results) -> tuple[float, float | None]:
    return metric["value"], metric["stderr"]


def markdown_table(results: Results, other: Results | None = None) -> str:
    """A table with standard errors; shares in per cent."""
    names = [results["model"]["folder"], *([] if other is None else [other["model"]["folder"]])]
    header = ["task", "metric", *names, *([] if other is None else ["difference"])]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for row in rows(results, other):
        cells = [cell(row.value, row.in_percent)]
        if row.other is not None and row.difference is not None:
            cells += [
                cell(row.other, row.in_percent),
                cell(row.difference, row.in_percent, sign="+"),
            ]
        lines.append([row.task, row.metric, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(number: tuple[float, float | None], in_percent: bool, sign: str = "") -> str:
    """A number with its standard error; a share in per cent."""
    value, stderr = number
    factor, digits = (100, 1) if in_percent else (1, 4)
    text = f"{value * factor:{sign}.{digits}f}"
    return text if stderr is None else f"{text} \N{PLUS-MINUS SIGN} {stderr * factor:.{digits}f}"
