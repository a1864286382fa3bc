"""Which documents a corpus takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.documents import LeftOut, Outcomes, texts_of
from megatron_tst.corpus.readers import LineBlock, Position, RawBatch


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
        position: where the next batch begins.
        left_out: file, line and reason of each document left out; emptied by the reader of it.
        finished: a limit is reached, and nothing more is taken.
    """

    limits: Limits
    counts: Counts = field(default_factory=Counts)
    position: Position = field(default_factory=Position)
    left_out: list[str] = field(default_factory=list)
    finished: bool = False

    def take_batch(self, batch: RawBatch, outcomes: Outcomes) -> int:
        """Counts the documents of the next batch; returns how many of those with tokens are taken.

        Raises:
            UsageError: one cannot be encoded, or one too many is bad or empty; names file and line.
        """
        is_first = not isinstance(batch.content, LineBlock) or batch.content.offset == 0
        lines_before = 0 if is_first else self.position.records
        taken = 0
        for left_out in outcomes.left_out:
            taken += self._take(outcomes.text_bytes[taken : left_out.rank])
            if self.finished:
                break
            self._leave_out(left_out, lines_before)
        taken += self._take(outcomes.text_bytes[taken:])
        records = lines_before + outcomes.lines or batch.end.records
        self.position = batch.end._replace(records=records)
        return taken

    def _take(self, sizes: list[int]) -> int:
        counts, limits = self.counts, self.limits
        for taken, size in enumerate(sizes):
            if limits.max_bytes is not None and counts.text_bytes + size > limits.max_bytes:
                self.finished = True
            if self.finished:
                return taken
            counts.documents += 1
            counts.text_bytes += size
            self.finished = counts.documents == limits.max_documents
        return len(sizes)

    def _leave_out(self, left_out: LeftOut, lines_before: int) -> None:
        document, problem = left_out.document, left_out.problem
        document = document._replace(number=document.number + lines_before)
        if left_out.is_fatal:
            raise UsageError(f"{document.where}{problem}")
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
        texts, outcomes = texts_of(batch.content, json_key)
        for text in texts[: selection.take_batch(batch, outcomes)]:
            yield text, batch
        if selection.finished:
            return
