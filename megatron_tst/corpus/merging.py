"""Joins corpora into one, in the given order."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tst.common.atomic_files import move
from megatron_tst.common.errors import UsageError, read_json_object
from megatron_tst.corpus.indexed_writer import IndexedDatasetWriter, IndexHeader
from megatron_tst.corpus.outputs import (
    checked_prefix,
    fingerprint_beside,
    has_other_tokenizer,
    refuse_existing,
    refuse_inputs,
    remove_tokenizer,
    with_suffix,
)

_TOKENS_AT_ONCE = 1 << 22
_DOCUMENTS_AT_ONCE = 1 << 16
_PART_SUFFIXES = (".bin", ".idx", ".json")
# Of the summaries: what all parts must have in common, and what adds up.
_COMMON = ("tokenizer_sha256", "vocab_size", "eod_token", "eod_id", "append_eod", "dtype")
_COUNTED = (
    *("documents", "tokens", "text_bytes"),
    *("empty_documents", "bad_documents", "skipped_files"),
)


def merge_corpora(parts: Sequence[Path], output_prefix: Path, overwrite: bool = False) -> int:
    """Writes the documents of all parts, one part after the other, as one corpus.

    The result is the same as if the texts of all parts had been tokenized in one run. It appears
    when it is complete, the index last. Memory does not grow with the parts.

    Args:
        parts: prefixes, in order; a part has no ``.bin`` or ``.idx`` in its name.
        output_prefix: path of the outputs without extension.
        overwrite: replace an existing corpus, which is none of the parts.

    Returns:
        The number of documents.

    Raises:
        UsageError: a part is missing, damaged, or made with another tokenizer than the first; or
            the outputs are there.
    """
    if not parts:
        raise UsageError("there is nothing to merge: name the prefix of at least one part.")
    checked_prefix(output_prefix)
    refuse_inputs(
        output_prefix, [with_suffix(part, name) for part in parts for name in _PART_SUFFIXES]
    )
    headers = [_checked_header(part) for part in parts]
    summary = _merged_summary(parts)
    # Nothing says of a tokenizer that it is another's where the parts name none.
    sha256 = fingerprint_beside(output_prefix) if summary is None else summary["tokenizer_sha256"]
    refuse_existing(output_prefix, sha256, overwrite)
    dtype = headers[0].dtype
    for part, header in zip(parts, headers, strict=True):
        if header.dtype != dtype:
            raise UsageError(
                f"{part} holds {header.dtype} and {parts[0]} {dtype}: merge parts of one tokenizer."
            )
    output_prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output_prefix.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=output_prefix.parent) as name:
        staging = Path(name)
        with IndexedDatasetWriter(staging / "bin", staging / "idx", dtype) as writer:
            for part, header in zip(parts, headers, strict=True):
                for tokens, lengths in _read_groups(part, header):
                    writer.add_documents(tokens, lengths)
        if summary is not None:
            (staging / "json").write_text(json.dumps(summary, indent=2) + "\n")
        publish(staging, output_prefix, sha256)
    return writer.documents


def publish(staging: Path, prefix: Path, tokenizer_sha256: str | None) -> None:
    """Moves ``json``, ``bin`` and ``idx`` of a folder to the prefix of a corpus, the index last.

    What belongs to the corpus that was there goes: a summary, a list of what was left out, and
    another tokenizer than that of ``tokenizer_sha256``.
    """
    # An old index must never describe new data, not even for a moment.
    for suffix in ("idx", "json", "left-out.log"):
        with_suffix(prefix, f".{suffix}").unlink(missing_ok=True)
    if has_other_tokenizer(prefix, tokenizer_sha256):
        remove_tokenizer(prefix)
    for suffix in ("json", "bin", "idx"):
        if (staging / suffix).exists():
            move(staging / suffix, with_suffix(prefix, f".{suffix}"))


def _checked_header(part: Path) -> IndexHeader:
    index, data = with_suffix(part, ".idx"), with_suffix(part, ".bin")
    for file in (index, data):
        if not file.is_file():
            raise UsageError(f"{file} is missing: name parts without .bin or .idx.")
    header = IndexHeader.read(index)
    if header.documents != header.sequences + 1:
        raise UsageError(
            f"{index} has documents of several sequences: only corpora of this project are merged."
        )
    tokens = sum(int(lengths.sum(dtype=np.int64)) for lengths in _read_lengths(part, header))
    if tokens * header.dtype.itemsize != data.stat().st_size:
        raise UsageError(f"{data} does not belong to its index: make this part again.")
    return header


def _read_lengths(part: Path, header: IndexHeader) -> Iterator[npt.NDArray[np.int32]]:
    with with_suffix(part, ".idx").open("rb") as index:
        index.seek(IndexHeader.SIZE)
        for first in range(0, header.sequences, _DOCUMENTS_AT_ONCE):
            count = min(_DOCUMENTS_AT_ONCE, header.sequences - first)
            yield np.fromfile(index, dtype=np.int32, count=count)


def _read_groups(
    part: Path, header: IndexHeader
) -> Iterator[tuple[npt.NDArray[np.integer], list[int]]]:
    """Tokens and lengths of some documents at a time."""
    with with_suffix(part, ".bin").open("rb") as data:
        for lengths in _read_lengths(part, header):
            groups = np.cumsum(lengths, dtype=np.int64) // _TOKENS_AT_ONCE
            for group in np.split(lengths, np.flatnonzero(np.diff(groups)) + 1):
                yield (
                    np.fromfile(data, header.dtype, int(group.sum(dtype=np.int64))),
                    group.tolist(),
                )


def _merged_summary(parts: Sequence[Path]) -> dict[str, Any] | None:
    """The summary of the whole, or None if a part has none."""
    files = [with_suffix(part, ".json") for part in parts]
    if not all(file.exists() for file in files):
        return None
    summaries = [read_json_object(file, "make this part again") for file in files]
    for file, summary in zip(files, summaries, strict=True):
        _check_summary(file, summary)
    for file, summary in zip(files, summaries, strict=True):
        for name in _COMMON:
            if summary[name] != summaries[0][name]:
                raise UsageError(
                    f"{file} has {name} {summary[name]!r} and {files[0]} {summaries[0][name]!r}: "
                    "merge parts of one tokenizer."
                )
    sums = {name: sum(summary[name] for summary in summaries) for name in _COUNTED}
    unread = Counter[str]()
    for summary in summaries:  # Parts of datatrove search no folders.
        unread.update(summary.get("unread_files", {}))
    return summaries[0] | sums | {"unread_files": dict(unread)}


def _check_summary(file: Path, summary: dict[str, Any]) -> None:
    missing = [name for name in (*_COMMON, *_COUNTED) if name not in summary]
    wrong = [name for name in _COUNTED if not isinstance(summary.get(name, 0), int)]
    if missing or wrong:
        what = f"has no {missing[0]}" if missing else f"has {wrong[0]} {summary[wrong[0]]!r}"
        raise UsageError(
            f"{file} {what}, so it is no summary of a corpus: move it away, or make this part "
            "again."
        )
