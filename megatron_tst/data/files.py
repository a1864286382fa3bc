"""Checks of a corpus (.bin and .idx) that cost a few reads, however large it is."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    _INDEX_HEADER,
    DType,
    IndexedDataset,
    get_bin_path,
    get_idx_path,
)
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError

# What is read of each file to tell it from others: 256 KiB, however large it is.
_FINGERPRINT_BLOCKS = 64
_FINGERPRINT_BLOCK_BYTES = 4096

_VERSION = 1
_MAX_SEQUENCES = 1 << 31
_COUNTS_OFFSET = len(_INDEX_HEADER) + struct.calcsize("<QB")
_HEADER_BYTES = _COUNTS_OFFSET + struct.calcsize("<QQ")
_REMEDY = "Copy the file again, or run tst preprocess again."


def check_indexed_dataset(path_prefix: str) -> None:
    """Checks that the two files of a corpus are there, whole, and belong together.

    Reads the header and the last entries of each table of the .idx file. A corpus in object storage
    is not checked.

    Args:
        path_prefix: path without ``.bin`` or ``.idx``, as given to ``--data-path``.

    Raises:
        UsageError: naming the file, what is wrong with it, and the remedy.
    """
    if is_object_storage_path(path_prefix):
        return
    index_path, data_path = Path(get_idx_path(path_prefix)), Path(get_bin_path(path_prefix))
    for path in (index_path, data_path):
        if not path.is_file():
            raise UsageError(
                f"--data-path {path_prefix}: {path} is missing. Pass the common path of both files "
                "without .bin or .idx."
            )
    expected_bytes = _expected_data_bytes(index_path)
    data_bytes = data_path.stat().st_size
    if data_bytes != expected_bytes:
        raise UsageError(
            f"{data_path} has {data_bytes} bytes and its index {index_path} describes "
            f"{expected_bytes}: it is truncated or belongs to another index. {_REMEDY}"
        )


def _expected_data_bytes(index_path: Path) -> int:
    """Size of the data that an index describes: where its last sequence ends."""
    with index_path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
        dtype_size, sequences, documents = _parse_header(index_path, header)
        lengths_end = _HEADER_BYTES + sequences * np.dtype(np.int32).itemsize
        offsets_end = lengths_end + sequences * np.dtype(np.int64).itemsize
        documents_end = offsets_end + documents * np.dtype(np.int64).itemsize
        index_bytes = os.fstat(file.fileno()).st_size
        if index_bytes < documents_end:
            raise UsageError(
                f"{index_path} has {index_bytes} bytes and needs {documents_end} for its "
                f"{sequences} sequences: it is truncated. {_REMEDY}"
            )

        def last(table_end: int, layout: str) -> int:
            file.seek(table_end - struct.calcsize(layout))
            value: int = struct.unpack(layout, file.read(struct.calcsize(layout)))[0]
            return value

        last_length, last_offset = last(lengths_end, "<i"), last(offsets_end, "<q")
        if last_length < 0:
            raise _negative_length(str(index_path), sequences - 1, last_length)
        if last(documents_end, "<q") != sequences:
            raise UsageError(
                f"{index_path} does not end its last document at sequence {sequences}: it is "
                f"damaged. {_REMEDY}"
            )
    return last_offset + last_length * dtype_size


def check_document_lengths(path_prefix: str, lengths: NDArray[np.int32]) -> None:
    """Looks for lengths that overflowed when a document of more than 2**31 - 1 tokens was written.

    Reads all of them, unlike ``check_indexed_dataset``: for the one rank that builds an index.

    Args:
        path_prefix: path of the corpus without ``.bin`` or ``.idx``, for the error.
        lengths: [documents] int32, such as ``IndexedDataset.sequence_lengths``.

    Raises:
        UsageError: naming the file, the document and the remedy.
    """
    if len(lengths) and lengths.min() < 0:
        document = int(lengths.argmin())
        raise _negative_length(get_idx_path(path_prefix), document, int(lengths[document]))


def _negative_length(index_path: str, document: int, length: int) -> UsageError:
    return UsageError(
        f"{index_path}: document {document} has {length} tokens. The file is damaged, or the "
        f"document has more than the {2**31 - 1} tokens that the format can hold and overflowed. "
        "Copy the file again, or split the document and run tst preprocess again."
    )


def _parse_header(index_path: Path, header: bytes) -> tuple[int, int, int]:
    """Bytes a token, number of sequences, and number of document boundaries."""
    if len(header) < _HEADER_BYTES or not header.startswith(_INDEX_HEADER):
        raise UsageError(
            f"{index_path} is not the index of a Megatron corpus (its header is missing). {_REMEDY}"
        )
    version, code = struct.unpack_from("<QB", header, len(_INDEX_HEADER))
    sequences, documents = struct.unpack_from("<QQ", header, _COUNTS_OFFSET)
    if version != _VERSION:
        raise UsageError(f"{index_path} has version {version}, not {_VERSION}. {_REMEDY}")
    if code not in [dtype.value for dtype in DType]:
        raise UsageError(f"{index_path} has the unknown token type {code}. {_REMEDY}")
    if sequences == 0 or documents == 0:
        raise UsageError(f"{index_path} holds no tokens. {_REMEDY}")
    if sequences > _MAX_SEQUENCES:
        # Its numbers of documents are int32 and wrap around without an error.
        raise UsageError(
            f"{index_path} has {sequences} sequences, and Megatron reads at most {_MAX_SEQUENCES} "
            "of a corpus: make several corpora of it, and name them all with --data-path."
        )
    return DType.size(code), sequences, documents


def check_vocabulary(
    path_prefix: str, vocabulary_size: int, documents: int = 64, tokens: int = 4096
) -> None:
    """Looks for token ids that the embedding has no row for, in a sample of the corpus.

    A sample, because a scan of a large corpus takes hours: the first ``tokens`` tokens of
    ``documents`` documents, evenly spread from the first to the last. A corpus made with another
    tokenizer shows at once; a single wrong token does not. A corpus in object storage is not
    checked.

    Args:
        path_prefix: path without ``.bin`` or ``.idx``; the files have passed
            ``check_indexed_dataset``.
        vocabulary_size: rows of the embedding, with padding.
        documents: documents to look at.
        tokens: tokens to read from each of them.

    Raises:
        UsageError: naming the file, the document, the token id and the remedy.
    """
    if is_object_storage_path(path_prefix):
        return
    corpus = IndexedDataset(path_prefix)
    for document in np.linspace(0, len(corpus) - 1, num=documents, dtype=np.int64).tolist():
        length = min(tokens, int(corpus.sequence_lengths[document]))
        if length == 0:
            continue
        text = corpus.get(document, 0, length)
        wrong = text[(text < 0) | (text >= vocabulary_size)]
        if len(wrong):
            raise UsageError(
                f"{get_bin_path(path_prefix)}: document {document} holds token id {wrong[0]}, and "
                f"the vocabulary has {vocabulary_size}. Use the tokenizer that the corpus was made "
                "with, or raise --padded-vocab-size."
            )


def fingerprint(files: Sequence[str]) -> str:
    """Hash of the sizes of files and of blocks evenly spread over each of them."""
    digest = hashlib.sha256()
    for path in files:
        size = os.path.getsize(path)
        digest.update(size.to_bytes(8, "little"))
        last = max(size - _FINGERPRINT_BLOCK_BYTES, 0)
        with open(path, "rb") as file:
            for block in range(_FINGERPRINT_BLOCKS):
                file.seek(last * block // (_FINGERPRINT_BLOCKS - 1))
                digest.update(file.read(_FINGERPRINT_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def check_same_tokenizer(path_prefixes: Sequence[str]) -> None:
    """Checks that the corpora of a blend hold ids of one tokenizer.

    Compares the token types of the .idx files, which follow the size of the vocabulary, and the
    fingerprints that ``tst preprocess`` leaves beside the corpora that it makes.

    Args:
        path_prefixes: paths without ``.bin`` or ``.idx``; the files have passed
            ``check_indexed_dataset``.

    Raises:
        UsageError: naming two corpora that differ, in what, and the remedy.
    """
    local = [prefix for prefix in path_prefixes if not is_object_storage_path(prefix)]
    for what, read in (("token type", _token_type), ("tokenizer", _tokenizer_fingerprint)):
        found = [(value, prefix) for prefix in local if (value := read(prefix)) is not None]
        for value, prefix in found[1:]:
            first_value, first_prefix = found[0]
            if value != first_value:
                raise UsageError(
                    f"--data-path {prefix} was made with the {what} {value}, and {first_prefix} "
                    f"with {first_value}: run tst preprocess with one tokenizer for all."
                )


def _token_type(path_prefix: str) -> str | None:
    index_path = Path(get_idx_path(path_prefix))
    with index_path.open("rb") as file:
        code = file.read(_HEADER_BYTES)[len(_INDEX_HEADER) + struct.calcsize("<Q")]
    return np.dtype(DType.dtype_from_code(code)).name


def _tokenizer_fingerprint(path_prefix: str) -> str | None:
    report = Path(f"{path_prefix}.json")
    try:
        content = json.loads(report.read_text())
    except (OSError, ValueError):  # Another tool made the corpus.
        return None
    fingerprint = content.get("tokenizer_sha256") if isinstance(content, dict) else None
    return str(fingerprint)[:16] if fingerprint else None
