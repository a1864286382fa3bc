"""Tokenizes documents in worker processes, in order and in bounded memory."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.control_tokens import ControlTokens
from megatron_tst.corpus.documents import BadDocumentError, Outcome, decode
from megatron_tst.corpus.fast_encoder import FastEncoder, NoFastRouteError, fast_encoder
from megatron_tst.corpus.indexed_writer import check_document_tokens
from megatron_tst.corpus.readers import RawBatch, RawContent, documents_of
from megatron_tst.corpus.tokenizer import CorpusTokenizer, library_tokenizer

PIECE_CHARACTERS = 1 << 20
"""Longer documents are tokenized in pieces cut at line ends: a token being made takes 200 bytes."""
IN_FLIGHT_BATCHES_PER_WORKER = 4
MAX_FAILURES = 10
"""Texts that the fast route may fail at before a process does without it."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedBatch:
    """Result of a batch.

    Attributes:
        ids: [tokens] of all its documents, one after the other.
        outcomes: of each document, in order.
    """

    ids: npt.NDArray[np.integer]
    outcomes: list[Outcome]


@dataclass(frozen=True)
class EncoderSettings:
    """What a worker needs to know.

    Attributes:
        definition: content of ``tokenizer.json``.
        appended: ids to end each document with.
        dtype: type of the ids in the corpus.
        json_key: member of a JSON line that holds the text.
        eod_id: end-of-document id, which no text may hold; None if none is known.
        is_fast: encode by the fast route, which has been proven to give the library's ids.
    """

    definition: str
    appended: tuple[int, ...]
    dtype: np.dtype[Any]
    json_key: str = "text"
    eod_id: int | None = None
    is_fast: bool = False

    @classmethod
    def of(
        cls,
        tokenizer: CorpusTokenizer,
        dtype: np.dtype[Any],
        append_eod: bool,
        json_key: str = "text",
        is_fast: bool = False,
    ) -> EncoderSettings:
        """Settings for a corpus whose documents end with the tokenizer's end-of-document id."""
        appended = (tokenizer.eod_id,) if append_eod else ()
        eod_id = tokenizer.eod_id
        return cls(tokenizer.definition, appended, dtype, json_key, eod_id, is_fast)


def encode_in_order(
    batches: Iterable[RawBatch], settings: EncoderSettings, workers: int
) -> Generator[tuple[RawBatch, EncodedBatch], None, None]:
    """Decodes and encodes documents in parallel; the results do not depend on ``workers``.

    Only a few batches for each worker are in memory at a time.

    Args:
        batches: documents as read.
        settings: how to encode them.
        workers: processes to encode with. One that takes the fast route is this process: it
            needs less time than handing the text to another would.

    Yields:
        Each batch with its result, in order.

    Raises:
        UsageError: the tokenizer cannot encode a document, it is too long, or a file cannot be
            read; raised after what lies before has been handed out.
        ChildProcessError: a worker was killed.
    """
    if workers == 1 and settings.is_fast:
        yield from _encode_here(batches, settings)
        return
    # Spawned, not forked: the parent may hold threads (training a BPE, a progress bar).
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(settings,),
    )
    pending: deque[tuple[RawBatch, Future[EncodedBatch]]] = deque()
    unreadable: UsageError | None = None
    reading = iter(batches)
    try:
        while True:
            # Reading is ahead of writing: an error there must not hide a limit that is met before.
            try:
                batch = next(reading, None)
            except UsageError as error:
                batch, unreadable = None, error
            if batch is None:
                break
            pending.append((batch, pool.submit(_encode_in_worker, batch.content)))
            if len(pending) == workers * IN_FLIGHT_BATCHES_PER_WORKER:
                batch, result = pending.popleft()
                yield batch, result.result()
        for batch, result in pending:
            yield batch, result.result()
        if unreadable is not None:
            raise unreadable
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a tokenizing process died, most likely for lack of memory: lower --workers "
            f"{workers}, or pass --encoder tokenizers if that does not help."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_here(
    batches: Iterable[RawBatch], settings: EncoderSettings
) -> Iterator[tuple[RawBatch, EncodedBatch]]:
    encoder = Encoder(settings)
    for batch in batches:
        yield batch, _encode_batch(batch.content, encoder, settings.json_key)


class Encoder:
    """A tokenizer for documents: text is data, so it never yields control tokens of its own."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._tokenizer = library_tokenizer(settings.definition)
        self._fast: FastEncoder | None = None
        if settings.is_fast:
            self._fast = fast_encoder(self._tokenizer, settings.dtype)
        self._failures = 0
        self._appended = np.array(settings.appended, dtype=settings.dtype)
        self._controls = ControlTokens(settings.definition, settings.eod_id)
        self._without_controls: Tokenizer | None = None
        self.dtype = settings.dtype

    def encode(self, text: str) -> npt.NDArray[np.integer]:
        """Ids of a document, empty if it has no tokens.

        Raises:
            UsageError: the tokenizer cannot encode the text, gives its end-of-document id for some
                of it, or an id does not fit the dtype.
        """
        ids = [self._encode_piece(piece) for piece in split_long(text)]
        # Whatever encoded it: what the text spells is text.
        if any(map(self._controls.are_in, ids)):
            ids = [self._encode_as_text(piece) for piece in split_long(text)]
        if not any(piece.size for piece in ids):
            return np.empty(0, self.dtype)
        return np.concatenate([*ids, self._appended])

    def _encode_as_text(self, text: str) -> npt.NDArray[np.integer]:
        if self._without_controls is None:
            self._without_controls = library_tokenizer(self._controls.unspellable())
        ids = self._encode_by_library(self._without_controls, text)
        if self._controls.are_in(ids):
            raise UsageError(
                f"--tokenizer gives a control token for the text that starts with {text[:40]!r}, "
                "most likely its eos_token for what it does not know: use a tokenizer whose "
                "eos_token is not its unknown token, or name another with --eod-token."
            )
        return ids

    def _encode_piece(self, text: str) -> npt.NDArray[np.integer]:
        if (ids := self._encode_fast(text)) is not None:
            return ids
        return self._encode_by_library(self._tokenizer, text)

    def _encode_by_library(self, tokenizer: Tokenizer, text: str) -> npt.NDArray[np.integer]:
        try:
            (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return np.array(encoding.ids, dtype=self.dtype)
        except OverflowError as error:
            raise UsageError(
                f"--tokenizer gives an id that {self.dtype} cannot hold ({error}): its ids must "
                "lie below the size of its vocabulary."
            ) from error
        # The library raises bare Exception, for example for a vocabulary without unknown token.
        except Exception as error:
            raise UsageError(
                f"--tokenizer cannot encode the text that starts with {text[:40]!r} ({error}): "
                "use a byte-level tokenizer or one with an unknown token."
            ) from error

    def _encode_fast(self, text: str) -> npt.NDArray[np.integer] | None:
        """Ids by the fast route; None where there is none, or where it fails."""
        if self._fast is None:
            return None
        try:
            return self._fast.encode(text)
        except (RuntimeError, NoFastRouteError) as error:
            self._failures += 1
            given_up = self._failures == MAX_FAILURES or isinstance(error, NoFastRouteError)
            _logger.warning(
                "%s at the text that starts with %r: the tokenizers library encodes %s.",
                *(error, text[:40], "all that follows" if given_up else "it"),
            )
            if given_up:
                self._fast = None
            return None


def split_long(text: str) -> Iterator[str]:
    """Cuts a long document behind line ends, where there are any."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:end]
        start = end
    yield text[start:]


_encoder: Encoder
_json_key: str


def _start_worker(settings: EncoderSettings) -> None:
    global _encoder, _json_key
    # The processes are the parallelism, and the parent alone answers an interrupt.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = Encoder(settings)
    _json_key = settings.json_key


def _exit_with_parent() -> None:
    """Ends this worker when its parent is killed; the pool's queue alone would block forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(content: RawContent) -> EncodedBatch:
    return _encode_batch(content, _encoder, _json_key)


def _encode_batch(content: RawContent, encoder: Encoder, json_key: str) -> EncodedBatch:
    encoded: list[npt.NDArray[np.integer]] = []
    outcomes: list[Outcome] = []
    for document in documents_of(content):
        try:
            text, size = decode(document, json_key)
        except BadDocumentError as error:
            outcomes.append(Outcome(0, 0, str(error)))
            continue
        try:
            ids = encoder.encode(text)
        except UsageError as error:
            raise UsageError(f"{document.where}: {error}") from error
        check_document_tokens(document.where, ids.size)
        encoded.append(ids)
        outcomes.append(Outcome(size, ids.size))
    return EncodedBatch(np.concatenate([np.empty(0, encoder.dtype), *encoded]), outcomes)
