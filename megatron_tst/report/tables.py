"""Tables of plain values as files, CSV or Parquet by the suffix."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_tst.common.atomic_files import write_file
from megatron_tst.common.errors import UsageError

Row = dict[str, Any]


def write_table(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Writes rows; a value that a row lacks stays empty. The file appears whole or not at all."""
    write_file(path, _parquet(rows, columns) if _is_parquet(path) else _csv(rows, columns))


def read_table(path: Path, required: Sequence[str], text_columns: Collection[str]) -> list[Row]:
    """Reads rows; an empty value is None.

    Args:
        path: file that :func:`write_table` wrote.
        required: columns without which the file is another kind of table.
        text_columns: columns of a CSV file that are never numbers, whatever they look like.

    Raises:
        UsageError: naming the file and the missing columns.
    """
    columns, rows = _read_parquet(path) if _is_parquet(path) else _read_csv(path, text_columns)
    missing = [name for name in required if name not in columns]
    if missing:
        raise UsageError(
            f"{path} has no column {', '.join(missing)}: it is no table of results; pass one that "
            "tst compare --results wrote."
        )
    return rows


def _csv(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _written(value) for name, value in row.items()})
    return text.getvalue().encode()


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _read_csv(path: Path, text_columns: Collection[str]) -> tuple[Sequence[str], list[Row]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            columns, read = reader.fieldnames or (), list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise _no_table(path, error) from error
    rows = [
        {name: text or None if name in text_columns else _value(text) for name, text in row.items()}
        for row in read
    ]
    return columns, rows


def _no_table(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be read as a table ({error}): write it again.")


def _value(text: str | None) -> Any:
    if not text:
        return None
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _parquet(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _read_parquet(path: Path) -> tuple[Sequence[str], list[Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise _no_table(path, error) from error
    return table.column_names, table.to_pylist()
