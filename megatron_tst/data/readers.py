"""Documents from files: plain text, source code and JSON lines, compressed or not.

Everything here runs in one process and in a fixed order, so that the documents of a corpus and
their order depend on the files and the settings alone.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

JSON_LINES_EXTENSION = ".jsonl"
COMPRESSION_EXTENSIONS = (".gz", ".zst")
TEXT_EXTENSIONS = (".txt", ".md", ".rst", ".tex")
SOURCE_EXTENSIONS = (
    *(".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh"),
    *(".java", ".kt", ".scala", ".go", ".rs", ".swift", ".js", ".jsx", ".ts", ".tsx", ".rb"),
    *(".php", ".pl", ".lua", ".jl", ".r", ".hs", ".f90", ".cs", ".sh", ".sql"),
)
DEFAULT_EXTENSIONS = (JSON_LINES_EXTENSION, *TEXT_EXTENSIONS, *SOURCE_EXTENSIONS)


class _BadDocumentError(ValueError):
    """One document cannot be used; the rest of its file may be fine."""


@dataclass(frozen=True)
class Source:
    """A file to read.

    Attributes:
        path: the file.
        from_folder: found by searching a folder, not named by the user.
    """

    path: Path
    from_folder: bool

    @cached_property  # asked once a line, and taking a path apart is slower than reading one
    def is_json_lines(self) -> bool:
        """Whether each line is a document, rather than the whole file."""
        return _content_extension(self.path) == JSON_LINES_EXTENSION


@dataclass
class ReadCounts:
    """What one pass over the files has met so far.

    Attributes:
        documents: documents handed out.
        text_bytes: their size in UTF-8.
        empty_documents: documents without any text, left out.
        bad_documents: documents left out under ``max_bad_documents``.
        skipped_files: files of a searched folder that hold no UTF-8 text, left out.
        file_bytes: bytes read from disk (compressed size where a file is compressed).
    """

    documents: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    bad_documents: int = 0
    skipped_files: int = 0
    file_bytes: int = 0


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


class DocumentReader:
    """Iterates over the text of the documents; every pass starts anew and yields the same.

    A JSON-lines file holds one document a line, any other file is one document.

    Args:
        sources: files in reading order, from :func:`find_sources`.
        json_key: member of each JSON line that holds the text.
        max_documents: stop after this many documents.
        max_bytes: stop before the document that would exceed this much text (UTF-8 bytes).
        max_bad_documents: malformed documents to leave out before giving up. Files of a searched
            folder that are not UTF-8 text do not count: such folders hold binary files too.

    Raises:
        ValueError: while iterating; names the file and, for JSON lines, the line.
    """

    def __init__(
        self,
        sources: list[Source],
        json_key: str = "text",
        max_documents: int | None = None,
        max_bytes: int | None = None,
        max_bad_documents: int = 0,
    ) -> None:
        self.sources = sources
        self.total_file_bytes = sum(source.path.stat().st_size for source in sources)
        self.counts = ReadCounts()
        self._json_key = json_key
        self._max_documents = max_documents
        self._max_bytes = max_bytes
        self._max_bad_documents = max_bad_documents

    def __iter__(self) -> Iterator[str]:
        counts = self.counts = ReadCounts()
        for source in self.sources:
            for where, raw in self._raw_documents(source):
                try:
                    text, size = self._decode(source, raw)
                except _BadDocumentError as error:
                    self._leave_out(source, where, error)
                    continue
                if not text:
                    counts.empty_documents += 1
                    continue
                if self._max_bytes is not None and counts.text_bytes + size > self._max_bytes:
                    return
                counts.documents += 1
                counts.text_bytes += size
                yield text
                if counts.documents == self._max_documents:
                    return

    def _raw_documents(self, source: Source) -> Iterator[tuple[str, bytes]]:
        """Location and undecoded content of each document of a file."""
        bytes_before = self.counts.file_bytes
        try:
            with _open(source.path) as (file, content):
                if source.is_json_lines:
                    for number, line in enumerate(content, start=1):
                        self.counts.file_bytes = bytes_before + file.tell()
                        if line.strip():
                            yield f"{source.path}:{number}", line
                else:
                    whole = content.read()
                    self.counts.file_bytes = bytes_before + file.tell()
                    yield str(source.path), whole
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{source.path} cannot be read ({error}): repair it or leave it out of --input."
            ) from error

    def _decode(self, source: Source, raw: bytes) -> tuple[str, int]:
        """Text of a document and its size in UTF-8 bytes."""
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _BadDocumentError(f"invalid UTF-8 at byte {error.start}") from error
        if source.is_json_lines:
            text = self._text_of_line(text)
        # Binary files and UTF-16 pass for UTF-8 more often than not, and byte-level tokenizers
        # without an id for NUL would drop it silently.
        if "\0" in text:
            raise _BadDocumentError("a NUL character, so this is no text")
        try:
            return text, len(text.encode())
        except UnicodeEncodeError as error:
            raise _BadDocumentError(f"a lone surrogate at character {error.start}") from error

    def _text_of_line(self, line: str) -> str:
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadDocumentError(f"malformed JSON, {error}") from error
        if not isinstance(value, dict):
            raise _BadDocumentError("a JSON value that is no object")
        if self._json_key not in value:
            raise _BadDocumentError(f"no member {self._json_key!r} (see --json-key)")
        if not isinstance(value[self._json_key], str):
            raise _BadDocumentError(f"a member {self._json_key!r} that is no string")
        return cast(str, value[self._json_key])

    def _leave_out(self, source: Source, where: str, error: _BadDocumentError) -> None:
        if source.from_folder and not source.is_json_lines:
            self.counts.skipped_files += 1
            return
        self.counts.bad_documents += 1
        if self.counts.bad_documents > self._max_bad_documents:
            raise ValueError(
                f"{where} has {error}: repair it, or raise --max-bad-documents "
                f"(now {self._max_bad_documents}) to leave such documents out."
            ) from error


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
