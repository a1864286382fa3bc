"""One text column of a Parquet file, in bounded memory. Needs pyarrow, which is optional."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_tst.common.errors import UsageError

PARQUET_EXTENSION = ".parquet"
_ROWS_AT_ONCE = 256


def read_column(
    path: Path, column: str, first_row: int = 0
) -> Iterator[tuple[int, int, bytes | None]]:
    """Reads a column row by row; other columns stay on disk.

    Args:
        path: the file.
        column: name of a top-level column of strings.
        first_row: rows to pass over; row groups among them are not read.

    Yields:
        Row counted from 1, rows of the file, and the text in UTF-8 (None for a null).

    Raises:
        UsageError: pyarrow is missing, or the file has no such column of strings.
        OSError: the file is damaged.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(
            f"--input {path}: reading Parquet needs pyarrow: pip install 'megatron-tst[data]'."
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            _check_column(path, column, file.schema_arrow)
            number, rows = 0, file.metadata.num_rows
            for group in range(file.num_row_groups):
                group_rows = file.metadata.row_group(group).num_rows
                if number + group_rows <= first_row:
                    number += group_rows
                    continue
                for batch in file.iter_batches(_ROWS_AT_ONCE, [group], [column]):
                    # As bytes: pyarrow takes invalid UTF-8 for text, and one bad row is no reason
                    # to give up the file.
                    for content in batch.column(0).cast(pa.large_binary()).to_pylist():
                        number += 1
                        if number > first_row:
                            yield number, rows, content
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _check_column(path: Path, column: str, schema: object) -> None:
    import pyarrow as pa

    assert isinstance(schema, pa.Schema)
    if schema.names.count(column) != 1:
        raise UsageError(
            f"{path} has no column {column!r} ({', '.join(schema.names)}): set --json-key."
        )
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_view(kind)):
        raise UsageError(f"{path} holds {kind} in column {column!r}, not text: set --json-key.")


def _is_view(kind: object) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string_view(kind))
