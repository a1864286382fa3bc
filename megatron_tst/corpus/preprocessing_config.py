"""What a preprocessing run reads, how it tokenizes, and where it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.encoder_choice import EncoderName
from megatron_tst.corpus.file_kinds import DEFAULT_EXTENSIONS
from megatron_tst.corpus.outputs import checked_prefix, with_suffix
from megatron_tst.corpus.selection import Limits


@dataclass(frozen=True)
class PreprocessConfig:
    """What to read, how to tokenize it and where to write it.

    Attributes:
        inputs: files, and folders that are searched recursively.
        output_prefix: path of the outputs without extension.
        tokenizer: ``tokenizer.json`` or a folder with one. Exactly one of ``tokenizer``,
            ``train_bpe`` and ``byte_level`` is set.
        train_bpe: train a byte-level BPE of this vocabulary size on the documents first.
        byte_level: take the bytes as tokens (vocabulary 256).
        eod_token: end-of-document token; by default the ``eos_token`` of ``tokenizer``.
        append_eod: end each document with that token.
        workers: tokenizing processes; the outputs do not depend on it.
        encoder: ``gigatoken`` requires the fast route, ``tokenizers`` does without it, ``auto``
            takes it where it gives the library's ids.
        json_key: member of a JSON line, or column of a Parquet file, that holds the text.
        extensions: file extensions to read, below the one of a compression.
        shuffle_seed: shuffles the order of the files reproducibly.
        max_documents: stop after this many documents.
        max_bytes: stop before exceeding this much text (UTF-8 bytes).
        max_bad_documents: malformed documents to leave out before giving up.
        max_empty_documents: empty documents to leave out before giving up; None for any number.
        overwrite: replace existing outputs.
        start_anew: discard an interrupted run of this prefix instead of going on with it.

    Raises:
        UsageError: naming the flag, its value and the remedy.
    """

    inputs: tuple[Path, ...]
    output_prefix: Path
    tokenizer: Path | None = None
    train_bpe: int | None = None
    byte_level: bool = False
    eod_token: str | None = None
    append_eod: bool = True
    workers: int = 1
    encoder: EncoderName = "auto"
    json_key: str = "text"
    extensions: tuple[str, ...] = DEFAULT_EXTENSIONS
    shuffle_seed: int | None = None
    max_documents: int | None = None
    max_bytes: int | None = None
    max_bad_documents: int = 0
    max_empty_documents: int | None = None
    overwrite: bool = False
    start_anew: bool = False

    def __post_init__(self) -> None:
        checked_prefix(self.output_prefix)
        choices = (self.tokenizer is not None, self.train_bpe is not None, self.byte_level)
        if sum(choices) != 1:
            raise UsageError(
                f"{sum(choices)} tokenizers are chosen: pass exactly one of --tokenizer, "
                "--train-bpe and --byte-level."
            )
        if self.eod_token is not None and self.tokenizer is None:
            raise UsageError(
                f"--eod-token {self.eod_token!r} goes with --tokenizer: drop it, a tokenizer made "
                "here brings its own."
            )
        if self.encoder not in get_args(EncoderName):
            raise UsageError(
                f"--encoder is {self.encoder!r}: use one of {', '.join(get_args(EncoderName))}."
            )
        at_least = {"workers": 1, "max_documents": 1, "max_bytes": 1}
        at_least |= {"max_bad_documents": 0, "max_empty_documents": 0}
        for name, minimum in at_least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is {value}: use {minimum} or more.")

    def output(self, suffix: str) -> Path:
        """An output file: the prefix with ``suffix`` appended."""
        return with_suffix(self.output_prefix, suffix)

    @property
    def tokenizer_folder(self) -> Path:
        """Where a tokenizer made by this run is saved."""
        return self.output("-tokenizer")

    @property
    def left_out_file(self) -> Path:
        """Where documents that were left out are listed."""
        return self.output(".left-out.log")

    @property
    def limits(self) -> Limits:
        """When to stop reading, and when to give up."""
        return Limits(
            self.max_documents, self.max_bytes, self.max_bad_documents, self.max_empty_documents
        )
