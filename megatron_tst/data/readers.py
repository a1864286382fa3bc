"""Documents as they lie in files: text, source code, JSON lines and Parquet, compressed or not.

Everything here runs in one process and in a fixed order, so that the documents of a corpus and
their order depend on the files and the settings alone. What a document says is looked at later, by
``documents.py`` in worker processes: reading alone has to keep pace with all of them.
"""

from __future__ import annotations

import gzip
import io
import random
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, cast

import zstandard

from megatron_tst.data.parquet import PARQUET_EXTENSION, read_column

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BATCH_BYTES = 1 << 20
_DOCUMENT_BYTES = 100  # of memory for a document however short
JSON_LINES_EXTENSION = ".jsonl"
COMPRESSION_EXTENSIONS = (".gz", ".zst")
TEXT_EXTENSIONS = (".txt", ".md", ".rst", ".tex")
SOURCE_EXTENSIONS = (
    *(".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh"),
    *(".java", ".kt", ".scala", ".go", ".rs", ".swift", ".js", ".jsx", ".ts", ".tsx", ".rb"),
    *(".php", ".pl", ".lua", ".jl", ".r", ".hs", ".f90", ".cs", ".sh", ".sql"),
)
DEFAULT_EXTENSIONS = (
    *(JSON_LINES_EXTENSION, PARQUET_EXTENSION),
    *TEXT_EXTENSIONS,
    *SOURCE_EXTENSIONS,
)


@dataclass(frozen=True)
class Source:
    """A file to read.

    Attributes:
        path: the file.
        from_folder: found by searching a folder, not named by the user.
    """

    path: Path
    from_folder: bool

    @cached_property  # asked once a document, and taking a path apart is slower than reading one
    def kind(self) -> Literal["lines", "rows", "text"]:
        """JSON lines and Parquet rows are documents each; any other file is one document."""
        extension = _content_extension(self.path)
        if extension == JSON_LINES_EXTENSION:
            return "lines"
        return "rows" if extension == PARQUET_EXTENSION else "text"


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


def _content_extension(path: Path) -> str:
    name = Path(path.name.lower())
    return (name.with_suffix("") if name.suffix in COMPRESSION_EXTENSIONS else name).suffix


def find_sources(
    inputs: Iterable[Path], extensions: tuple[str, ...], shuffle_seed: int | None = None
) -> list[Source]:
    """The files to read, in the order of ``inputs`` and sorted by path inside each folder.

    Args:
        inputs: files, and folders that are searched recursively.
        extensions: extensions to read, below any ``.gz`` or ``.zst``.
        shuffle_seed: shuffles the order of the files reproducibly.

    Raises:
        ValueError: an input does not exist, has another extension, or holds no file to read; or
            an extension would never match.
    """
    for extension in extensions:
        if _content_extension(Path(f"name{extension}")) != extension:
            raise ValueError(
                f"--extensions has {extension!r}: write it like .py, in lower case, with the dot "
                "and without .gz or .zst."
            )
    sources: list[Source] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if _content_extension(p) in extensions)
            files = [Source(p, from_folder=True) for p in found if p.is_file()]
            if not files:
                raise ValueError(
                    f"--input {path} holds no file to read: --extensions is {' '.join(extensions)}."
                )
            sources += files
        elif not path.exists():
            raise ValueError(f"--input {path} does not exist: name a file or a folder.")
        elif _content_extension(path) not in extensions:
            raise ValueError(
                f"--input {path} has an unknown extension: add it to --extensions "
                f"({' '.join(extensions)}) if it is text, compressed or not."
            )
        else:
            sources.append(Source(path, from_folder=False))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(sources)
    return sources


def read_batches(
    sources: list[Source], column: str = "text", start: Position | None = None
) -> Iterator[RawBatch]:
    """Reads documents from ``start`` on, in batches of about ``BATCH_BYTES``.

    Args:
        sources: files in reading order, from :func:`find_sources`.
        column: of Parquet files, with the text.
        start: end of an earlier batch of the same sources.

    Raises:
        ValueError: a file cannot be read; raised after what lies before has been handed out.
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
    except ValueError:
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
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{source.path} cannot be read ({error}): repair it or leave it out of --input."
            ) from error
        bytes_before += source.path.stat().st_size


_Record = tuple[RawDocument | LineBlock, Position, int]
"""Content, the position behind it, and the bytes of the file read up to there."""


def _lines(source: Source, column: str, start: Position) -> Iterator[_Record]:
    number, offset = start.records, start.offset
    with _open(source.path) as (file, content):
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
        except (OSError, EOFError, zlib.error) as error:
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
        with _open(source.path) as (file, content):
            document = RawDocument(source, 0, content.read())
            yield document, Position(start.source, 1), file.tell()


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file, whose position measures progress, and its decompressed content."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            yield file, cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif path.suffix.lower() == ".zst":
            yield file, cast(BinaryIO, io.BufferedReader(_ZstdStream(file)))
        else:
            yield file, file


class _ZstdStream(io.RawIOBase):
    """Decompressed content of a Zstandard file of any number of frames.

    The stream reader of ``zstandard`` takes a truncated file for a complete one, which would
    shorten a corpus without a word; this one raises EOFError.
    """

    _CHUNK_BYTES = 1 << 17

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer)
        while not self._content and self._advance():
            pass
        size = min(len(target), len(self._content))
        target[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _advance(self) -> bool:
        """Decompresses the next piece; False at the end of the file."""
        self._compressed = self._compressed or self._file.read(self._CHUNK_BYTES)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("the last Zstandard frame is incomplete")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            self._content = memoryview(self._frame.decompress(self._compressed))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return True
