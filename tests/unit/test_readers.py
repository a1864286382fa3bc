"""Reading documents: formats, order, limits, and what happens to input that is not text."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_tst.corpus import readers
from megatron_tst.corpus.file_kinds import DEFAULT_EXTENSIONS
from megatron_tst.corpus.readers import Position, read_batches, take_apart
from megatron_tst.corpus.selection import Counts, Limits, Selection, read_texts
from megatron_tst.corpus.sources import find_sources

TEXTS = ["first\nline\r\n", "  zweite: äöü €  ", "третий 🎉", "\ttab\n\n"]


def select(*inputs: Path, seed: int | None = None, **limits: Any) -> tuple[list[str], Selection]:
    selection = Selection(Limits(**limits))
    batches = read_batches(find_sources(inputs, DEFAULT_EXTENSIONS, seed))
    return [text for text, _ in read_texts(batches, "text", selection)], selection


def read(*inputs: Path, seed: int | None = None, **limits: Any) -> list[str]:
    return select(*inputs, seed=seed, **limits)[0]


def write_json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, column: Any, row_group_size: int = 3) -> Path:
    table = pa.table({"id": range(len(column)), "text": column})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def zstd_frames(content: bytes, count: int) -> bytes:
    step = len(content) // count + 1
    pieces = [content[i : i + step] for i in range(0, len(content), step)]
    return b"".join(map(zstandard.ZstdCompressor().compress, pieces))


def test_json_lines_read_the_same_in_every_compression(tmp_path: Path) -> None:
    # Random digits, so that the compressed input is several chunks long.
    noise = random.Random(0)
    texts = [text + noise.randbytes(30).hex() for text in TEXTS * 2000]
    plain = write_json_lines(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd_frames(plain.read_bytes(), count=3))
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        assert read(tmp_path / name) == texts, name


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_rows_of_every_string_type(tmp_path: Path, kind: str) -> None:
    types = {"dictionary": pa.dictionary(pa.int32(), pa.string())}
    column = pa.array(TEXTS * 3, pa.string()).cast(types.get(kind) or getattr(pa, kind)())
    assert read(write_parquet(tmp_path / "a.parquet", column)) == TEXTS * 3


def test_bad_rows_of_parquet_are_counted_one_by_one(tmp_path: Path) -> None:
    content = pa.array([b"one", b"caf\xe9", None, b"", b"two"], pa.binary())
    file = write_parquet(tmp_path / "a.parquet", content.view(pa.string()))
    texts, selection = select(file, max_bad_documents=2)
    assert texts == ["one", "two"]
    assert selection.counts == Counts(2, 6, empty_documents=1, bad_documents=2)
    assert selection.left_out == [
        f"{file}:2: invalid UTF-8 at byte 3",
        f"{file}:3: a null in place of text",
        f"{file}:4: empty",
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["x"]}, r"no column 'text' \(body\): set --json-key"),
        ({"text": [1]}, "holds int64 in column 'text', not text"),
        ({"text": [["x"]]}, "in column 'text', not text"),
        (None, r"a\.parquet cannot be read .*repair it"),
    ],
)
def test_parquet_files_without_text_are_refused(tmp_path: Path, table: Any, message: str) -> None:
    file = tmp_path / "a.parquet"
    if table is None:
        file.write_bytes(b"PAR1 and no more")
    else:
        pq.write_table(pa.table(table), file)
    with pytest.raises(ValueError, match=message):
        read(file)


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.txt.gz", "a.txt.zst", "a.py", "a.md.gz"])
def test_other_files_are_one_document_kept_exactly(tmp_path: Path, name: str) -> None:
    text = "\n".join(TEXTS)
    compress = {".gz": gzip.compress, ".zst": lambda raw: zstd_frames(raw, count=2)}
    content = compress.get(Path(name).suffix, bytes)(text.encode())
    (tmp_path / name).write_bytes(content)
    texts, selection = select(tmp_path / name)
    assert texts == [text]
    assert selection.counts.text_bytes == len(text.encode())
    (batch,) = read_batches(find_sources([tmp_path / name], DEFAULT_EXTENSIONS))
    assert batch.file_bytes == len(content)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    assert read(tmp_path / "a.txt") == ["text"]


def test_folders_are_searched_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a/x.py", "a.txt", "c.py", "logo.png", "b/readme"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b/a/x.py", "b/z.py", "c.py"]
    assert read(tmp_path / "c.py", tmp_path / "b") == ["c.py", "b/a/x.py", "b/z.py"]


def test_shuffling_is_reproducible_and_loses_nothing(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"{number:02}")
    ordered, shuffled = read(tmp_path), read(tmp_path, seed=1)
    assert shuffled == read(tmp_path, seed=1)
    assert shuffled not in (ordered, read(tmp_path, seed=2))
    assert sorted(shuffled) == ordered


def test_reading_goes_on_behind_any_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = write_json_lines(tmp_path / "1.jsonl", TEXTS)
    lines.write_text(lines.read_text().replace("\n", "\n\n", 2))
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "3.jsonl.zst").write_bytes(zstd_frames(lines.read_bytes(), count=2))
    write_parquet(tmp_path / "4.parquet", TEXTS * 2)
    (tmp_path / "5.txt").write_text("text")
    sources = find_sources([tmp_path], DEFAULT_EXTENSIONS)
    monkeypatch.setattr(readers, "BATCH_BYTES", 1)
    batches = list(read_batches(sources))
    documents = [take_apart(batch.content)[0] for batch in batches]
    assert [len(some) for some in documents] == [1, 0, 1, 0, 1, 1] * 3 + [1] * 9
    assert [some[0].number for some in documents[18:]] == [*range(1, 9), 0]
    for number, batch in enumerate(batches):
        assert list(read_batches(sources, start=batch.end)) == batches[number + 1 :]
    assert list(read_batches(sources, start=Position())) == batches
    lines.write_text("")
    with pytest.raises(ValueError, match=r"1\.jsonl cannot be read \(it has become shorter\)"):
        take_apart(batches[0].content)


def test_limits_stop_before_they_are_exceeded(tmp_path: Path) -> None:
    file = write_json_lines(tmp_path / "a.jsonl", ["12345", "äöü", "x"])
    assert read(file, max_documents=2) == ["12345", "äöü"]
    assert read(file, max_bytes=11) == ["12345", "äöü"]
    assert read(file, max_bytes=10) == ["12345"]


BAD_LINES = [
    (b'{"text": "x"', "malformed JSON"),
    (b"[" * 100_000, "malformed JSON"),
    (b'["text"]', "no object"),
    (b'{"body": "x"}', "no member 'text' (see --json-key)"),
    (b'{"text": 3}', "no string"),
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    (b'{"text": "\\u0000"}', "NUL"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_lines_are_fatal_or_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(ValueError, match="raise --max-bad-documents") as caught:
        read(file)
    assert f"{file}:3 has" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    texts, selection = select(file, max_bad_documents=1)
    assert texts == ["one", "two"]
    assert selection.counts.bad_documents == 1
    (reported,) = selection.left_out
    assert reported.startswith(f"{file}:3: ")
    assert reason in reported
    file.write_bytes((line + b"\n") * 2)
    with pytest.raises(ValueError, match=r":2 has .*now 1"):
        read(file, max_bad_documents=1)


@pytest.mark.parametrize("content", [b"caf\xe9", "utf-16".encode("utf-16-le"), b"a\0b"])
def test_binary_files_are_skipped_in_folders_and_refused_by_name(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "a.py").write_bytes(content)
    (tmp_path / "b.py").write_text("text")
    texts, selection = select(tmp_path)
    assert texts == ["text"]
    assert (selection.counts.skipped_files, selection.counts.bad_documents) == (1, 0)
    assert selection.left_out[0].startswith(f"{tmp_path / 'a.py'}: ")
    with pytest.raises(ValueError, match=r"a\.py has .*--max-bad-documents"):
        read(tmp_path / "a.py")


def test_empty_documents_are_counted_or_fatal(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n\n{"text": " "}\n')
    texts, selection = select(tmp_path)
    assert texts == [" "]
    assert selection.counts.empty_documents == 2
    assert selection.left_out == [
        f"{tmp_path / 'a.txt'}: empty",
        f"{tmp_path / 'b.jsonl'}:1: empty",
    ]
    assert read(tmp_path, max_empty_documents=2) == [" "]
    with pytest.raises(ValueError, match=r"b\.jsonl:1 has no text.*--max-empty-documents \(now 1"):
        read(tmp_path, max_empty_documents=1)


@pytest.mark.parametrize("extension", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.5, -1, None])
def test_damaged_archives_are_refused(tmp_path: Path, extension: str, kept: float | None) -> None:
    content = write_json_lines(tmp_path / "a.jsonl", TEXTS * 1000).read_bytes()
    packed = gzip.compress(content) if extension == ".gz" else zstd_frames(content, count=1)
    file = tmp_path / f"a.jsonl{extension}"
    match kept:
        case None:
            file.write_bytes(content)
        case float():
            file.write_bytes(packed[: int(len(packed) * kept)])
        case _:
            file.write_bytes(packed[:kept])
    with pytest.raises(ValueError, match=rf"a\.jsonl\{extension} cannot be read .*repair it"):
        read(file)


def test_what_lies_before_damage_is_read(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl.gz").write_bytes(b"no archive")
    assert read(tmp_path, max_documents=4) == TEXTS
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz cannot be read"):
        read(tmp_path, max_documents=5)


def test_inputs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--input .*/missing does not exist"):
        read(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no file to read"):
        read(tmp_path)
    (tmp_path / "a.warc").touch()
    with pytest.raises(ValueError, match=r"a\.warc has an unknown extension.*--extensions"):
        read(tmp_path / "a.warc")
