"""Parts that were tokenized on their own, joined in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_tst.corpus import merging
from megatron_tst.corpus.indexed_writer import IndexedDatasetWriter
from megatron_tst.corpus.merging import merge_corpora
from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess


def tokenize(prefix: Path, texts: list[str], **options: Any) -> Path:
    corpus = prefix.with_name(f"{prefix.name}.jsonl")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess(PreprocessConfig((corpus,), prefix, **{"byte_level": True} | options))
    return prefix


def write(prefix: Path, lengths: list[int], dtype: Any = np.uint16) -> Path:
    data, index = (merging.with_suffix(prefix, suffix) for suffix in (".bin", ".idx"))
    with IndexedDatasetWriter(data, index, np.dtype(dtype)) as writer:
        writer.add_documents(np.arange(sum(lengths), dtype=dtype), lengths)
    return prefix


def test_parts_give_the_bytes_of_one_run(tmp_path: Path) -> None:
    texts = [f"{i} größe\n" * (i % 7) for i in range(50)]
    whole = tokenize(tmp_path / "whole", texts)
    # A dot in the name is no extension.
    parts = [tokenize(tmp_path / f"v1.{i}", texts[i * 20 : i * 20 + 20]) for i in range(3)]
    for number, part in enumerate(parts):
        file = merging.with_suffix(part, ".json")
        of_part = json.loads(file.read_text()) | {"unread_files": {".png": number}}
        file.write_text(json.dumps(of_part))
    assert merge_corpora(parts, tmp_path / "new" / "v1.merged") == 42
    for suffix in (".bin", ".idx"):
        merged = (tmp_path / "new" / f"v1.merged{suffix}").read_bytes()
        assert merged == whole.with_suffix(suffix).read_bytes()
    summary, expected = (
        json.loads(file.read_text())
        for file in (tmp_path / "new" / "v1.merged.json", tmp_path / "whole.json")
    )
    assert summary.pop("unread_files") == {".png": 3}
    assert summary | {"tokenizer": expected["tokenizer"], "unread_files": {}} == expected
    assert len(list((tmp_path / "new").iterdir())) == 3


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_parts_are_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    monkeypatch.setattr(merging, "_TOKENS_AT_ONCE", 10)
    monkeypatch.setattr(merging, "_DOCUMENTS_AT_ONCE", 4)
    lengths = [[3, 3, 3, 3, 40, 1, 9, 1, 10, 1], [], [7]]
    parts = [write(tmp_path / str(i), part, dtype) for i, part in enumerate(lengths)]
    merge_corpora(parts, tmp_path / "merged")
    merged = IndexedDataset(str(tmp_path / "merged"))
    assert merged.sequence_lengths.tolist() == [*lengths[0], *lengths[2]]
    documents = [merged[i] for i in range(len(merged))]
    assert np.concatenate(documents).tolist() == [*range(74), *range(7)]
    assert documents[0].dtype == dtype


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    first = tokenize(tmp_path / "first", ["text"])
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_corpora([], tmp_path / "out")
    with pytest.raises(ValueError, match=r"other\.idx is missing: name parts without"):
        merge_corpora([first, tmp_path / "other"], tmp_path / "out")
    other = tokenize(tmp_path / "other", ["text"], append_eod=False)
    with pytest.raises(ValueError, match=r"other\.json has append_eod False .*one tokenizer"):
        merge_corpora([first, other], tmp_path / "out")
    wide = write(tmp_path / "wide", [2], np.int32)
    with pytest.raises(ValueError, match=r"wide holds int32 and .*first uint16"):
        merge_corpora([first, wide], tmp_path / "out")
    (tmp_path / "wide.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"wide\.bin does not belong to its index"):
        merge_corpora([wide], tmp_path / "out")
    (tmp_path / "wide.idx").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"wide\.idx is no index"):
        merge_corpora([wide], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_documents_of_several_sequences_are_refused(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    builder.add_document(np.arange(5), [2, 3])
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(ValueError, match=r"a\.idx has documents of several sequences"):
        merge_corpora([tmp_path / "a"], tmp_path / "out")


def test_existing_corpus_is_replaced_on_request_only(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", [2]), write(tmp_path / "second", [3])
    merge_corpora([first], tmp_path / "out")
    with pytest.raises(ValueError, match=r"out is already there: .*--overwrite"):
        merge_corpora([second], tmp_path / "out")
    merge_corpora([second], tmp_path / "out", overwrite=True)
    assert [len(document) for document in IndexedDataset(str(tmp_path / "out"))] == [3]
