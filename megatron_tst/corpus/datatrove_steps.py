"""Steps of datatrove pipelines that end in a corpus for Megatron. Need datatrove (optional).

datatrove has a Megatron writer of its own, which takes control tokens that are spelled out in the
text for control tokens, and whose files look complete from the first byte on.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.documents import BadDocumentError, checked_size
from megatron_tst.corpus.encoder_choice import choose_encoder
from megatron_tst.corpus.encoding import Encoder, EncoderSettings
from megatron_tst.corpus.huggingface_tokenizer import class_warning
from megatron_tst.corpus.indexed_writer import (
    IndexedDatasetWriter,
    check_document_tokens,
    token_dtype,
)
from megatron_tst.corpus.merging import merge_corpora, publish
from megatron_tst.corpus.selection import Counts
from megatron_tst.corpus.tokenizer import CorpusTokenizer, load_tokenizer, turn_end_hint

_SUMMARY_OF_TOKENIZER = ("vocab_size", "eod_token", "eod_id")


def part_prefix(folder: str, rank: int) -> Path:
    """Where a task writes its part."""
    return Path(folder) / f"{rank:05d}"


class WriteMegatronPart(PipelineStep):
    """Tokenizes the documents of a task into ``<folder>/<rank>.bin`` and ``.idx``.

    The files appear when they are complete, the index last. Documents pass on to the next step.

    Args:
        folder: of the parts; on a file system that all tasks see.
        tokenizer: ``tokenizer.json``, or a folder with one.
        eod_token: end-of-document token; by default the tokenizer's ``eos_token``.
        append_eod: end each document with it.
        max_bad_documents: of a task, to leave out before giving up. They are logged.
    """

    name = "Megatron part"
    type = "🔢 - TOKENIZER"

    def __init__(
        self,
        folder: str,
        tokenizer: str,
        eod_token: str | None = None,
        append_eod: bool = True,
        max_bad_documents: int = 0,
    ) -> None:
        super().__init__()
        # Plain values: datatrove saves them as JSON, and sends them to other machines.
        self.folder = folder
        self.tokenizer = tokenizer
        self.eod_token = eod_token
        self.append_eod = append_eod
        self.max_bad_documents = max_bad_documents

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Writes the part of task ``rank``.

        Raises:
            UsageError: one document too many is bad, one is too long, or the tokenizer cannot be
                used.
        """
        # The tasks are the parallelism.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        tokenizer = load_tokenizer(Path(self.tokenizer), self.eod_token)
        if rank == 0 and self.eod_token is None and (hint := turn_end_hint(tokenizer)) is not None:
            logger.warning(hint)
        if rank == 0 and (warning := class_warning(Path(self.tokenizer))) is not None:
            logger.warning(warning)
        dtype = token_dtype(tokenizer.vocab_size)
        choice = choose_encoder("auto", tokenizer, [])
        settings = EncoderSettings(tokenizer.definition, dtype, tokenizer.eod_id, self.append_eod)
        encoder = Encoder(replace(settings, is_fast=choice.is_fast))
        prefix = part_prefix(self.folder, rank)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        counts = Counts()
        with tempfile.TemporaryDirectory(prefix=f".{prefix.name}-", dir=prefix.parent) as name:
            staging = Path(name)
            with IndexedDatasetWriter(staging / "bin", staging / "idx", dtype) as writer:
                for document in data:
                    if (size := self._size(document, counts)) is None:
                        continue
                    with self.track_time():
                        ids = encoder.encode(document.text)
                    check_document_tokens(f"document {document.id}", ids.size)
                    if ids.size == 0:
                        counts.empty_documents += 1
                        continue
                    writer.add_documents(ids, [ids.size])
                    counts.text_bytes += size
                    self.stat_update("tokens", value=ids.size)
                    yield document
            counts.documents = writer.documents
            summary = self._summary(tokenizer, counts, writer.tokens)
            (staging / "json").write_text(json.dumps(summary, indent=2) + "\n")
            publish(staging, prefix, tokenizer.sha256)

    def _size(self, document: Document, counts: Counts) -> int | None:
        """UTF-8 bytes of the text; None for a bad document."""
        try:
            return checked_size(document.text)
        except BadDocumentError as error:
            counts.bad_documents += 1
            self.stat_update("bad")
            message = f"document {document.id} has {error}"
            if counts.bad_documents > self.max_bad_documents:
                raise UsageError(
                    f"{message}: repair it, or raise max_bad_documents "
                    f"(now {self.max_bad_documents}) to leave such documents out."
                ) from error
            logger.warning(f"{message}: left out")
            return None

    def _summary(self, tokenizer: CorpusTokenizer, counts: Counts, tokens: int) -> dict[str, Any]:
        """What ``tst preprocess`` writes beside a corpus."""
        return {
            **vars(counts),
            "tokens": tokens,
            "tokenizer": self.tokenizer,
            "tokenizer_sha256": tokenizer.sha256,
            **{name: getattr(tokenizer, name) for name in _SUMMARY_OF_TOKENIZER},
            "append_eod": self.append_eod,
            "dtype": token_dtype(tokenizer.vocab_size).name,
        }


class MergeMegatronParts(PipelineStep):
    """Joins the parts of all tasks, in the order of their ranks. For a pipeline of one task.

    Args:
        folder: of the parts.
        parts: number of tasks that wrote one.
        output_prefix: the corpus, without extension; replaced if it is there.
    """

    name = "Megatron merge"
    type = "🔢 - TOKENIZER"

    def __init__(self, folder: str, parts: int, output_prefix: str) -> None:
        super().__init__()
        self.folder = folder
        self.parts = parts
        self.output_prefix = output_prefix

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        """Writes the corpus.

        Raises:
            UsageError: a part is missing, damaged, or made with another tokenizer than the first.
        """
        parts = [part_prefix(self.folder, number) for number in range(self.parts)]
        documents = merge_corpora(parts, Path(self.output_prefix), overwrite=True)
        logger.info(f"{self.output_prefix}: {documents:,} documents of {self.parts} parts")
