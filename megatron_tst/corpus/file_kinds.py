"""What a file holds: JSON lines, rows or text. Names lie about JSON, so its content decides."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.compression import (
    COMPRESSION_EXTENSIONS,
    READ_ERRORS,
    open_content,
    unreadable,
)
from megatron_tst.corpus.parquet import PARQUET_EXTENSION

LINES_EXTENSIONS = (".jsonl", ".ndjson", ".jsonlines")
JSON_EXTENSION = ".json"  # JSON lines, an array, or one object
JULIA_EXTENSION = ".jl"  # or JSON lines
TEXT_EXTENSIONS = (".txt", ".md", ".rst", ".tex")
SOURCE_EXTENSIONS = (
    *(".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh"),
    *(".java", ".kt", ".scala", ".go", ".rs", ".swift", ".js", ".jsx", ".ts", ".tsx", ".rb"),
    *(".php", ".pl", ".lua", JULIA_EXTENSION, ".r", ".hs", ".f90", ".cs", ".sh", ".sql"),
)
DEFAULT_EXTENSIONS = (
    *(*LINES_EXTENSIONS, JSON_EXTENSION, PARQUET_EXTENSION),
    *TEXT_EXTENSIONS,
    *SOURCE_EXTENSIONS,
)

# A document of one line may be long; what is behind this decides nothing.
_LINE_BYTES = 1 << 24
_ARRAY_BYTES = 1 << 16
_BYTES_OF_A_CHARACTER = 4

# Numbers of any length: they are not what a document is about.
_JSON = json.JSONDecoder(parse_int=float)

Kind = Literal["lines", "rows", "text"]


def content_extension(path: Path) -> str:
    """Extension below the one of a compression, in lower case."""
    name = Path(path.name.lower())
    return (name.with_suffix("") if name.suffix in COMPRESSION_EXTENSIONS else name).suffix


def kind_in_folder(
    path: Path, extension: str, extensions: tuple[str, ...], json_key: str
) -> Kind | None:
    """Kind of a file that was found in a folder.

    Returns:
        None for JSON that holds no documents: configurations, lock files and the like.

    Raises:
        UsageError: a JSON array of documents, or a file that cannot be read.
    """
    if (kind := _kind_by_name(extension)) is not None:
        return kind
    begins = _look_into(path, json_key)
    if begins.has_key or (extension == JULIA_EXTENSION and begins.objects):
        return "lines"
    if begins.array_has_key:
        raise _array_error(path)
    return "text" if extension != JSON_EXTENSION or _takes_json_as_text(extensions) else None


def kind_of_named(path: Path, extensions: tuple[str, ...], json_key: str) -> Kind:
    """Kind of a file that the user named; JSON lines may have any name.

    Raises:
        UsageError: an unknown extension, JSON in another form, or a file that cannot be read.
    """
    extension = content_extension(path)
    if extension in extensions and (kind := _kind_by_name(extension)) is not None:
        return kind
    begins = _look_into(path, json_key)
    is_asked_for = _takes_json_as_text(extensions) or extension != JSON_EXTENSION
    # One object may well be the text of a file that was asked for as text.
    is_text = extension in extensions and is_asked_for and extension != JULIA_EXTENSION
    if begins.has_key or begins.objects > is_text:
        return "lines"
    if begins.array_has_key or (begins.is_array and extension == JSON_EXTENSION):
        raise _array_error(path)
    if extension not in extensions:
        raise UsageError(
            f"--input {path} has an unknown extension and does not begin with a JSON object on a "
            f"line: add it to --extensions ({' '.join(extensions)}) if it is text, compressed or "
            "not."
        )
    if not is_asked_for:
        raise UsageError(
            f"--input {path} does not begin with a JSON object on one line. If its objects are "
            f"documents, write each on a line: jq -c . {path.name} > lines.jsonl. If the JSON is "
            "the text to learn, name .json in --extensions."
        )
    return "text"


class _Beginning(NamedTuple):
    """What a file begins with.

    Attributes:
        objects: JSON objects among the first two lines that are not blank, until one is none.
        has_key: the first of them has the member with the text.
        is_array: a JSON array, or text that begins like one.
        array_has_key: its beginning holds an object with that member.
    """

    objects: int = 0
    has_key: bool = False
    is_array: bool = False
    array_has_key: bool = False


def _kind_by_name(extension: str) -> Kind | None:
    """The kind of a file with a known extension, None where its content decides."""
    if extension in LINES_EXTENSIONS:
        return "lines"
    if extension == PARQUET_EXTENSION:
        return "rows"
    return "text" if extension in SOURCE_EXTENSIONS and extension != JULIA_EXTENSION else None


def _takes_json_as_text(extensions: tuple[str, ...]) -> bool:
    # By default only its documents are wanted, and not every lock file of a folder of sources.
    return JSON_EXTENSION in extensions and extensions != DEFAULT_EXTENSIONS


def _array_error(path: Path) -> UsageError:
    return UsageError(
        f"--input {path} is a JSON array, and one object a line is read: make lines of it with "
        f"jq -c '.[]' {path.name} > lines.jsonl, or leave it out."
    )


def _look_into(path: Path, json_key: str) -> _Beginning:
    try:
        with open_content(path) as (_, content):
            return _beginning(content, json_key)
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def _beginning(content: BinaryIO, json_key: str) -> _Beginning:
    first = _next_line(content)
    if first.startswith("["):
        start = first[:_ARRAY_BYTES] + content.read(_ARRAY_BYTES).decode(errors="replace")
        return _Beginning(is_array=True, array_has_key=_has_member(start[1:].lstrip(), json_key))
    if not _is_object(first):
        return _Beginning()
    return _Beginning(1 + _is_object(_next_line(content)), _has_member(first, json_key))


def _next_line(content: BinaryIO) -> str:
    """The next line that is not blank, or its beginning; empty at the end."""
    while line := content.readline(_LINE_BYTES):
        if text := line.decode("utf-8-sig", errors="replace").strip():
            return text
    return ""


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(_JSON.decode(line), dict)
    except (ValueError, RecursionError):
        # One that was cut off is most likely a long document.
        return len(line.encode()) >= _LINE_BYTES - _BYTES_OF_A_CHARACTER


def _has_member(start: str, json_key: str) -> bool:
    """Whether text that begins with an object, whole or cut off, has a member."""
    if not start.startswith("{"):
        return False
    try:
        value, _ = _JSON.raw_decode(start)
    except (ValueError, RecursionError):
        member = rf"[^\[\]]*{re.escape(json.dumps(json_key))}\s*:"
        return re.match(member, start) is not None
    return json_key in value  # whatever it is: a bad document is met in its turn
