import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tst.common.atomic_files import (
    move,
    replacing,
    replacing_folder,
    write_file,
    write_json,
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _write_half(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError


def test_a_file_takes_the_place_of_another_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "new" / "file.json"
    write_file(target, "old")
    write_json(target, {"ü": 1})
    assert target.read_text(encoding="utf-8") == '{\n "\\u00fc": 1\n}\n'
    assert _names(target.parent) == ["file.json"]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file", tmp_path / "folder" / "inner"):
        path.write_text("old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", object())
    with pytest.raises(RuntimeError), replacing(tmp_path / "file") as temporary:
        _write_half(temporary)
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "folder") as temporary:
        _write_half(temporary / "half")
    assert (tmp_path / "file").read_text() == "old"
    assert _names(tmp_path) == ["file", "folder"]
    assert _names(tmp_path / "folder") == ["inner"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    for content in ("old", "new"):
        with replacing_folder(tmp_path / "folder") as temporary:
            (temporary / content).write_text(content)
    assert _names(tmp_path) == ["folder"]
    assert _names(tmp_path / "folder") == ["new"]


def test_content_is_on_the_disk_before_the_name_and_the_name_after_it(tmp_path, monkeypatch):
    done = []

    def spy(name, real):
        def call(first, *rest):
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first
            done.append((name, Path(path).name))
            return real(first, *rest)

        monkeypatch.setattr(os, name, call)

    spy("fsync", os.fsync)
    spy("replace", os.replace)
    staged = tmp_path / "staged"
    (staged / "inner").mkdir(parents=True)
    (staged / "inner" / "file").write_text("text")
    move(staged, tmp_path / "target")
    synced = [("fsync", "staged"), ("fsync", "inner"), ("fsync", "file")]
    assert done == [*synced, ("replace", "staged"), ("fsync", tmp_path.name)]


def test_many_processes_write_one_file(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from megatron_tst.common.atomic_files import write_file\n"
        "for _ in range(50): write_file(Path(sys.argv[1]), sys.argv[2] * 100_000)\n"
    )
    target = tmp_path / "file"
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(target), letter]) for letter in "abc"
    ]
    while any(writer.poll() is None for writer in writers):
        if target.exists():
            content = target.read_text()
            assert len(content) == 100_000
            assert len(set(content)) == 1
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert _names(tmp_path) == ["file"]
