"""A set of runs as one tidy table.

A row is one logged loss. Rows of validation losses repeat the settings of their run, so that the
table can be filtered and grouped as it is; those of training losses leave them out. The first row
of a run also has all of its arguments that can matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tst.common.errors import UsageError
from megatron_tst.report.arguments import arguments_that_can_matter
from megatron_tst.report.checked_settings import SAMPLES, checked_settings, checked_value
from megatron_tst.report.describing import NUMERICS, OFF, IntArray
from megatron_tst.report.results import RunResult
from megatron_tst.report.table_rows import OFFSET, TRAINING, VALIDATION, curves_of, described_by
from megatron_tst.report.tables import Row, read_table, write_table
from megatron_tst.settings.config import SETTINGS

_DATA_PREFIX = "data."
_NUMERICS_PREFIX = "numerics."
_PREFIXES = (_DATA_PREFIX, _NUMERICS_PREFIX)
_LEADING = (
    "run",
    "status",
    "quantity",
    "step",
    "loss",
    "equivalent_tokens",
    "data_tokens",
    "seconds",
)
_OF_LOSSES = _LEADING[2:]
_TRAILING = ("machine", "loss_impl", "commit")
_ARGUMENTS, _SOURCE = "arguments", "source"
_RECORD = (_ARGUMENTS, _SOURCE)
# Never read as numbers, whatever they look like.
_TEXT = {
    "run",
    "status",
    "quantity",
    "machine",
    "loss_impl",
    "commit",
    *_RECORD,
    "bags",
    *(name for name, known in SETTINGS.items() if known.kind is str),
    "lr_decay_style",
    "lr_wsd_decay_style",
    "data.data_path",
    "data.split",
    "data.tokenizer_type",
    "data.tokenizer_model",
    *NUMERICS,
    *(f"{_NUMERICS_PREFIX}{name}" for name in NUMERICS),
}


def write_results(results: Sequence[RunResult], path: Path) -> None:
    """Writes runs to ``path``, Parquet if its suffix is ``.parquet``, else CSV.

    Losses keep six significant digits. The file appears whole or not at all.

    Raises:
        UsageError: two runs have one name.
    """
    names = [result.name for result in results]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{path}: several runs are called {', '.join(twice)}: rename them.")
    rows = [row for result in results for row in _rows(result)]
    columns = _columns(results)
    write_table(path, rows, columns)


def read_results(path: Path) -> list[RunResult]:
    """Reads what :func:`write_results` wrote; rows may be in any order of runs.

    Raises:
        UsageError: naming the file and the column or run that is wrong.
    """
    rows = read_table(path, required=_LEADING, text_columns=_TEXT)
    by_run: dict[str, list[Row]] = {}
    for row in rows:
        if row["run"] is None:
            raise UsageError(
                f"{path} has a row without run: {row['quantity']}, step {row['step']}: fill it in."
            )
        by_run.setdefault(row["run"], []).append(row)
    if not by_run:
        raise UsageError(f"{path} holds no run.")
    return [_result(path, name, rows) for name, rows in by_run.items()]


def _columns(results: Sequence[RunResult]) -> list[str]:
    settings = [name for result in results for name in result.settings]
    data = [f"{_DATA_PREFIX}{name}" for result in results for name in result.data]
    numerics = [f"{_NUMERICS_PREFIX}{name}" for result in results for name in result.numerics]
    record = [name for result in results for name in _record(result)]
    return list(dict.fromkeys([*_LEADING, *settings, *data, *numerics, *_TRAILING, *record]))


def _rows(result: RunResult) -> Iterator[Row]:
    described: Row = {
        "run": result.name,
        "status": result.status,
        **result.settings,
        **{f"{_DATA_PREFIX}{name}": value for name, value in result.data.items()},
        **{f"{_NUMERICS_PREFIX}{name}": value for name, value in result.numerics.items()},
        "machine": result.machine,
        "loss_impl": result.loss_impl,
        "commit": result.commit,
    }
    record = _record(result)
    if not result.steps.size:
        yield {**described, **record}
    for i, step in enumerate(result.steps):
        yield {
            **described,
            **(record if i == 0 else {}),
            "quantity": VALIDATION,
            "step": int(step),
            "loss": _rounded(result.validation_loss[i]),
            "equivalent_tokens": int(result.equivalent_tokens[i]),
            "data_tokens": int(result.data_tokens[i]),
            "seconds": _rounded(result.seconds[i]),
        }
    for quantity, steps, losses in (
        (TRAINING, result.training_steps, result.training_loss),
        (OFFSET, np.arange(1, len(result.offset_losses) + 1), result.offset_losses),
    ):
        for step, loss in zip(steps, losses, strict=True):
            yield {
                "run": result.name,
                "quantity": quantity,
                "step": int(step),
                "loss": _rounded(loss),
            }


def _record(result: RunResult) -> Row:
    """Arguments that are not off, as JSON; what a run with a part of its record was read from."""
    record: Row = {}
    if result.arguments:
        stated = {name: result.settings.get(name, v) for name, v in result.arguments.items()}
        kept = {name: value for name, value in stated.items() if value and value != OFF}
        record[_ARGUMENTS] = json.dumps(kept or stated, separators=(",", ":"))
    if result.source and not (result.arguments and {*NUMERICS} <= result.numerics.keys()):
        record[_SOURCE] = result.source
    return record


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _result(path: Path, name: str, rows: list[Row]) -> RunResult:
    where = f"{path}: run {name}"
    described = described_by(rows, _OF_LOSSES, where)
    curves = curves_of(rows, described["status"], where)
    _check_end(described, curves["steps"], where)
    known = {*_LEADING, *_TRAILING, *_RECORD}
    present = {key: value for key, value in described.items() if key not in known}
    arguments = _arguments(described.get(_ARGUMENTS) or "{}", where)
    # As the JSON has them: a column of a CSV file does not tell a text from a number.
    present.update({key: value for key, value in arguments.items() if key in present})
    given = {k: v for k, v in present.items() if not k.startswith(_PREFIXES)}
    if curves["steps"].size:
        given.setdefault("total_steps", int(curves["steps"][-1]))
    return RunResult(
        name=name,
        status=described["status"],
        settings=checked_settings(given, where),
        data=_checked_data(_under(_DATA_PREFIX, present), where),
        numerics=_under(_NUMERICS_PREFIX, present),
        machine=described.get("machine") or "",
        commit=described.get("commit") or "",
        loss_impl=described.get("loss_impl") or "",
        arguments=arguments,
        source=described.get(_SOURCE) or str(path),
        **curves,
    )


def _check_end(described: Row, steps: IntArray, where: str) -> None:
    """Refuses a finished run whose last rows are gone: its loss there would pass for its end."""
    total = described.get("total_steps")
    last = int(steps[-1]) if steps.size else 0
    if described["status"] == "finished" and isinstance(total, int) and last < total:
        raise UsageError(
            f"{where} is finished, but its last validation loss is of step {last} of {total}: keep "
            "all of its rows, or let its status be unfinished."
        )


def _checked_data(data: Row, where: str) -> Row:
    checked = {name: checked_value(name, value, where) for name, value in data.items()}
    return {name: value for name, value in checked.items() if value is not None}


def _arguments(text: str, where: str) -> dict[str, Any]:
    """Those that a run recorded; none in a table of an earlier version."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            f"{where} has arguments that are no JSON object ({text[:40]!r}): write the table again."
        )
    for name, value in found.items():
        if name in SAMPLES:
            checked_value(name, value, where)
    # A table of an earlier version has some that are known by now not to matter.
    return arguments_that_can_matter(found)


def _under(prefix: str, row: Row) -> Row:
    return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
