"""Files and folders that appear whole or not at all, and outlive a failure of the machine."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# Of file systems that cannot do it for a folder.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a file, and its folder where there is none; text in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Writes a file of JSON; ``default`` is that of :func:`json.dumps`."""
    write_file(path, json.dumps(content, indent=1, default=default) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside ``path`` for a file that takes its place at the end.

    Where the body fails, ``path`` stays as it was and nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "writing")
    try:
        yield temporary
        move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``path`` that takes its place at the end.

    Where the body fails or is interrupted, ``path`` stays as it was and nothing is left. What a
    link points to is what is replaced.
    """
    path = path.resolve()
    with temporary_folder(path, "writing") as temporary:
        yield temporary
        _replace_folder(temporary, path)


@contextmanager
def temporary_folder(path: Path, what: str) -> Iterator[Path]:
    """Gives an empty folder beside ``path``, whose name says what for; it is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, what)
    try:
        # In here, so that it is removed where an interruption comes right behind it.
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move(source: Path, target: Path) -> None:
    """Renames a file, or a folder with all files in it, once its content is on the disk.

    Both are on one file system. A file that is there is replaced, and a folder if it is empty.
    """
    _sync_all(source)
    os.replace(source, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Returns once what is in a file or folder would survive a failure of the machine."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(opened)


def flush(file: IO[bytes]) -> None:
    """Returns once what was written so far would survive a failure of the machine."""
    file.flush()
    os.fsync(file.fileno())


def _beside(path: Path, what: str) -> Path:
    # Not the number of the process: other nodes have the same ones.
    return path.with_name(f".{path.name}.{what}-{secrets.token_hex(4)}")


def _sync_all(path: Path) -> None:
    for part in (path, *path.rglob("*")):
        sync(part)


def _replace_folder(temporary: Path, path: Path) -> None:
    # While everything is in its place: it can take minutes.
    _sync_all(temporary)
    # A folder that holds something cannot be replaced in one step: it steps aside, and goes last.
    old, steps_aside = _beside(path, "old"), path.exists()
    try:
        if steps_aside:
            os.replace(path, old)
        os.replace(temporary, path)
        sync(path.parent)
    # Of an interrupt too.
    except BaseException:
        is_placed = path.exists() and old.exists() == steps_aside
        if is_placed and not temporary.exists():
            os.replace(path, temporary)
        if old.exists():
            os.replace(old, path)
        raise
    _remove_whole(old)


def _remove_whole(folder: Path) -> None:
    """Removes a folder, if there is one, and leaves no half of it to an interrupt."""
    if not folder.is_dir():
        return
    try:
        shutil.rmtree(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
