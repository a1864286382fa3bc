import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_a_link_stays_and_the_folder_behind_it_is_replaced(tmp_path):
    link, real = tmp_path / "link", tmp_path / "disk" / "real"
    link.symlink_to(real)
    for content in ("old", "new"):
        with replacing_folder(link) as temporary:
            (temporary / content).write_text(content)
    assert link.is_symlink()
    assert _names(real) == ["new"]
    assert (_names(tmp_path), _names(real.parent)) == (["disk", "link"], ["real"])


# Of the way to the disk, of taking the place, and of removing what was there.
_STEPS = ("fsync", "replace", "unlink")


def _replace_interrupted(folder: Path, at: int, number: int, monkeypatch) -> bool:
    """Sends a signal behind the call ``at`` of the system; returns whether it came."""
    calls = 0

    def interrupting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            result = real(*args, **kwargs)
            calls += 1
            if calls == at + 1:
                os.kill(os.getpid(), number)
            return result

        return call

    with monkeypatch.context() as patched:
        for name in _STEPS:
            patched.setattr(os, name, interrupting(getattr(os, name)))
        try:
            with replacing_folder(folder) as temporary:
                for name in ("a", "b"):
                    (temporary / name).write_text("new")
        except (KeyboardInterrupt, SystemExit):
            return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_there", [True, False])
def test_an_interrupt_at_any_moment_leaves_one_whole_folder(
    tmp_path, monkeypatch, number, is_there
):
    def leave(*_: object) -> None:
        raise SystemExit(143)

    handlers: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: leave}
    before = signal.signal(number, handlers[number])
    # Until the signal comes no more.
    was_interrupted, at, found = True, 0, []
    try:
        while was_interrupted:
            place = tmp_path / str(at)
            place.mkdir()
            if is_there:
                (place / "folder").mkdir()
                for name in ("a", "b"):
                    (place / "folder" / name).write_text("old")
            was_interrupted = _replace_interrupted(place / "folder", at, number, monkeypatch)
            folders = [_names(path) for path in place.iterdir()]
            texts = {file.read_text() for file in place.glob("folder/*")}
            found.append((_names(place), folders, texts))
            at += 1
    finally:
        signal.signal(number, before)
    old = (["folder"], [["a", "b"]], {"old"}) if is_there else ([], [], set())
    new = (["folder"], [["a", "b"]], {"new"})
    changed = found.index(new)
    assert found == [old] * changed + [new] * (len(found) - changed)
    # Each file and folder on its way to the disk, the renames and the folder that they are in.
    assert changed >= 3 + 1 + is_there + 1


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
