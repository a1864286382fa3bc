"""The last steps of a datatrove pipeline, on documents as they come from the ones before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datatrove.data import Document
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tst.corpus import indexed_writer
from megatron_tst.corpus.datatrove_steps import MergeMegatronParts, WriteMegatronPart
from megatron_tst.corpus.tokenizer import END_OF_DOCUMENT, byte_tokenizer

TEXTS = [f"a {END_OF_DOCUMENT} b", "", "größe"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    byte_tokenizer().save_files(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def documents(texts: list[str]) -> list[Document]:
    return [Document(text=text, id=f"web/{number}") for number, text in enumerate(texts)]


def test_parts_are_written_and_joined(tmp_path: Path, tokenizer: str) -> None:
    write = WriteMegatronPart(str(tmp_path / "parts"), tokenizer)
    for rank, texts in enumerate((["zero"], [], TEXTS)):
        passed_on = list(write.run(documents(texts), rank, world_size=3))
        assert [document.text for document in passed_on] == [text for text in texts if text]
    merge = MergeMegatronParts(str(tmp_path / "parts"), 3, str(tmp_path / "corpus"))
    merge.run()
    merged = [bytes(ids.tolist()) for ids in IndexedDataset(str(tmp_path / "corpus"))]
    # Text that mentions the end-of-document token holds no such token.
    assert merged == [b"zero\0", *(f"{text}\0".encode() for text in TEXTS if text)]
    summary = json.loads((tmp_path / "corpus.json").read_text())
    assert (summary["documents"], summary["empty_documents"]) == (3, 1)
    assert summary["tokens"] == sum(map(len, merged))
    with pytest.raises(ValueError, match=r"00003\.idx is missing"):
        MergeMegatronParts(str(tmp_path / "parts"), 4, str(tmp_path / "corpus")).run()


@pytest.mark.parametrize("bad", ["a\0b", "\ud800"])
def test_bad_documents_are_fatal_or_counted(tmp_path: Path, tokenizer: str, bad: str) -> None:
    strict = WriteMegatronPart(str(tmp_path / "parts"), tokenizer)
    with pytest.raises(ValueError, match=r"document web/1 has a .*raise max_bad_documents"):
        list(strict.run(documents(["a", bad, "b"])))
    assert list((tmp_path / "parts").iterdir()) == []
    lenient = WriteMegatronPart(str(tmp_path / "parts"), tokenizer, max_bad_documents=1)
    assert len(list(lenient.run(documents(["a", bad, "b"])))) == 2
    assert json.loads((tmp_path / "parts" / "00000.json").read_text())["bad_documents"] == 1


def test_a_document_too_long_for_the_format_is_refused(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_writer, "_MAX_DOCUMENT_TOKENS", 5)
    write = WriteMegatronPart(str(tmp_path / "parts"), tokenizer)
    with pytest.raises(ValueError, match=r"^document web/1 has 6 tokens, .* at most 5: split it"):
        list(write.run(documents(["1234", "12345"])))
    assert list((tmp_path / "parts").iterdir()) == []
