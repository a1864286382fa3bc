"""Parts that were tokenized on their own, joined in order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_tst.commands import merge_corpora as merge_tool
from megatron_tst.corpus import merging
from megatron_tst.corpus.indexed_writer import IndexedDatasetWriter
from megatron_tst.corpus.merging import merge_corpora
from megatron_tst.corpus.outputs import with_suffix
from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess


def tokenize(prefix: Path, texts: list[str], **options: Any) -> Path:
    corpus = prefix.with_name(f"{prefix.name}.jsonl")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess(PreprocessConfig((corpus,), prefix, **{"byte_level": True} | options))
    return prefix


def write(prefix: Path, lengths: list[int], dtype: Any = np.uint16) -> Path:
    data, index = (with_suffix(prefix, suffix) for suffix in (".bin", ".idx"))
    with IndexedDatasetWriter(data, index, np.dtype(dtype)) as writer:
        writer.add_documents(np.arange(sum(lengths), dtype=dtype), lengths)
    return prefix


def test_parts_give_the_bytes_of_one_run(tmp_path: Path) -> None:
    texts = [f"{i} größe\n" * (i % 7) for i in range(50)]
    whole = tokenize(tmp_path / "whole", texts)
    # A dot in the name is no extension.
    parts = [tokenize(tmp_path / f"v1.{i}", texts[i * 20 : i * 20 + 20]) for i in range(3)]
    for number, part in enumerate(parts):
        file = with_suffix(part, ".json")
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
    with pytest.raises(ValueError, match=r"out\.bin.*out\.idx already there; .*--overwrite"):
        merge_corpora([second], tmp_path / "out")
    merge_corpora([second], tmp_path / "out", overwrite=True)
    assert [len(document) for document in IndexedDataset(str(tmp_path / "out"))] == [3]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["out.json", "out.bin", "out.left-out.log"])
def test_no_file_is_replaced_without_being_asked(tmp_path: Path, name: str) -> None:
    part = write(tmp_path / "part", [2])
    (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} already there; .*--overwrite"):
        merge_corpora([part], tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_part_is_never_replaced(tmp_path: Path) -> None:
    parts = [tokenize(tmp_path / name, [name]) for name in ("a", "b")]
    (tmp_path / "here").symlink_to(tmp_path)
    before = contents(tmp_path)
    for prefix in (tmp_path / "b", tmp_path / "here" / "b"):
        with pytest.raises(ValueError, match=r"would write .*b\.bin over the input .*/b\.bin"):
            merge_corpora(parts, prefix, overwrite=True)
    assert contents(tmp_path) == before


def test_nothing_of_the_corpus_before_is_left(tmp_path: Path) -> None:
    tokenize(tmp_path / "out", ["abab" * 9, ""], byte_level=False, train_bpe=258)
    part = tokenize(tmp_path / "part", ["text"])
    assert {"out.left-out.log", "out-tokenizer/tokenizer.json"} <= contents(tmp_path).keys()
    merge_corpora([part], tmp_path / "out", overwrite=True)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]
    assert sorted(left) == ["out.bin", "out.idx", "out.json", "out.jsonl"]


def test_the_tokenizer_of_the_parts_may_lie_beside_the_whole(tmp_path: Path) -> None:
    part = tokenize(tmp_path / "part", ["text"])
    shutil.copytree(tmp_path / "part-tokenizer", tmp_path / "out-tokenizer")
    merge_corpora([part], tmp_path / "out")
    merge_corpora([part], tmp_path / "out", overwrite=True)
    names = [path.name for path in (tmp_path / "out-tokenizer").iterdir()]
    assert sorted(names) == ["tokenizer.json", "tokenizer_config.json"]
    # What does not say which tokenizer it was made with leaves the one that is there.
    (tmp_path / "part.json").unlink()
    merge_corpora([part], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out-tokenizer").is_dir()
    other = tokenize(tmp_path / "other", ["abab" * 9], byte_level=False, train_bpe=258)
    with pytest.raises(ValueError, match=r"out-tokenizer already there"):
        merge_corpora([other], tmp_path / "out")
    (tmp_path / "out-tokenizer" / "notes.txt").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"out-tokenizer is another .* holds notes\.txt"):
        merge_corpora([other], tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ({"name": "of something else"}, "has no tokenizer_sha256, so it is no summary"),
        ({"tokens": "many"}, "has tokens 'many', so it is no summary"),
    ],
)
def test_summaries_of_something_else_are_refused(
    tmp_path: Path, summary: dict[str, Any], message: str
) -> None:
    part = tokenize(tmp_path / "part", ["text"])
    ours = json.loads((tmp_path / "part.json").read_text()) if "tokens" in summary else {}
    (tmp_path / "part.json").write_text(json.dumps(ours | summary))
    with pytest.raises(ValueError, match=rf"part\.json {message}"):
        merge_corpora([part], tmp_path / "out")


@pytest.mark.parametrize("prefix", [".", "..", "{}/", "{}/.", ""])
def test_a_folder_is_no_prefix(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    part = write(tmp_path / "part", [2])
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    prefix = prefix.format(tmp_path / "folder")
    assert merge_tool.main([str(part), "--output-prefix", prefix, "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output-prefix {prefix} names a folder: add the name")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_part_by_dots_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.idx is missing: name parts"):
        merge_corpora([Path(".")], tmp_path / "out")
