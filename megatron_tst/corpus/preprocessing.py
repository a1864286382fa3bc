"""Text to Megatron's indexed dataset: tokenize in parallel, write in order, publish at the end."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import tokenizers

from megatron_tst.common.atomic_files import move
from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.documents import sample_texts
from megatron_tst.corpus.encoder_choice import choose_encoder
from megatron_tst.corpus.encoding import EncoderSettings, encode_in_order
from megatron_tst.corpus.fast_encoder import gigatoken_version
from megatron_tst.corpus.huggingface_tokenizer import class_warning
from megatron_tst.corpus.indexed_writer import IndexedDatasetWriter, token_dtype
from megatron_tst.corpus.outputs import (
    has_other_tokenizer,
    refuse_existing,
    refuse_inputs,
    remove_tokenizer,
)
from megatron_tst.corpus.partial_run import LeftOutLog, PartialRun, RunProgress, fingerprint
from megatron_tst.corpus.preprocessing_config import PreprocessConfig
from megatron_tst.corpus.readers import read_batches
from megatron_tst.corpus.selection import Selection, read_texts
from megatron_tst.corpus.sources import Source, find_sources
from megatron_tst.corpus.tokenizer import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    CorpusTokenizer,
    byte_tokenizer,
    load_tokenizer,
    train_byte_level_bpe,
    turn_end_hint,
)

__all__ = ["PreprocessConfig", "PreprocessProgress", "PreprocessResult", "preprocess"]

CHECKPOINT_SECONDS = 10.0
"""A killed run loses at most the work of this time."""

_logger = logging.getLogger(__name__)


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
        unread_files: what searched folders hold besides, by extension or reason.
        tokenizer: the folder a new tokenizer was saved to, or the one given.
        tokenizer_sha256: fingerprint of its ``tokenizer.json``.
        vocab_size: number of entries, added tokens included.
        eod_token: end-of-document token.
        eod_id: its id.
        append_eod: whether each document ends with it.
        dtype: type of the stored ids.
        encoder: the packages that encoded, with their versions.
    """

    documents: int
    tokens: int
    text_bytes: int
    empty_documents: int
    bad_documents: int
    skipped_files: int
    unread_files: dict[str, int]
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eod_token: str
    eod_id: int
    append_eod: bool
    dtype: str
    encoder: str

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
        tokens_before: tokens written by the interrupted run that this one goes on with.
    """

    stage: Literal["train", "tokenize"]
    bytes_read: int
    total_bytes: int
    documents: int
    tokens: int
    seconds: float
    tokens_before: int = 0


ProgressCallback = Callable[[PreprocessProgress], None]


def preprocess(
    config: PreprocessConfig, on_progress: ProgressCallback | None = None
) -> PreprocessResult:
    """Tokenizes a corpus into ``<prefix>.bin``, ``<prefix>.idx`` and the summary ``<prefix>.json``.

    Everything is written in the folder ``<prefix>.partial`` and renamed at the end, the index
    last: where ``<prefix>.idx`` exists, the corpus is complete. A run that was killed is gone on
    with where that folder was last brought to a consistent state. The worker processes are spawned,
    so a script that calls this needs the ``if __name__ == "__main__"`` guard.

    Args:
        config: what to do.
        on_progress: called after every batch of documents, in this process.

    Raises:
        UsageError: bad input; names the flag or file, the value and the remedy.
        ChildProcessError: a worker process was killed.
    """
    unread = Counter[str]()
    sources = find_sources(
        config.inputs, config.extensions, config.shuffle_seed, config.json_key, unread
    )
    _refuse_inputs(config, sources)
    given = load_tokenizer(config.tokenizer, config.eod_token) if config.tokenizer else None
    sha256 = None if given is None else given.sha256
    settings = _settings(config, sources, given)
    if given and config.eod_token is None and (hint := turn_end_hint(given)) is not None:
        _logger.warning("warning: %s", hint)
    if config.tokenizer and (warning := class_warning(config.tokenizer)) is not None:
        _logger.warning("warning: %s", warning)
    report = on_progress or (lambda progress: None)
    with PartialRun(config.output(".partial"), settings, config.start_anew) as partial:
        if not partial.load().is_complete:
            refuse_existing(config.output_prefix, sha256, config.overwrite)
            tokenizer = given or _make_tokenizer(config, sources, report, partial.folder)
            result = _write_corpus(config, tokenizer, sources, report, partial)
            summary = result.to_dict() | {"unread_files": dict(unread.most_common())}
            (partial.folder / "summary").write_text(json.dumps(summary, indent=2) + "\n")
            partial.save(RunProgress(is_complete=True))
        _publish(config, partial.folder, sha256)
        partial.remove()
    return PreprocessResult(**json.loads(config.output(".json").read_text()))


def _settings(
    config: PreprocessConfig, sources: list[Source], given: CorpusTokenizer | None
) -> dict[str, Any]:
    """Everything that the output depends on."""
    made = "bytes" if config.byte_level else f"byte-level BPE of {config.train_bpe}"
    return {
        "format": 2,
        "inputs": fingerprint(sources),
        "tokenizer": given.sha256 if given else made,
        "end of document": given.eod_token if given else None,
        "tokenizers library": tokenizers.__version__,
        "--encoder": config.encoder,
        "gigatoken": gigatoken_version() if config.encoder != "tokenizers" else None,
        "--append-eod": config.append_eod,
        "--json-key": config.json_key,
        "--max-documents": config.max_documents,
        "--max-bytes": config.max_bytes,
    }


def _refuse_inputs(config: PreprocessConfig, sources: list[Source]) -> None:
    refuse_inputs(config.output_prefix, (source.path for source in sources))
    if config.tokenizer is not None:
        # It may lie beside the corpus, and stays there.
        refuse_inputs(config.output_prefix, [config.tokenizer], with_tokenizer=False)


def _make_tokenizer(
    config: PreprocessConfig, sources: list[Source], report: ProgressCallback, partial: Path
) -> CorpusTokenizer:
    folder = partial / "tokenizer"
    if folder.exists():
        return load_tokenizer(folder)
    if config.train_bpe is None:
        tokenizer = byte_tokenizer()
    else:
        texts = _training_texts(config, sources, report)
        tokenizer = train_byte_level_bpe(texts, config.train_bpe)
    new = partial / "tokenizer.new"
    tokenizer.save_files(new)
    move(new, folder)
    return tokenizer


def _training_texts(
    config: PreprocessConfig, sources: list[Source], report: ProgressCallback
) -> Iterator[str]:
    start = monotonic()
    total = _total_bytes(sources)
    selection = Selection(config.limits)
    batches = read_batches(sources, config.json_key)
    for text, batch in read_texts(batches, config.json_key, selection):
        documents, seconds = selection.counts.documents, monotonic() - start
        report(PreprocessProgress("train", batch.file_bytes, total, documents, 0, seconds))
        yield text


def _total_bytes(sources: list[Source]) -> int:
    return sum(source.path.stat().st_size for source in sources)


def _write_corpus(
    config: PreprocessConfig,
    tokenizer: CorpusTokenizer,
    sources: list[Source],
    report: ProgressCallback,
    partial: PartialRun,
) -> PreprocessResult:
    before = partial.load()
    dtype = token_dtype(tokenizer.vocab_size)
    choice = choose_encoder(config.encoder, tokenizer, sample_texts(sources, config.json_key))
    if choice.reason is not None:
        _logger.warning("encoding with the tokenizers library alone: %s.", choice.reason)
    told = (tokenizer.eod_id, config.append_eod, config.json_key, choice.is_fast)
    settings = EncoderSettings(tokenizer.definition, dtype, *told)
    batches = read_batches(sources, config.json_key, before.position)
    encoded = encode_in_order(batches, settings, config.workers)
    selection = Selection(config.limits, before.counts, before.position)
    paths = (partial.folder / "bin", partial.folder / "idx")
    start = saved = monotonic()
    total = _total_bytes(sources)
    with (
        IndexedDatasetWriter(*paths, dtype, before.counts.documents, before.tokens) as writer,
        closing(LeftOutLog(partial.folder / "left-out", before.left_out_bytes)) as log,
        # Closing stops the worker processes at once when writing fails or is interrupted.
        closing(encoded),
    ):
        for batch, ids, outcomes in encoded:
            lengths = outcomes.tokens[: selection.take_batch(batch, outcomes)]
            writer.add_documents(ids[: sum(lengths)], lengths)
            log.add(selection.left_out)
            now = monotonic()
            done = (writer.documents, writer.tokens, now - start, before.tokens)
            report(PreprocessProgress("tokenize", batch.file_bytes, total, *done))
            if selection.finished:
                break
            if now - saved >= CHECKPOINT_SECONDS:
                saved = now
                writer.flush_to_disk()
                size = log.flush_to_disk()
                partial.save(RunProgress(selection.position, selection.counts, writer.tokens, size))
        _refuse_nothing(config, selection)
    return _result(config, tokenizer, selection, writer.tokens, choice.packages)


def _refuse_nothing(config: PreprocessConfig, selection: Selection) -> None:
    counts = selection.counts
    if counts.documents == 0:
        raise UsageError(
            f"--input {' '.join(map(str, config.inputs))} gave no documents "
            f"({counts.empty_documents} empty, {counts.bad_documents + counts.skipped_files} "
            "without usable text): name files that hold text, or raise --max-bytes if it is set."
        )


def _result(
    config: PreprocessConfig,
    tokenizer: CorpusTokenizer,
    selection: Selection,
    tokens: int,
    encoder: str,
) -> PreprocessResult:
    return PreprocessResult(
        **asdict(selection.counts),
        unread_files={},
        tokens=tokens,
        tokenizer=str(config.tokenizer or config.tokenizer_folder),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod_token=tokenizer.eod_token,
        eod_id=tokenizer.eod_id,
        append_eod=config.append_eod,
        dtype=token_dtype(tokenizer.vocab_size).name,
        encoder=encoder,
    )


def _publish(config: PreprocessConfig, partial: Path, given_sha256: str | None) -> None:
    """Renames the files of a complete run, except those that an interrupted call renamed."""
    index = partial / "idx"
    if not index.exists():
        return
    # An old index must never describe new data, not even for a moment.
    config.output(".idx").unlink(missing_ok=True)
    is_made = (partial / "tokenizer" / TOKENIZER_FILE).exists()
    # A tokenizer that is neither was made here, and an interrupted call has renamed it.
    is_known = is_made or given_sha256 is not None
    if is_known and has_other_tokenizer(config.output_prefix, given_sha256):
        remove_tokenizer(config.output_prefix)
    if is_made:
        config.tokenizer_folder.mkdir()
    left_out = partial / "left-out"
    if left_out.exists() and left_out.stat().st_size == 0:
        left_out.unlink()
        config.left_out_file.unlink(missing_ok=True)
    renamed = [
        (partial / "tokenizer" / TOKENIZER_FILE, config.tokenizer_folder / TOKENIZER_FILE),
        (partial / "tokenizer" / CONFIG_FILE, config.tokenizer_folder / CONFIG_FILE),
        (left_out, config.left_out_file),
        (partial / "bin", config.output(".bin")),
        (partial / "summary", config.output(".json")),
        (index, config.output(".idx")),
    ]
    for source, target in renamed:
        if source.exists():
            move(source, target)
