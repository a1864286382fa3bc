"""Documents as they lie in files: text, source code, JSON lines and Parquet, compressed or not.

Everything here runs in one process and in a fixed order, so that the documents of a corpus and
their order depend on the files and the settings alone. What a document says is looked at later, by
``documents.py`` in worker processes: reading alone has to keep pace with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from megatron_tst.data.compression import READ_ERRORS, open_content, unreadable
from megatron_tst.data.parquet import read_column
from megatron_tst.data.sources import Source

BATCH_BYTES = 1 << 18
_DOCUMENT_BYTES = 100  # of memory for a document however short


class RawDocument(NamedTuple):
    """A document as it lies in its file.

    Attributes:
        source: the file.
        number: line or row, counted from 1; 0 for a file that is one document.
        content: the line, the UTF-8 text of the row (None for a null), or the file.
    """

    source: Source
    number: int
    content: bytes | None

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.source.path}:{self.number}" if self.number else str(self.source.path)


class Position(NamedTuple):
    """A place between two documents.

    Attributes:
        source: number of the file.
        records: lines or rows of it that lie before.
        offset: its decompressed bytes that lie before, if it has lines.
    """

    source: int = 0
    records: int = 0
    offset: int = 0


@dataclass(frozen=True)
class RawBatch:
    """Consecutive documents, of several files if these are small.

    Attributes:
        documents: the documents.
        end: where reading goes on behind them.
        file_bytes: bytes of the input files up to there, compressed where they are.
    """

    documents: list[RawDocument]
    end: Position
    file_bytes: int


def read_batches(
    sources: list[Source], column: str = "text", start: Position | None = None
) -> Iterator[RawBatch]:
    """Reads documents from ``start`` on, in batches of about ``BATCH_BYTES``.

    Args:
        sources: files in reading order, from ``find_sources``.
        column: of Parquet files, with the text.
        start: end of an earlier batch of the same sources.

    Raises:
        ValueError: a file cannot be read; raised after what lies before has been handed out.
    """
    documents: list[RawDocument] = []
    size = file_bytes = 0
    end = Position()
    try:
        for document, end, file_bytes in _documents(sources, column, start or Position()):
            documents.append(document)
            size += len(document.content or b"") + _DOCUMENT_BYTES
            if size >= BATCH_BYTES:
                yield RawBatch(documents, end, file_bytes)
                documents, size = [], 0
    except ValueError:
        if documents:
            yield RawBatch(documents, end, file_bytes)
        raise
    if documents:
        yield RawBatch(documents, end, file_bytes)


def _documents(
    sources: list[Source], column: str, start: Position
) -> Iterator[tuple[RawDocument, Position, int]]:
    """Each document, the position behind it, and the bytes of the files read up to there."""
    bytes_before = sum(source.path.stat().st_size for source in sources[: start.source])
    for number, source in enumerate(sources[start.source :], start=start.source):
        begin = start if number == start.source else Position(number)
        read = {"lines": _lines, "rows": _rows, "text": _whole}[source.kind]
        try:
            for content, end, file_bytes in read(source.path, column, begin):
                record = 0 if source.kind == "text" else end.records
                yield RawDocument(source, record, content), end, bytes_before + file_bytes
        except READ_ERRORS as error:
            raise unreadable(source.path, error) from error
        bytes_before += source.path.stat().st_size


_Record = tuple[bytes | None, Position, int]
"""Content, the position behind it, and the bytes of the file read up to there."""


def _lines(path: Path, column: str, start: Position) -> Iterator[_Record]:
    offset = start.offset
    with open_content(path) as (file, content):
        if content is file:
            file.seek(offset)
        else:
            # Cheap beside tokenizing: nothing is kept or looked at.
            for _ in islice(content, start.records):
                pass
        for number, line in enumerate(content, start=start.records + 1):
            offset += len(line)
            if line.strip():
                yield line, Position(start.source, number, offset), file.tell()


def _rows(path: Path, column: str, start: Position) -> Iterator[_Record]:
    size = path.stat().st_size
    for number, rows, content in read_column(path, column, start.records):
        yield content, Position(start.source, number), size * number // rows


def _whole(path: Path, column: str, start: Position) -> Iterator[_Record]:
    if start.records == 0:
        with open_content(path) as (file, content):
            whole = content.read()
            yield whole, Position(start.source, 1), file.tell()
