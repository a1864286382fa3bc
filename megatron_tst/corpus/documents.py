"""From the content of a file to the text of a document, and which documents a corpus takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.readers import RawContent, RawDocument, read_batches, take_apart
from megatron_tst.corpus.sources import Source

try:
    import orjson
except ImportError:  # optional, only faster
    orjson = None  # type: ignore[assignment]

_SAMPLED_SOURCES = 4
_SAMPLED_CHARACTERS = 1 << 16

# Of integers Python refuses those of thousands of digits, also where nobody asks for them.
_JSON = json.JSONDecoder(parse_int=float)
_ARRAY_HINT = "if the file is one array, make lines of it with jq -c '.[]'"


class BadDocumentError(UsageError):
    """One document cannot be used; the rest of its file may be fine."""


def decode(document: RawDocument, json_key: str) -> tuple[str, int]:
    """Text of a document and its size in UTF-8 bytes.

    Args:
        document: as read from its file.
        json_key: member of a JSON line that holds the text.

    Raises:
        BadDocumentError: the content is no text.
    """
    if document.content is None:
        raise BadDocumentError("a null in place of text")
    is_line = document.source.kind == "lines"
    if is_line and (found := _quick_text(document.content, json_key)) is not None:
        return found, checked_size(found)
    try:
        text = document.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"invalid UTF-8 at byte {error.start}") from error
    if is_line:
        text = _text_of_line(text, json_key)
    return text, checked_size(text)


def checked_size(text: str) -> int:
    """Size of a text in UTF-8 bytes.

    Raises:
        BadDocumentError: it holds what no text holds.
    """
    # Binary files and UTF-16 pass for UTF-8 more often than not, and byte-level tokenizers
    # without an id for NUL would drop it silently.
    if "\0" in text:
        raise BadDocumentError("a NUL character, so this is no text")
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise BadDocumentError(f"a lone surrogate at character {error.start}") from error


def _quick_text(line: bytes, json_key: str) -> str | None:
    """Text of a plain JSON line.

    None where ``json`` has to look at it: orjson refuses some of what that accepts (NaN, halves of
    surrogate pairs, huge numbers, a byte order mark), and its messages are others.
    """
    if orjson is None:
        return None
    try:
        text = orjson.loads(line)[json_key]
    except (ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _text_of_line(line: str, json_key: str) -> str:
    try:
        value: Any = _JSON.decode(line)
    except RecursionError as error:
        raise BadDocumentError("JSON nested too deeply to be read, or malformed JSON") from error
    except ValueError as error:
        hint = f" ({_ARRAY_HINT})" if line.lstrip().startswith("[") else ""
        raise BadDocumentError(f"malformed JSON, {error}{hint}") from error
    if isinstance(value, list):
        raise BadDocumentError(f"a JSON array and no object ({_ARRAY_HINT})")
    if not isinstance(value, dict):
        raise BadDocumentError("a JSON value that is no object")
    if json_key not in value:
        raise BadDocumentError(f"no member {json_key!r} (see --json-key)")
    if not isinstance(value[json_key], str):
        raise BadDocumentError(f"a member {json_key!r} that is no string")
    return cast(str, value[json_key])


class LeftOut(NamedTuple):
    """A document that a corpus does not take.

    Attributes:
        rank: documents of its batch in front of it that have tokens.
        document: without its content.
        problem: why it cannot be used, or None for an empty one.
        is_fatal: no limit allows it.
    """

    rank: int
    document: RawDocument
    problem: str | None
    is_fatal: bool = False


@dataclass(frozen=True)
class Outcomes:
    """What became of the documents of a batch.

    Attributes:
        tokens: of each document that has some.
        text_bytes: size of its text in UTF-8.
        left_out: all other documents.
        lines: of a block of lines, blank ones included.
    """

    tokens: list[int]
    text_bytes: list[int]
    left_out: list[LeftOut]
    lines: int

    @classmethod
    def of(cls, content: RawContent, json_key: str, encode: Callable[[str], int]) -> Outcomes:
        """Takes a batch apart.

        Args:
            content: of the batch.
            json_key: member of a JSON line that holds the text.
            encode: is given each text and returns its tokens; a ``UsageError`` ends the run.

        Raises:
            UsageError: the file cannot be read.
        """
        documents, lines = take_apart(content)
        outcomes = cls([], [], [], lines)
        for document in documents:
            problem, is_fatal, tokens = None, False, 0
            try:
                text, size = decode(document, json_key)
                tokens = encode(text)
            except BadDocumentError as error:
                problem = str(error)
            except UsageError as error:
                problem, is_fatal = str(error), True
            if tokens:
                outcomes.tokens.append(tokens)
                outcomes.text_bytes.append(size)
            else:
                named = document._replace(content=None)
                left_out = LeftOut(len(outcomes.tokens), named, problem, is_fatal)
                outcomes.left_out.append(left_out)
        return outcomes


def texts_of(content: RawContent, json_key: str) -> tuple[list[str], Outcomes]:
    """The texts of a batch that are not empty; their tokens are counted in characters."""
    texts: list[str] = []

    def keep(text: str) -> int:
        texts.append(text)
        return len(text)

    outcomes = Outcomes.of(content, json_key, keep)
    return [text for text in texts if text], outcomes


def sample_texts(sources: list[Source], json_key: str) -> list[str]:
    """Some of the text that a corpus is made of: the beginnings of files that lie far apart.

    What cannot be read is passed over; the run meets it in its turn.
    """
    sample: list[str] = []
    for source in sources[:: max(1, len(sources) // _SAMPLED_SOURCES)]:
        left = _SAMPLED_CHARACTERS
        with suppress(UsageError):
            for batch in islice(read_batches([source], json_key), 1):
                for text in texts_of(batch.content, json_key)[0]:
                    sample.append(text[:left])
                    left -= len(sample[-1])
    return sample
