"""What an unfinished preprocessing run has done so far, so that the next one can go on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_tst.common.atomic_files import flush, write_json
from megatron_tst.common.errors import UsageError, read_json_object
from megatron_tst.corpus.readers import Position
from megatron_tst.corpus.selection import Counts
from megatron_tst.corpus.sources import Source

_SETTINGS_FILE = "settings.json"
_PROGRESS_FILE = "progress.json"
_LOCK_FILE = "lock"


@dataclass(frozen=True)
class RunProgress:
    """State of the files of a partial run when they were last flushed to disk.

    Attributes:
        position: where reading goes on.
        counts: documents met so far.
        tokens: tokens written.
        left_out_bytes: size of the list of documents left out.
        is_complete: all is written, and only renaming may be missing.
    """

    position: Position = field(default_factory=Position)
    counts: Counts = field(default_factory=Counts)
    tokens: int = 0
    left_out_bytes: int = 0
    is_complete: bool = False

    @classmethod
    def of(cls, values: dict[str, Any]) -> RunProgress:
        """The inverse of ``asdict(...)`` and JSON."""
        values["position"] = Position(*values["position"])
        values["counts"] = Counts(**values["counts"])
        return cls(**values)


def fingerprint(sources: list[Source]) -> str:
    """SHA-256 of the path, size, time of change and kind of every input file, in reading order."""
    digest = hashlib.sha256()
    for source in sources:
        status = source.path.stat()
        size, time = status.st_size, status.st_mtime_ns
        line = (str(source.path.resolve()), size, time, source.from_folder, source.kind)
        digest.update(f"{json.dumps(line)}\n".encode())
    return digest.hexdigest()


class PartialRun:
    """A folder next to the outputs: ``<prefix>.partial``.

    A context: an error before the first progress was saved removes the folder, so that mistakes
    leave nothing behind; after that it stays, and the next run with the same settings goes on.

    Args:
        folder: where to write until everything is complete.
        settings: what the output depends on. A folder made with others is refused.
        start_anew: discard what is there.

    Raises:
        UsageError: the folder cannot be written, is in use, or was made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], start_anew: bool) -> None:
        self.folder = folder
        self._lock = _lock(folder)
        try:
            if start_anew:
                self._clear()
            self._check_settings(settings)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> PartialRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is not None and not (self.folder / _PROGRESS_FILE).exists():
            shutil.rmtree(self.folder)
        self._lock.close()

    def load(self) -> RunProgress:
        """The progress of the run before, or none."""
        file = self.folder / _PROGRESS_FILE
        return RunProgress.of(_read(file)) if file.exists() else RunProgress()

    def save(self, progress: RunProgress) -> None:
        """Records progress; the files it describes have been flushed to disk."""
        write_json(self.folder / _PROGRESS_FILE, asdict(progress))

    def remove(self) -> None:
        """Ends the run: its files have been moved away."""
        shutil.rmtree(self.folder)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self.folder / _SETTINGS_FILE
        if not file.exists():
            write_json(file, settings)
            return
        before = _read(file)
        if before != settings:
            changed = ", ".join(
                f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
                for name in sorted(before.keys() | settings.keys())
                if before.get(name) != settings.get(name)
            )
            raise UsageError(
                f"{self.folder} holds an interrupted run with other settings ({changed}): use "
                "those to go on with it, or pass --start-anew to discard it."
            )

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK_FILE:
                path.unlink()


class LeftOutLog:
    """List of the documents left out, one a line.

    Args:
        path: the file.
        size: bytes of it to keep; what an interrupted run wrote behind them is cut off.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._file = path.open("ab")
        self._file.truncate(size)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def add(self, lines: list[str]) -> None:
        """Appends the lines and empties the list."""
        for line in lines:
            # File names may hold anything.
            self._file.write(line.encode("utf-8", "backslashreplace").replace(b"\n", b" ") + b"\n")
        lines.clear()

    def flush_to_disk(self) -> int:
        """Returns the size, once what was added would survive a failure of the machine."""
        flush(self._file)
        return self._file.tell()


def _read(file: Path) -> dict[str, Any]:
    return read_json_object(file, "pass --start-anew to discard the interrupted run")


def _lock(folder: Path) -> IO[bytes]:
    """Makes the folder and keeps other runs out of it; the lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK_FILE).open("wb")
    except OSError as error:
        raise UsageError(
            f"--output-prefix: cannot write to {folder} ({error.strerror}); choose a prefix in a "
            "writable folder."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UsageError(
            f"{folder} is in use by another run: wait for it, or choose another --output-prefix."
        ) from error
    except OSError:
        pass  # some cluster file systems have no locks
    return lock
