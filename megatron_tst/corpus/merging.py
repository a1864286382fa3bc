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

_TOKENS_AT_ONCE = 1 << 22
_DOCUMENTS_AT_ONCE = 1 << 16
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
        overwrite: replace an existing corpus.

    Returns:
        The number of documents.

    Raises:
        UsageError: a part is missing, damaged, or made with another tokenizer than the first.
    """
    if not parts:
        raise UsageError("there is nothing to merge: name the prefix of at least one part.")
    if with_suffix(output_prefix, ".idx").exists() and not overwrite:
        raise UsageError(
            f"--output-prefix {output_prefix} is already there: choose another or pass --overwrite."
        )
    headers = [_checked_header(part) for part in parts]
    summary = _merged_summary(parts)
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
        publish(staging, output_prefix)
    return writer.documents


def publish(staging: Path, prefix: Path) -> None:
    """Moves ``json``, ``bin`` and ``idx`` of a folder to the prefix of a corpus, the index last.

    A summary that is not in the folder goes from the prefix too.
    """
    # An old index must never describe new data, not even for a moment.
    for suffix in ("idx", "json"):
        with_suffix(prefix, f".{suffix}").unlink(missing_ok=True)
    for suffix in ("json", "bin", "idx"):
        if (staging / suffix).exists():
            move(staging / suffix, with_suffix(prefix, f".{suffix}"))


def with_suffix(prefix: Path, suffix: str) -> Path:
    """A file of a corpus: its prefix with ``suffix`` appended."""
    return prefix.with_name(prefix.name + suffix)


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
