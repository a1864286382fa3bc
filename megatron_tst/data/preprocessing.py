"""Text to Megatron's indexed dataset: tokenize in parallel, write in order, publish at the end."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from megatron_tst.data.encoding import encode_in_order
from megatron_tst.data.indexed_writer import IndexedDatasetWriter, token_dtype
from megatron_tst.data.readers import DEFAULT_EXTENSIONS, DocumentReader, find_sources
from megatron_tst.data.tokenizer import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    CorpusTokenizer,
    byte_tokenizer,
    load_tokenizer,
    train_byte_level_bpe,
)


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
        json_key: member of a JSON line that holds the text.
        extensions: file extensions to read, below any ``.gz`` or ``.zst``.
        shuffle_seed: shuffles the order of the files reproducibly.
        max_documents: stop after this many documents.
        max_bytes: stop before exceeding this much text (UTF-8 bytes).
        max_bad_documents: malformed documents to leave out before giving up.
        overwrite: replace existing outputs.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """

    inputs: tuple[Path, ...]
    output_prefix: Path
    tokenizer: Path | None = None
    train_bpe: int | None = None
    byte_level: bool = False
    eod_token: str | None = None
    append_eod: bool = True
    workers: int = 1
    json_key: str = "text"
    extensions: tuple[str, ...] = DEFAULT_EXTENSIONS
    shuffle_seed: int | None = None
    max_documents: int | None = None
    max_bytes: int | None = None
    max_bad_documents: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        choices = (self.tokenizer is not None, self.train_bpe is not None, self.byte_level)
        if sum(choices) != 1:
            raise ValueError(
                f"{sum(choices)} tokenizers are chosen: pass exactly one of --tokenizer, "
                "--train-bpe and --byte-level."
            )
        if self.eod_token is not None and self.tokenizer is None:
            raise ValueError(
                f"--eod-token {self.eod_token!r} goes with --tokenizer: drop it, a tokenizer made "
                "here brings its own."
            )
        at_least = {"workers": 1, "max_documents": 1, "max_bytes": 1, "max_bad_documents": 0}
        for name, minimum in at_least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {value}: use {minimum} or more.")

    def output(self, suffix: str) -> Path:
        """An output file: the prefix with ``suffix`` appended."""
        return self.output_prefix.with_name(self.output_prefix.name + suffix)

    @property
    def tokenizer_folder(self) -> Path:
        """Where a tokenizer made by this run is saved."""
        return self.output("-tokenizer")


@dataclass(frozen=True)
class PreprocessResult:
    """What was written; the content of ``<prefix>.json``.

    Attributes:
        documents: documents in the dataset.
        tokens: tokens in the dataset, end-of-document tokens included.
        text_bytes: UTF-8 bytes of the text read.
        empty_documents: documents without tokens, left out.
        bad_documents: malformed documents, left out under ``--max-bad-documents``.
        skipped_files: files of searched folders that are not UTF-8 text, left out.
        tokenizer: the folder a new tokenizer was saved to, or the one given.
        tokenizer_sha256: fingerprint of its ``tokenizer.json``.
        vocab_size: number of entries, added tokens included.
        eod_token: end-of-document token.
        eod_id: its id.
        append_eod: whether each document ends with it.
        dtype: type of the stored ids.
    """

    documents: int
    tokens: int
    text_bytes: int
    empty_documents: int
    bad_documents: int
    skipped_files: int
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eod_token: str
    eod_id: int
    append_eod: bool
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PreprocessProgress:
    """State of a running :func:`preprocess`.

    Attributes:
        stage: training the tokenizer, or tokenizing.
        bytes_read: bytes of the input files read so far, compressed where they are.
        total_bytes: size of the input files.
        documents: documents done.
        tokens: tokens written.
        seconds: time since the stage began.
    """

    stage: Literal["train", "tokenize"]
    bytes_read: int
    total_bytes: int
    documents: int
    tokens: int
    seconds: float


ProgressCallback = Callable[[PreprocessProgress], None]


def preprocess(
    config: PreprocessConfig, on_progress: ProgressCallback | None = None
) -> PreprocessResult:
    """Tokenizes a corpus into ``<prefix>.bin``, ``<prefix>.idx`` and the summary ``<prefix>.json``.

    Everything is written under temporary names and renamed at the end, the index last: where
    ``<prefix>.idx`` exists, the corpus is complete. The worker processes are spawned, so a script
    that calls this needs the ``if __name__ == "__main__"`` guard.

    Args:
        config: what to do.
        on_progress: called after every batch of documents, in this process.

    Raises:
        ValueError: bad input; names the flag or file, the value and the remedy.
        ChildProcessError: a worker process was killed.
    """
    _refuse_existing_outputs(config)
    sources = find_sources(config.inputs, config.extensions, config.shuffle_seed)
    limits = (config.max_documents, config.max_bytes, config.max_bad_documents)
    reader = DocumentReader(sources, config.json_key, *limits)
    report = on_progress or (lambda progress: None)
    with _staging_folder(config) as name:
        staging = Path(name)
        tokenizer = _make_tokenizer(config, reader, report)
        result = _write_corpus(config, tokenizer, reader, report, staging)
        if config.tokenizer is None:
            tokenizer.save_files(staging)
        (staging / "summary").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
        _publish(config, staging)
    return result


def _refuse_existing_outputs(config: PreprocessConfig) -> None:
    outputs = [config.output(suffix) for suffix in (".bin", ".idx", ".json")]
    if config.tokenizer is None:
        outputs.append(config.tokenizer_folder)
    existing = [str(path) for path in outputs if path.exists()]
    if existing and not config.overwrite:
        raise ValueError(
            f"--output-prefix {config.output_prefix}: {', '.join(existing)} already there; "
            "choose another prefix or pass --overwrite."
        )


def _staging_folder(config: PreprocessConfig) -> tempfile.TemporaryDirectory[str]:
    # Next to the outputs, because a rename is atomic only within one file system.
    folder = config.output_prefix.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{config.output_prefix.name}-", dir=folder)
    except OSError as error:
        raise ValueError(
            f"--output-prefix {config.output_prefix}: cannot write to {folder} "
            f"({error.strerror}); choose a writable folder."
        ) from error


def _make_tokenizer(
    config: PreprocessConfig, reader: DocumentReader, report: ProgressCallback
) -> CorpusTokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, config.eod_token)
    if config.train_bpe is None:
        return byte_tokenizer()

    start = monotonic()

    def texts() -> Iterator[str]:
        for text in reader:
            counts = reader.counts
            total = reader.total_file_bytes
            seconds = monotonic() - start
            report(
                PreprocessProgress("train", counts.file_bytes, total, counts.documents, 0, seconds)
            )
            yield text

    return train_byte_level_bpe(texts(), config.train_bpe)


def _write_corpus(
    config: PreprocessConfig,
    tokenizer: CorpusTokenizer,
    reader: DocumentReader,
    report: ProgressCallback,
    staging: Path,
) -> PreprocessResult:
    documents = tokens = 0
    start = monotonic()
    dtype = token_dtype(tokenizer.vocab_size)
    appended = [tokenizer.eod_id] if config.append_eod else []
    encoded = encode_in_order(reader, tokenizer.definition, appended, dtype, config.workers)
    # Closing stops the worker processes at once when writing fails or is interrupted.
    with IndexedDatasetWriter(staging / "bin", staging / "idx", dtype) as writer, closing(encoded):
        for ids, lengths in encoded:
            writer.add_documents(ids, lengths)
            documents += len(lengths)
            tokens += ids.size
            read, total = reader.counts.file_bytes, reader.total_file_bytes
            seconds = monotonic() - start
            report(PreprocessProgress("tokenize", read, total, documents, tokens, seconds))
        counts = reader.counts
        # Text that the tokenizer's normalizer removes altogether is empty too.
        empty = counts.empty_documents + counts.documents - documents
        if documents == 0:
            raise ValueError(
                f"--input {' '.join(map(str, config.inputs))} gave no documents ({empty} empty, "
                f"{counts.bad_documents + counts.skipped_files} without usable text): "
                "name files that hold text, or raise --max-bytes if it is set."
            )
    return PreprocessResult(
        documents=documents,
        tokens=tokens,
        text_bytes=counts.text_bytes,
        empty_documents=empty,
        bad_documents=counts.bad_documents,
        skipped_files=counts.skipped_files,
        tokenizer=str(config.tokenizer or config.tokenizer_folder),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod_token=tokenizer.eod_token,
        eod_id=tokenizer.eod_id,
        append_eod=config.append_eod,
        dtype=dtype.name,
    )


def _publish(config: PreprocessConfig, staging: Path) -> None:
    # An old index must never describe new data, not even for a moment.
    config.output(".idx").unlink(missing_ok=True)
    if config.tokenizer is None:
        config.tokenizer_folder.mkdir(exist_ok=True)
        for name in (TOKENIZER_FILE, CONFIG_FILE):
            os.replace(staging / name, config.tokenizer_folder / name)
    os.replace(staging / "bin", config.output(".bin"))
    os.replace(staging / "summary", config.output(".json"))
    os.replace(staging / "idx", config.output(".idx"))
