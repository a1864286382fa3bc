"""Damaged and mismatched corpora are refused before training."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tst.data.files import (
    check_document_lengths,
    check_indexed_dataset,
    check_vocabulary,
)
from tests.corpus import write_corpus, write_documents

LENGTHS = [5, 3, 12]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text", LENGTHS)
    return tmp_path / "text"


def truncate(suffix: str, size: int) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = prefix.with_suffix(suffix)
        path.write_bytes(path.read_bytes()[:size])

    return damage


def overwrite(layout: str, offset: int, value: int) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = prefix.with_suffix(".idx")
        data = bytearray(path.read_bytes())
        struct.pack_into(layout, data, offset, value)
        path.write_bytes(data)

    return damage


def remove(suffix: str) -> Callable[[Path], None]:
    return lambda prefix: prefix.with_suffix(suffix).unlink()


def test_a_whole_corpus_passes(prefix: Path) -> None:
    check_indexed_dataset(str(prefix))
    assert len(IndexedDataset(str(prefix))) == len(LENGTHS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(".idx"), r"text\.idx is missing"),
        (remove(".bin"), r"text\.bin is missing"),
        (truncate(".idx", 0), r"text\.idx is not the index"),
        (truncate(".idx", 33), r"text\.idx is not the index"),
        (truncate(".idx", 34), r"text\.idx has 34 bytes and needs 102 for its 3 sequences"),
        (truncate(".idx", 101), r"text\.idx has 101 bytes and needs 102"),
        (truncate(".bin", 79), r"text\.bin has 79 bytes and its index .* describes 80"),
        (truncate(".bin", 0), r"text\.bin has 0 bytes"),
        (overwrite("<B", 0, 0), r"text\.idx is not the index"),
        (overwrite("<Q", 9, 2), r"text\.idx has version 2, not 1"),
        (overwrite("<B", 17, 9), r"text\.idx has the unknown token type 9"),
        # uint16 in place of int32: the lengths describe half of the bytes
        (overwrite("<B", 17, 8), r"text\.bin has 80 bytes and its index .* describes 56"),
        (overwrite("<Q", 18, 0), r"text\.idx holds no tokens"),
        (overwrite("<Q", 18, 2**31 + 1), r"text\.idx has 2147483649 sequences.* several corpora"),
        (overwrite("<i", 42, -12), r"text\.idx: document 2 has -12 tokens.* 2147483647.* split"),
        (overwrite("<Q", 94, 2), r"text\.idx does not end its last document at sequence 3"),
    ],
)
def test_damaged_files_are_refused(
    prefix: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        check_indexed_dataset(str(prefix))


@pytest.mark.parametrize("document", range(3))
def test_negative_lengths_are_refused(prefix: Path, document: int) -> None:
    lengths = np.array(LENGTHS, dtype=np.int32)
    check_document_lengths(str(prefix), lengths)
    lengths[document] = -2
    with pytest.raises(ValueError, match=rf"text\.idx: document {document} has -2 tokens.* split"):
        check_document_lengths(str(prefix), lengths)


def test_the_index_of_another_corpus_is_refused(prefix: Path) -> None:
    write_corpus(prefix.with_name("other"), [9])
    prefix.with_name("other.idx").replace(prefix.with_suffix(".idx"))
    with pytest.raises(ValueError, match=r"text\.bin has 80 bytes .*text\.idx describes 36"):
        check_indexed_dataset(str(prefix))


@pytest.mark.parametrize("wrong_document", [0, 199])
def test_tokens_outside_of_the_vocabulary_are_refused(tmp_path: Path, wrong_document: int) -> None:
    prefix = tmp_path / "text"
    documents = [np.full(4, 7) for _ in range(200)]
    documents[100] = np.zeros(0, dtype=np.int64)
    documents[wrong_document] = np.array([1, 50, 2])
    write_documents(prefix, documents)
    check_vocabulary(str(prefix), 51)
    message = rf"text\.bin: document {wrong_document} holds token id 50.* vocabulary has 50\b"
    with pytest.raises(ValueError, match=message):
        check_vocabulary(str(prefix), 50)


def test_negative_tokens_are_refused(tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [np.array([3, -1])])
    with pytest.raises(ValueError, match="document 0 holds token id -1"):
        check_vocabulary(str(tmp_path / "text"), 50)
