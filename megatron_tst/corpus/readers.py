"""Documents as they lie in files: text, source code, JSON lines and Parquet, compressed or not.

One process says in a fixed order what is read, so that the documents of a corpus and their order
depend on the files and the settings alone. It has to keep pace with all worker processes: they read
lines of files that are not compressed, and look at what documents say (``documents.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
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
        number: row of the file or line of its ``LineBlock``, counted from 1; 0 for a file that is
            one document.
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
        records: lines or rows of it that lie before. Lines are counted where they are taken apart,
            so that ``read_batches`` leaves 0 here.
        offset: its decompressed bytes that lie before, if it has lines.
    """

    source: int = 0
    records: int = 0
    offset: int = 0


@dataclass(frozen=True)
class LineBlock:
    """Lines of a file: taking them apart is left to the worker processes.

    Attributes:
        source: the file.
        offset: its decompressed bytes in front of these lines.
        content: the lines, or how many bytes of an uncompressed file they are; the last line of a
            file may lack its end.
    """

    source: Source
    offset: int
    content: bytes | int


RawContent = list[RawDocument] | LineBlock | UsageError
"""Reading is ahead of writing: an error must not hide a limit that is met before it."""


@dataclass(frozen=True)
class RawBatch:
    """Consecutive documents, of several files if these are small and are no lines.

    Attributes:
        content: the documents, the lines that they are, or why they cannot be read.
        end: where reading goes on behind them.
        file_bytes: bytes of the input files up to there, compressed where they are.
    """

    content: RawContent
    end: Position
    file_bytes: int


def take_apart(content: RawContent) -> tuple[list[RawDocument], int]:
    """The documents of a batch, blank lines left out, and how many lines it has with those.

    Raises:
        UsageError: the file cannot be read.
    """
    if isinstance(content, UsageError):
        raise content
    if isinstance(content, list):
        return content, 0
    source, block = content.source, content.content
    if isinstance(block, int):
        try:
            with source.path.open("rb") as file:
                file.seek(content.offset)
                read = file.read(block)
            if len(read) < block:
                raise EOFError("it has become shorter")
        except READ_ERRORS as error:
            raise unreadable(source.path, error) from error
        block = read
    lines = block.split(b"\n")
    documents = [
        RawDocument(source, number, line)
        for number, line in enumerate(lines, start=1)
        if line and not line.isspace()
    ]
    return documents, len(lines) - (not lines[-1])


def read_batches(
    sources: list[Source], column: str = "text", start: Position | None = None
) -> Iterator[RawBatch]:
    """Reads documents from ``start`` on, in batches of about ``BATCH_BYTES``.

    Args:
        sources: files in reading order, from ``find_sources``.
        column: of Parquet files, with the text.
        start: end of an earlier batch of the same sources.

    Yields:
        Batches; of a file that cannot be read, what lies before the damage and then the error.
    """
    documents: list[RawDocument] = []
    size = file_bytes = 0
    end = Position()
    failure: UsageError | None = None
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
    except UsageError as error:
        failure = error
    if documents:
        yield RawBatch(documents, end, file_bytes)
    if failure is not None:
        yield RawBatch(failure, end, file_bytes)


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
    offset = start.offset
    with open_content(source.path) as (file, content):
        blocks = _plain_blocks(file, offset) if content is file else _line_blocks(content, offset)
        for block in blocks:
            lines = LineBlock(source, offset, block)
            offset += block if isinstance(block, int) else len(block)
            yield lines, Position(start.source, 0, offset), file.tell()


def _plain_blocks(file: BinaryIO, offset: int) -> Iterator[int]:
    """Sizes of blocks of whole lines, of which only the ends are looked at."""
    size = file.seek(0, os.SEEK_END)
    while offset < size:
        file.seek(offset + BATCH_BYTES - 1)
        while (piece := file.readline(BATCH_BYTES)) and not piece.endswith(b"\n"):
            pass
        end = file.seek(min(file.tell(), size))
        yield end - offset
        offset = end


def _line_blocks(content: BinaryIO, offset: int) -> Iterator[bytes]:
    """Whole lines in blocks of about ``BATCH_BYTES``; an error comes behind what lies before."""
    while offset and (piece := content.read(min(offset, BATCH_BYTES))):
        offset -= len(piece)
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
