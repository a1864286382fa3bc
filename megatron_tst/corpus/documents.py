"""From the content of a file to the text of a document, and which documents a corpus takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.readers import RawBatch, RawDocument, read_batches
from megatron_tst.corpus.sources import Source

try:
    import orjson
except ImportError:  # optional, only faster
    orjson = None  # type: ignore[assignment]

_SAMPLED_SOURCES = 4
_SAMPLED_BYTES = 1 << 16

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


class Outcome(NamedTuple):
    """What became of a document.

    Attributes:
        text_bytes: size of its text in UTF-8.
        tokens: number of its tokens; 0 leaves it out as empty.
        problem: why it cannot be used, or None.
    """

    text_bytes: int
    tokens: int
    problem: str | None = None


@dataclass(frozen=True)
class Limits:
    """When to stop reading, and when to give up. None: no limit.

    Attributes:
        max_documents: stop after this many documents.
        max_bytes: stop before the document that would exceed this much text (UTF-8 bytes).
        max_bad_documents: malformed documents to leave out before giving up.
        max_empty_documents: empty documents to leave out before giving up.
    """

    max_documents: int | None = None
    max_bytes: int | None = None
    max_bad_documents: int = 0
    max_empty_documents: int | None = None


@dataclass
class Counts:
    """Documents met so far.

    Attributes:
        documents: taken into the corpus.
        text_bytes: their size in UTF-8.
        empty_documents: without text or tokens, left out.
        bad_documents: malformed, left out under ``max_bad_documents``.
        skipped_files: files of a searched folder that hold no UTF-8 text, left out.
    """

    documents: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    bad_documents: int = 0
    skipped_files: int = 0


@dataclass
class Selection:
    """Takes documents in their order until a limit is reached.

    Attributes:
        limits: when to stop.
        counts: documents met so far.
        left_out: file, line and reason of each document left out; emptied by the reader of it.
        finished: a limit is reached, and nothing more is taken.
    """

    limits: Limits
    counts: Counts = field(default_factory=Counts)
    left_out: list[str] = field(default_factory=list)
    finished: bool = False

    def take(self, document: RawDocument, outcome: Outcome) -> bool:
        """Counts the next document; False if it is left out.

        Raises:
            UsageError: one too many is bad or empty; names file and line.
        """
        counts, limits = self.counts, self.limits
        if self.finished:
            return False
        if outcome.problem is not None or outcome.tokens == 0:
            self._leave_out(document, outcome.problem)
            return False
        text_bytes = counts.text_bytes + outcome.text_bytes
        if limits.max_bytes is not None and text_bytes > limits.max_bytes:
            self.finished = True
            return False
        counts.documents += 1
        counts.text_bytes = text_bytes
        self.finished = counts.documents == limits.max_documents
        return True

    def take_batch(self, batch: RawBatch, outcomes: list[Outcome]) -> list[int]:
        """Counts the documents of a batch; the number of tokens of each that is taken.

        Raises:
            UsageError: one too many is bad or empty; names file and line.
        """
        counts, limits = self.counts, self.limits
        documents = counts.documents + len(outcomes)
        text_bytes = counts.text_bytes + sum(outcome.text_bytes for outcome in outcomes)
        takes_all = (
            not self.finished
            and (limits.max_documents is None or documents < limits.max_documents)
            and (limits.max_bytes is None or text_bytes <= limits.max_bytes)
            and all(outcome.tokens for outcome in outcomes)
        )
        if takes_all:
            # Which file and line each comes from does not matter here, and takes time to say.
            counts.documents, counts.text_bytes = documents, text_bytes
            return [outcome.tokens for outcome in outcomes]
        pairs = zip(batch.documents, outcomes, strict=True)
        return [outcome.tokens for document, outcome in pairs if self.take(document, outcome)]

    def _leave_out(self, document: RawDocument, problem: str | None) -> None:
        self.left_out.append(f"{document.where}: {problem or 'empty'}")
        counts, limits = self.counts, self.limits
        if problem is None:
            counts.empty_documents += 1
            limit, kind, count = limits.max_empty_documents, "empty", counts.empty_documents
        # Searched folders hold binary files too.
        elif document.source.from_folder and document.source.kind == "text":
            counts.skipped_files += 1
            return
        else:
            counts.bad_documents += 1
            limit, kind, count = limits.max_bad_documents, "bad", counts.bad_documents
        if limit is not None and count > limit:
            raise UsageError(
                f"{document.where} has {problem or 'no text'}: repair it, or raise "
                f"--max-{kind}-documents (now {limit}) to leave such documents out."
            )


def read_texts(
    batches: Iterable[RawBatch], json_key: str, selection: Selection
) -> Iterator[tuple[str, RawBatch]]:
    """Texts of the documents that ``selection`` takes, and the batch that each comes from.

    Raises:
        UsageError: one too many is bad or empty; names file and line.
    """
    for batch in batches:
        for document in batch.documents:
            text = ""
            try:
                text, size = decode(document, json_key)
                outcome = Outcome(size, tokens=len(text))
            except BadDocumentError as error:
                outcome = Outcome(0, 0, str(error))
            if selection.take(document, outcome):
                yield text, batch
            if selection.finished:
                return


def sample_texts(sources: list[Source], json_key: str) -> list[str]:
    """Some of the text that a corpus is made of: the beginnings of files that lie far apart.

    What cannot be read is passed over; the run meets it in its turn.
    """
    texts: list[str] = []
    for source in sources[:: max(1, len(sources) // _SAMPLED_SOURCES)]:
        size = 0
        try:
            for batch in read_batches([source], json_key):
                for document in batch.documents:
                    with suppress(BadDocumentError):
                        text, _ = decode(document, json_key)
                        texts.append(text[: _SAMPLED_BYTES - size])
                        size += len(texts[-1])
                    if size == _SAMPLED_BYTES:
                        break
                break
        except UsageError:
            continue
    return texts
