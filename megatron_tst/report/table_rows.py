"""The rows of one run in a table of results: checked, as a description and curves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isfinite, isnan
from typing import Any, get_args

import numpy as np

from megatron_tst.common.errors import UsageError
from megatron_tst.report.checked_settings import shown, whole_number
from megatron_tst.report.describing import Status
from megatron_tst.report.tables import Row

VALIDATION, TRAINING, OFFSET = "validation loss", "training loss", "loss at offset"
_QUANTITIES = (VALIDATION, TRAINING, OFFSET)


def described_by(rows: Sequence[Row], curve_columns: Collection[str], where: str) -> Row:
    """What the rows of a run say of it, each or some; empty values are left out.

    Args:
        rows: of one run.
        curve_columns: columns that say nothing of a run, but of one of its losses.
        where: they were read, for errors.

    Raises:
        UsageError: naming a column in which they differ, or that there is no status.
    """
    found: Row = {}
    for row in rows:
        for name, value in row.items():
            if name in curve_columns or _is_empty(value):
                continue
            if found.setdefault(name, value) != value:
                raise UsageError(
                    f"{where}: its rows have {name} {found[name]!r} and {value!r}: leave the "
                    "column out if it describes no run, and give two runs two names."
                )
    if "status" not in found:
        raise UsageError(
            f"{where} has no row with its status and settings: keep its rows of validation losses."
        )
    if found["status"] not in get_args(Status):
        raise UsageError(
            f"{where}: status is {found['status']!r}: write {', '.join(get_args(Status))}."
        )
    return found


def curves_of(rows: Sequence[Row], status: Status, where: str) -> dict[str, Any]:
    """The curves of a run as fields of a ``RunResult``, by step.

    Raises:
        UsageError: naming a column and a value that cannot be, or a step that is there twice.
    """
    by_quantity: dict[str, list[Row]] = {name: [] for name in _QUANTITIES}
    for row in rows:
        quantity = row["quantity"]
        if quantity is None and row["step"] is None and row["loss"] is None:
            continue
        if quantity not in by_quantity:
            raise UsageError(
                f"{where}: quantity is {shown(quantity)}: write {', '.join(_QUANTITIES)}."
            )
        by_quantity[quantity].append(row)
    curves = {name: _Curve(some, name, where) for name, some in by_quantity.items()}
    validation, training = curves[VALIDATION], curves[TRAINING]
    may_be_empty = status == "diverged"
    return {
        "steps": validation.steps,
        "validation_loss": validation.numbers("loss", may_be_empty),
        "equivalent_tokens": validation.counts("equivalent_tokens"),
        "data_tokens": validation.counts("data_tokens"),
        "seconds": validation.numbers("seconds", may_be_empty=True),
        "training_steps": training.steps,
        "training_loss": training.numbers("loss", may_be_empty),
        "offset_losses": curves[OFFSET].numbers("loss", may_be_empty),
    }


class _Curve:
    """Rows of one quantity, by step."""

    def __init__(self, rows: list[Row], quantity: str, where: str) -> None:
        self._where = f"{where}, {quantity}"
        by_step: dict[int, Row] = {}
        for row in rows:
            step = whole_number("step", row["step"], self._where, 0)
            if step in by_step:
                raise UsageError(
                    f"{self._where}: step {step} is there twice: keep each row once, and give two "
                    "runs two names."
                )
            by_step[step] = row
        self._rows = dict(sorted(by_step.items()))

    @property
    def steps(self) -> Any:
        """Ascending, int64, [n]."""
        return np.array(list(self._rows), dtype=np.int64)

    def numbers(self, column: str, may_be_empty: bool) -> Any:
        """A column as float64, [n]; NaN where it is empty."""
        values = []
        for step, row in self._rows.items():
            value = float("nan") if row[column] is None else row[column]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not (may_be_empty or isfinite(value)):
                raise UsageError(
                    f"{self._where}, step {step}: {column} is {shown(row[column])}: write a "
                    "number; none is for a run with the status diverged."
                )
            values.append(value)
        return np.array(values, dtype=np.float64)

    def counts(self, column: str) -> Any:
        """A column that rises with the steps, int64, [n]."""
        values: list[int] = []
        for step, row in self._rows.items():
            where = f"{self._where}, step {step}"
            values.append(whole_number(column, row[column], where, values[-1] if values else 0))
        return np.array(values, dtype=np.int64)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and isnan(value))
