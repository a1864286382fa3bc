"""Tokenizes documents in worker processes, in order and in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

BATCH_CHARACTERS = 1 << 18
PIECE_CHARACTERS = 1 << 20
"""Longer documents are tokenized in pieces cut at line ends: a token being made takes 200 bytes."""
IN_FLIGHT_BATCHES_PER_WORKER = 4

EncodedBatch = tuple[npt.NDArray[np.integer], list[int]]
"""Ids of some documents, one after the other, and the number of ids of each."""


def encode_in_order(
    texts: Iterable[str],
    definition: str,
    appended: list[int],
    dtype: np.dtype[Any],
    workers: int,
) -> Generator[EncodedBatch, None, None]:
    """Encodes documents in parallel; the results do not depend on the number of workers.

    Only a few batches of documents for each worker are in memory at a time.

    Args:
        texts: documents.
        definition: content of ``tokenizer.json``.
        appended: ids to end each document with.
        dtype: integer type of the results; must hold every id.
        workers: processes to spawn.

    Yields:
        The documents in order, without those that have no tokens.

    Raises:
        ValueError: the tokenizer cannot encode a document.
        ChildProcessError: a worker was killed.
    """
    # Spawned, not forked: the parent may hold threads (training a BPE, a progress bar).
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(definition, appended, dtype),
    )
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in _batches(texts):
            pending.append(pool.submit(_encode_batch, batch))
            if len(pending) == workers * IN_FLIGHT_BATCHES_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"a tokenizing process died, most likely for lack of memory: lower --workers {workers}."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class Encoder:
    """A worker's tokenizer: text is data, so it never yields control tokens of its own."""

    def __init__(self, definition: str, appended: list[int], dtype: np.dtype[Any]) -> None:
        self._tokenizer = Tokenizer.from_str(definition)
        # Settings of inference that some files carry; here they would cut or lengthen documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that mentions the end-of-document token must not end there.
        self._tokenizer.encode_special_tokens = True
        self._appended = np.array(appended, dtype=dtype)
        self._dtype = dtype

    def encode(self, text: str) -> npt.NDArray[np.integer]:
        """Ids of a document, empty if it has no tokens."""
        ids = np.concatenate([self._encode_piece(piece) for piece in split_long(text)])
        return np.append(ids, self._appended) if ids.size else ids

    def _encode_piece(self, text: str) -> npt.NDArray[np.integer]:
        try:
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        # The library raises bare Exception, for example for a vocabulary without unknown token.
        except Exception as error:
            raise ValueError(
                f"--tokenizer cannot encode the text that starts with {text[:40]!r} ({error}): "
                "use a byte-level tokenizer or one with an unknown token."
            ) from error
        return np.array(encoding.ids, dtype=self._dtype)


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


def _start_worker(definition: str, appended: list[int], dtype: np.dtype[Any]) -> None:
    global _encoder
    # The processes are the parallelism, and the parent alone answers an interrupt.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = Encoder(definition, appended, dtype)


def _exit_with_parent() -> None:
    """Ends this worker when its parent is killed; the pool's queue alone would block forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_batch(texts: list[str]) -> EncodedBatch:
    encoded = [_encoder.encode(text) for text in texts]
    return np.concatenate(encoded), [ids.size for ids in encoded if ids.size]
