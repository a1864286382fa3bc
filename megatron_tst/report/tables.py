"""Tables of plain values as files, CSV or Parquet by the suffix."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_tst.common.atomic_files import write_file
from megatron_tst.common.errors import UsageError

Row = dict[str, Any]

# An index, as pandas writes it beside the columns; a spreadsheet has empty columns.
_UNNAMED = re.compile(r"(Unnamed: \d+|__index_level_\d+__)?")
# From here on not every float is a whole number of its own.
_LARGEST_WHOLE = 2**53


def write_table(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Writes rows; a value that a row lacks stays empty. The file appears whole or not at all."""
    write_file(path, _parquet(rows, columns) if _is_parquet(path) else _csv(rows, columns))


def read_table(path: Path, required: Sequence[str], text_columns: Collection[str]) -> list[Row]:
    """Reads rows; an empty value is None. Columns without a name are left out.

    Args:
        path: file that :func:`write_table` wrote.
        required: columns without which the file is another kind of table.
        text_columns: columns that are never numbers, whatever they look like.

    Raises:
        UsageError: naming the file and the missing columns, or what is wrong with it.
    """
    read = _read_parquet if _is_parquet(path) else _read_csv
    columns, rows = read(path, text_columns)
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
        short = f"{value:.10g}"
        # What is read back is the same: a learning rate of 1e-3 / 3 pairs with that of a folder.
        return short if float(short) == value else repr(float(value))
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _read_csv(path: Path, text_columns: Collection[str]) -> tuple[Sequence[str], list[Row]]:
    # Spreadsheets begin UTF-8 with a byte order mark.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            columns = [name.strip() for name in next(reader, [])]
            _check_columns(path, columns)
            rows = []
            for cells in reader:
                if any(cells[len(columns) :]):
                    raise UsageError(
                        f"{path}, line {reader.line_num}: {len(cells)} values for {len(columns)} "
                        f"columns, the last {cells[-1]!r}: put text that holds a comma in quotes."
                    )
                # Spreadsheets may leave out empty values at the end of a line.
                if any(cells):
                    rows.append(dict.fromkeys(columns) | dict(zip(columns, cells, strict=False)))
        except (UnicodeDecodeError, csv.Error) as error:
            raise _no_table(path, error) from error
    return columns, [_cleaned(row, text_columns) for row in rows]


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise UsageError(f"{path} has two columns {', '.join(twice)}: leave one of them out.")
    for mark in ";\t":
        if len(columns) == 1 and mark in columns[0]:
            raise UsageError(
                f"{path} has {mark!r} between its columns: export it with commas there, and with "
                "points in its numbers."
            )


def _cleaned(row: Row, text_columns: Collection[str]) -> Row:
    """A row without columns that have no name, its texts as the values that they stand for."""
    return {
        name: _as_text(value) if name in text_columns else _as_value(value)
        for name, value in row.items()
        if not _UNNAMED.fullmatch(name)
    }


def _as_text(value: Any) -> str | None:
    # An empty value is NaN where a program takes empty values for missing numbers.
    text = "" if value is None else str(value).strip()
    return None if text.lower() in ("", "nan") else text


def _as_value(value: Any) -> Any:
    if isinstance(value, str):
        return value_of(value)
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_WHOLE
    return int(value) if is_whole else value


def _no_table(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be read as a table ({error}): write it again.")


def value_of(text: str) -> str | int | float | bool | None:
    """The number, truth value or text that a text stands for; None if it is empty.

    Other programs write 2 as 2.0 where a column has empty cells, and true as True or TRUE.
    """
    text = text.strip()
    if not text:
        return None
    # Python reads 1_2 as a number.
    for convert in (int, float) if "_" not in text else ():
        try:
            return _as_value(convert(text))
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _parquet(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: _parquet_column([row.get(name) for row in rows]) for name in columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _parquet_column(values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values)
    except pa.ArrowException:
        # Of several types, such as a batch size and a schedule of them: as in CSV.
        return pa.array([None if value is None else _written(value) for value in values])


def _read_parquet(path: Path, text_columns: Collection[str]) -> tuple[Sequence[str], list[Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise _no_table(path, error) from error
    return table.column_names, [_cleaned(row, text_columns) for row in table.to_pylist()]
