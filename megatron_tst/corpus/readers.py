"""Documents as they lie in files: text, source code, JSON lines and Parquet, compressed or not.

Everything here runs in one process and in a fixed order, so that the documents of a corpus and
their order depend on the files and the settings alone. What a document says is looked at later, by
``documents.py`` in worker processes: reading alone has to keep pace with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, NamedTuple

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.compression import READ_ERRORS, open_content, unreadable
from megatron_tst.corpus.parquet import read_column
from megatron_tst.corpus.sources import Source

BATCH_BYTES = 1 << 20
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
class LineBlock:
    """Lines of a file as they lie in it: taking them apart is left to the worker processes.

    Attributes:
        source: the file.
        lines_before: lines of the file in front of these.
        content: whole lines; the last one of a file may lack its end.
    """

    source: Source
    lines_before: int
    content: bytes

    def documents(self) -> list[RawDocument]:
        """Each line that is not blank."""
        lines = enumerate(self.content.split(b"\n"), start=self.lines_before + 1)
        return [
            RawDocument(self.source, number, line)
            for number, line in lines
            if line and not line.isspace()
        ]


RawContent = list[RawDocument] | LineBlock


@dataclass(frozen=True)
class RawBatch:
    """Consecutive documents, of several files if these are small and are no lines.

    Attributes:
        content: the documents, or the lines that they are.
        end: where reading goes on behind them.
        file_bytes: bytes of the input files up to there, compressed where they are.
    """

    content: RawContent
    end: Position
    file_bytes: int

    @property
    def documents(self) -> list[RawDocument]:
        """The documents, made anew from lines at each call."""
        return documents_of(self.content)


def documents_of(content: RawContent) -> list[RawDocument]:
    """The documents of a batch."""
    return content.documents() if isinstance(content, LineBlock) else content


def read_batches(
    sources: list[Source], column: str = "text", start: Position | None = None
) -> Iterator[RawBatch]:
    """Reads documents from ``start`` on, in batches of about ``BATCH_BYTES``.

    Args:
        sources: files in reading order, from ``find_sources``.
        column: of Parquet files, with the text.
        start: end of an earlier batch of the same sources.

    Raises:
        UsageError: a file cannot be read; raised after what lies before has been handed out.
    """
    documents: list[RawDocument] = []
    size = file_bytes = 0
    end = Position()
    try:
        for content, end, file_bytes in _contents(sources, column, start or Position()):
            if isinstance(content, LineBlock):
                if documents:
                    # Nothing lies between these and the lines.
                    yield RawBatch(documents, Position(end.source), file_bytes)
                    documents, size = [], 0
                yield RawBatch(content, end, file_bytes)
                continue
            documents.append(content)
            size += len(content.content or b"") + _DOCUMENT_BYTES
            if size >= BATCH_BYTES:
                yield RawBatch(documents, end, file_bytes)
                documents, size = [], 0
    except UsageError:
        if documents:
            yield RawBatch(documents, end, file_bytes)
        raise
    if documents:
        yield RawBatch(documents, end, file_bytes)


def _contents(
    sources: list[Source], column: str, start: Position
) -> Iterator[tuple[RawDocument | LineBlock, Position, int]]:
    """Each document or block, the position behind it, and the bytes of the files up to there."""
    bytes_before = sum(source.path.stat().st_size for source in sources[: start.source])
    for number, source in enumerate(sources[start.source :], start=start.source):
        begin = start if number == start.source else Position(number)
        read = {"lines": _lines, "rows": _rows, "text": _whole}[source.kind]
        try:
            for content, end, file_bytes in read(source, column, begin):
                yield content, end, bytes_before + file_bytes
        except READ_ERRORS as error:
            raise unreadable(source.path, error) from error
        bytes_before += source.path.stat().st_size


_Record = tuple[RawDocument | LineBlock, Position, int]
"""Content, the position behind it, and the bytes of the file read up to there."""


def _lines(source: Source, column: str, start: Position) -> Iterator[_Record]:
    number, offset = start.records, start.offset
    with open_content(source.path) as (file, content):
        if content is file:
            file.seek(offset)
        else:
            # Cheap beside tokenizing: nothing is kept or looked at.
            for _ in islice(content, start.records):
                pass
        for block in _line_blocks(content):
            lines = LineBlock(source, number, block)
            number += block.count(b"\n") + (not block.endswith(b"\n"))
            offset += len(block)
            if not block.isspace():
                yield lines, Position(start.source, number, offset), file.tell()


def _line_blocks(content: BinaryIO) -> Iterator[bytes]:
    """Whole lines in blocks of about ``BATCH_BYTES``; an error comes behind what lies before."""
    pieces: list[bytes] = []
    size = 0
    failure: Exception | None = None
    while True:
        try:
            # At most one look into the file: an error must not take along what lies before.
            piece = content.read1(BATCH_BYTES)  # type: ignore[attr-defined]
        except READ_ERRORS as error:
            failure, piece = error, b""
        if not piece:
            break
        size += len(piece)
        end = piece.rfind(b"\n") + 1 if size >= BATCH_BYTES else 0
        if end:
            yield b"".join([*pieces, memoryview(piece)[:end]])
            pieces, size, piece = [], len(piece) - end, piece[end:]
        pieces.append(piece)
    rest = b"".join(pieces)
    if failure is not None:
        rest = rest[: rest.rfind(b"\n") + 1]
    if rest:
        yield rest
    if failure is not None:
        raise failure


def _rows(source: Source, column: str, start: Position) -> Iterator[_Record]:
    size = source.path.stat().st_size
    for number, rows, content in read_column(source.path, column, start.records):
        document = RawDocument(source, number, content)
        yield document, Position(start.source, number), size * number // rows


def _whole(source: Source, column: str, start: Position) -> Iterator[_Record]:
    if start.records == 0:
        with open_content(source.path) as (file, content):
            document = RawDocument(source, 0, content.read())
            yield document, Position(start.source, 1), file.tell()
