"""Which files are read, and as what: names lie, folders hold all kinds of things, links lead on."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_tst.corpus import file_kinds, sources
from megatron_tst.corpus.file_kinds import DEFAULT_EXTENSIONS
from megatron_tst.corpus.readers import read_batches
from megatron_tst.corpus.selection import Limits, Selection, read_texts
from megatron_tst.corpus.sources import described, find_sources

TEXTS = ["one", "two", "three"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
OTHER_KEY = LINES.replace("text", "body")
ARRAY = json.dumps([{"text": text} for text in TEXTS], indent=1)
OBJECT = json.dumps({"text": "one", "id": 1}, indent=1)


def read(
    *inputs: Path,
    extensions: tuple[str, ...] = DEFAULT_EXTENSIONS,
    unread: Counter[str] | None = None,
) -> list[str]:
    batches = read_batches(find_sources(inputs, extensions, unread=unread))
    return [text for text, _ in read_texts(batches, "text", Selection(Limits()))]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write_file(name: str, content: str = LINES) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        compress: Any = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        path.write_bytes(compress.get(path.suffix, bytes)(content.encode()))
        return path

    return write_file


Write = Callable[..., Path]

LINES_NAMES = ["a.json", "a.json.gz", "a.ndjson", "a.jsonlines.xz", "a.jl", "a.JL.bz2", "a.txt"]


@pytest.mark.parametrize("name", LINES_NAMES)
@pytest.mark.parametrize("before", ["\ufeff", "\n \r\n"])
def test_json_lines_under_other_names(tmp_path: Path, write: Write, name: str, before: str) -> None:
    path = write(name, before + LINES)
    assert read(path) == read(tmp_path) == TEXTS


@pytest.mark.parametrize("name", ["part-00000", "a.jsonl.1", "a.data.gz"])
def test_named_json_lines_need_no_known_name(tmp_path: Path, write: Write, name: str) -> None:
    path = write(name)
    assert read(path) == TEXTS
    with pytest.raises(ValueError, match=r"holds no file to read \(it holds 1 "):
        read(tmp_path)


def test_text_stays_text(tmp_path: Path, write: Write) -> None:
    contents = {
        "a.jl": "[1, 2]\nf(x) = 2x\n",
        "b.md": '{"a": 1}\nis an object\n',
        "c.txt": '{"a": 1}\n',
        "d.txt": '[\n{"a": 1}]\n',
        "e.py": LINES,  # no name for data
        "f.txt": "",
    }
    paths = [write(name, content) for name, content in contents.items()]
    assert read(*paths) == read(tmp_path) == [content for content in contents.values() if content]


def test_lines_without_the_member_are_named(tmp_path: Path, write: Write) -> None:
    named = [write(name, OTHER_KEY) for name in ("a.json", "a.jl", "a.txt", "part-0")]
    for path in named:
        with pytest.raises(ValueError, match=r":1 has no member 'text' \(see --json-key\)"):
            read(path)
    # In folders such files are most often configurations.
    for path in named[1:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"1 \.json without lines that have 'text'.*--json-key"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.txt", "unknown"])
@pytest.mark.parametrize("content", [ARRAY, ARRAY.replace("\n", ""), "[\n" + ARRAY[1:40]])
def test_arrays_are_refused(tmp_path: Path, write: Write, name: str, content: str) -> None:
    path = write(name, content)
    with pytest.raises(ValueError, match=r"is a JSON array.*jq -c '\.\[\]'"):
        read(path)
    if name != "unknown":
        with pytest.raises(ValueError, match=rf"{name} is a JSON array"):
            read(tmp_path)
    for text in (content, ARRAY):
        lines = write("a.jsonl", text)
        with pytest.raises(ValueError, match=r"jsonl:1 has .*jq -c '\.\[\]'"):
            read(lines)


def test_a_bad_first_document_hides_no_file(tmp_path: Path, write: Write) -> None:
    write("a.json", '{"text": null}\n' + LINES)
    write("b.jsonl")
    with pytest.raises(ValueError, match=r"a\.json:1 has a member 'text' that is no string"):
        read(tmp_path)


def test_json_that_is_no_lines(tmp_path: Path, write: Write) -> None:
    strings = write("b.json", '["one", "two"]')
    with pytest.raises(ValueError, match=r"b\.json is a JSON array"):
        read(strings)
    spread = write("a.json", OBJECT)
    with pytest.raises(ValueError, match=r"not begin with a JSON object on one line.*jq -c \."):
        read(spread)
    write("c.txt", "text")
    unread = Counter[str]()
    assert read(tmp_path, unread=unread) == ["text"]
    assert unread == {".json without lines that have 'text'": 2}
    # As text where --extensions asks for it, and never JSON lines.
    write("d.json")
    minified = write("e.json", '{"a": 1}')
    assert read(tmp_path, extensions=(".json",)) == [
        *(OBJECT, '["one", "two"]', *TEXTS, '{"a": 1}'),
    ]
    assert read(minified, extensions=(".json",)) == ['{"a": 1}']


def test_a_long_first_line_is_still_seen(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_kinds, "_LINE_BYTES", 1000)
    text = "größe " * 1000
    assert read(write("a.json", json.dumps({"id": 7, "text": text}))) == [text]
    with pytest.raises(ValueError, match="is a JSON array"):
        read(write("a.json", json.dumps([{"id": 7, "text": text * 100}])))


def test_what_a_folder_holds_besides_is_counted(tmp_path: Path, write: Write) -> None:
    names = ["a.jsonl", "b.jsonl.lz4", "c.PNG", "d.png", "e.csv.gz", "readme", ".hidden"]
    names += [".ipynb_checkpoints/a-checkpoint.jsonl", "deep/.git/a.jsonl", "deep/b.tar.xz"]
    for name in names:
        write(name)
    (tmp_path / "nowhere.jsonl").symlink_to("missing")
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    unread = Counter[str]()
    assert read(tmp_path, unread=unread) == TEXTS
    assert unread == {
        **{".lz4": 1, ".png": 2, ".csv.gz": 1, "without extension": 1, ".tar.xz": 1},
        **{"hidden files": 1, "hidden folders": 2, "broken links": 2},
    }
    assert described(unread, most=2).endswith(", 6 other kinds")
    # What a user names is read, hidden or not.
    assert read(tmp_path / ".ipynb_checkpoints") == TEXTS


def test_links_are_followed_once(tmp_path: Path, write: Write) -> None:
    texts = {name: f'{{"text": "{name}"}}\n' for name in ("a", "b", "c")}
    write("root/z/a.jsonl", texts["a"])
    write("elsewhere/b.jsonl", texts["b"])
    blob = write("blobs/123", texts["c"])
    root = tmp_path / "root"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "latest").symlink_to("z")
    (root / "z" / "up").symlink_to("..")
    (root / "out").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "c.jsonl").symlink_to(blob)
    (root / "a.jsonl").symlink_to("z/a.jsonl")
    unread = Counter[str]()
    assert read(root, unread=unread) == ["c", "b", "a"]
    assert unread == {
        "links to folders that are read already": 4,
        "links to files that are read already": 1,
    }


def test_files_are_read_once_whatever_names_them(tmp_path: Path, write: Write) -> None:
    named = write("root/b.jsonl", '{"text": "b"}\n')
    write("root/a.jsonl", '{"text": "a"}\n')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked.jsonl").symlink_to(named)
    (tmp_path / "link.jsonl").symlink_to(named)
    (tmp_path / "root-too").symlink_to(tmp_path / "root")
    root, unread = tmp_path / "root", Counter[str]()
    again = (named, tmp_path / "link.jsonl", tmp_path / "other", root, tmp_path / "root-too")
    assert read(*again, unread=unread) == ["b", "a"]
    assert unread == {"files named or linked twice": 5}
    assert read(root, named, named) == ["a", "b"]


@pytest.mark.parametrize("extension", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_archives_of_no_bytes_are_damaged(tmp_path: Path, name: str, extension: str) -> None:
    (tmp_path / f"{name}{extension}").touch()
    for path in (tmp_path, tmp_path / f"{name}{extension}"):
        with pytest.raises(ValueError, match=r"cannot be read \(an archive of 0 bytes\): repair"):
            read(path)


def test_a_folder_that_cannot_be_searched_is_named(tmp_path: Path, write: Write) -> None:
    write("a.jsonl")
    with pytest.raises(ValueError, match=r"--input .*gone cannot be searched"):
        sources._entries(tmp_path / "gone")


def test_frames_and_streams_follow_each_other(tmp_path: Path) -> None:
    first, second = LINES.encode(), LINES.replace("o", "ö").encode()
    compress: Any = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lambda content: lzma.compress(content) + bytes(8),  # padding, as the format allows
        ".zst": zstandard.ZstdCompressor().compress,
    }
    expected = TEXTS + [text.replace("o", "ö") for text in TEXTS]
    for extension, packed in compress.items():
        path = tmp_path / f"a.jsonl{extension}"
        path.write_bytes(packed(first) + packed(second))
        assert read(path) == expected
        # Damage behind the first stream is no end.
        path.write_bytes(packed(first) + b"no stream")
        with pytest.raises(ValueError, match=rf"a\.jsonl\{extension} cannot be read"):
            read(path)


def test_zstandard_windows_of_every_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    for bits in (28, 31):
        parameters = zstandard.ZstdCompressionParameters(window_log=bits, enable_ldm=False)
        packer = zstandard.ZstdCompressor(compression_params=parameters)
        stream = packer.compressobj()  # of unknown size, as in a pipe
        path.write_bytes(stream.compress(LINES.encode()) + stream.flush())
        assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << bits
        assert read(path) == TEXTS
    content = bytearray(path.read_bytes())
    content[5] = 32 - 10 << 3  # the exponent of the window in the header of the frame
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"its window is 2\^32 bytes, .*--long"):
        read(path)


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, "1e99999", "NaN"])
def test_unrelated_numbers_may_be_long(write: Write, number: str) -> None:
    line = f'{{"n": [{number}], "text": "x"}}\n'
    assert read(write("a.jsonl", line)) == read(write("a.json", line)) == ["x"]
