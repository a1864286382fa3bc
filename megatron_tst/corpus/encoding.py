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
from megatron_tst.corpus.documents import Outcomes
from megatron_tst.corpus.fast_encoder import FastEncoder, NoFastRouteError, fast_encoder
from megatron_tst.corpus.indexed_writer import check_document_tokens
from megatron_tst.corpus.readers import RawBatch, RawContent
from megatron_tst.corpus.tokenizer import library_tokenizer

PIECE_CHARACTERS = 1 << 20
"""Longer documents are tokenized in pieces cut at line ends: a token being made takes 200 bytes."""
IN_FLIGHT_BATCHES_PER_WORKER = 4
BATCHES_AHEAD = 32
"""What this process encodes while another is busy with an earlier batch, or starts."""
MAX_FAILURES = 10
"""Texts that the fast route may fail at before a process does without it."""

_logger = logging.getLogger(__name__)


Ids = npt.NDArray[np.integer]
EncodedBatch = tuple[Ids, Outcomes]
"""[tokens] ids of all documents of a batch, one after the other, and what became of them."""


@dataclass(frozen=True)
class EncoderSettings:
    """What a worker needs to know.

    Attributes:
        definition: content of ``tokenizer.json``.
        dtype: type of the ids in the corpus.
        eod_id: end-of-document id, which no text may hold; None if none is known.
        append_eod: end each document with it.
        json_key: member of a JSON line that holds the text.
        is_fast: encode by the fast route, which has been proven to give the library's ids.
    """

    definition: str
    dtype: np.dtype[Any]
    eod_id: int | None = None
    append_eod: bool = False
    json_key: str = "text"
    is_fast: bool = False


def encode_in_order(
    batches: Iterable[RawBatch], settings: EncoderSettings, workers: int
) -> Generator[tuple[RawBatch, Ids, Outcomes], None, None]:
    """Decodes and encodes documents in parallel; the results do not depend on ``workers``.

    Only a few batches for each worker are in memory at a time.

    Args:
        batches: documents as read.
        settings: how to encode them.
        workers: processes to encode with. Of those that take the fast route this process is one,
            while it would only wait for the others.

    Yields:
        Each batch with its result, in order.

    Raises:
        UsageError: a file cannot be read; raised after what lies before has been handed out.
        ChildProcessError: a worker was killed.
    """
    encoder = Encoder(settings) if settings.is_fast else None
    others = workers - settings.is_fast
    room = others * IN_FLIGHT_BATCHES_PER_WORKER
    limit = room + settings.is_fast * BATCHES_AHEAD
    pending: deque[tuple[RawBatch, Future[EncodedBatch], bool]] = deque()
    reading = iter(batches)
    # Spawned, not forked: the parent may hold threads (training a BPE, a progress bar).
    pool = ProcessPoolExecutor(
        # A pool has to have one; it starts none that is not asked for.
        others or 1,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(settings,),
    )
    try:
        while True:
            must_wait = not pending or not pending[0][1].done()
            can_go_on = len(pending) < limit and (room > 0 or must_wait)
            if can_go_on and (batch := next(reading, None)) is not None:
                is_here = room == 0
                result = (
                    _encode_at_once(batch.content, encoder)
                    if is_here
                    else pool.submit(_encode_batch, batch.content)
                )
                room -= not is_here
                pending.append((batch, result, is_here))
            elif pending:
                batch, result, is_here = pending.popleft()
                room += not is_here
                yield batch, *result.result()
            else:
                return
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a tokenizing process died, most likely for lack of memory: lower --workers "
            f"{workers}, or pass --encoder tokenizers if that does not help."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_at_once(content: RawContent, encoder: Encoder | None) -> Future[EncodedBatch]:
    result: Future[EncodedBatch] = Future()
    try:
        result.set_result(_encode_batch(content, encoder))
    except UsageError as error:
        result.set_exception(error)
    return result


class Encoder:
    """A tokenizer for documents: text is data, so it never yields control tokens of its own."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._tokenizer = library_tokenizer(settings.definition)
        self._fast: FastEncoder | None = None
        if settings.is_fast:
            self._fast = fast_encoder(self._tokenizer, settings.dtype)
        self._failures = 0
        appended = [settings.eod_id] if settings.append_eod else []
        self._appended = np.array(appended, dtype=settings.dtype)
        self._controls = ControlTokens(settings.definition, settings.eod_id)
        self._without_controls: Tokenizer | None = None
        self.dtype = settings.dtype
        self.json_key = settings.json_key

    def encode(self, text: str) -> Ids:
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

    def _encode_as_text(self, text: str) -> Ids:
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

    def _encode_piece(self, text: str) -> Ids:
        if (ids := self._encode_fast(text)) is not None:
            return ids
        return self._encode_by_library(self._tokenizer, text)

    def _encode_by_library(self, tokenizer: Tokenizer, text: str) -> Ids:
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

    def _encode_fast(self, text: str) -> Ids | None:
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


def _start_worker(settings: EncoderSettings) -> None:
    global _encoder
    # The processes are the parallelism, and the parent alone answers an interrupt.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = Encoder(settings)


def _exit_with_parent() -> None:
    """Ends this worker when its parent is killed; the pool's queue alone would block forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_batch(content: RawContent, encoder: Encoder | None = None) -> EncodedBatch:
    encoder = encoder or _encoder
    encoded = [np.empty(0, encoder.dtype)]

    def encode(text: str) -> int:
        try:
            encoded.append(encoder.encode(text))
        except UsageError as error:
            raise UsageError(f": {error}") from error
        check_document_tokens("", encoded[-1].size)
        return encoded[-1].size

    outcomes = Outcomes.of(content, encoder.json_key, encode)
    return np.concatenate(encoded), outcomes
