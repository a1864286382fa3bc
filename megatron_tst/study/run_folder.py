"""The folder of one run of a study: what was asked, how it stands, its log."""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from megatron_tst.common.atomic_files import write_json
from megatron_tst.common.errors import read_json_object

State = Literal["waiting", "running", "finished", "diverged", "failed"]
ENDED: tuple[State, ...] = ("finished", "diverged")

_RECORD = "run.json"
_TRACKER = "latest_checkpointed_iteration.txt"
_STEP = re.compile(rb"iteration +(\d+)/ *\d+ .*?lm loss: (\S+)")
_STEP_TIME = re.compile(rb"elapsed time per iteration \(ms\): (\S+)")
_VALIDATION = re.compile(rb"validation loss at iteration (\d+) .*?lm loss value: (\S+)")
# Megatron's guard against losses and gradients that are no numbers, as failures.py repeats it.
_NOT_FINITE = re.compile(rb"^error: rank .*\b(nan|inf)\b", re.I | re.M)
_LAST_WORDS = re.compile(rb"^(?:error|ended): .*", re.M)


@dataclass
class LogReader:
    """What the log of a run has said so far; reads only what is new.

    Attributes:
        path: of the log.
        step: the last that was logged.
        loss: training loss there.
        validation: last validation loss.
        step_seconds: time of a step in each interval between two lines of the log.
    """

    path: Path
    step: int = 0
    loss: float | None = None
    validation: float | None = None
    step_seconds: list[float] = field(default_factory=list)
    _offset: int = 0

    def begin_attempt(self, step: int) -> None:
        """Passes over what earlier attempts have said; the next goes on from ``step``."""
        self.poll()
        self.step = step
        self.step_seconds.clear()

    def poll(self) -> None:
        """Reads on."""
        if not self.path.exists():
            return
        with self.path.open("rb") as log:
            log.seek(self._offset)
            news = log.read()
        # The last line may still be written.
        news = news[: news.rfind(b"\n") + 1]
        self._offset += len(news)
        if steps := _STEP.findall(news):
            self.step, self.loss = int(steps[-1][0]), _float(steps[-1][1])
        self.step_seconds += [_float(time) / 1e3 for time in _STEP_TIME.findall(news)]
        if validations := _VALIDATION.findall(news):
            self.step = max(self.step, int(validations[-1][0]))
            self.validation = _float(validations[-1][1])


def _float(text: bytes) -> float:
    return float(text.decode())


@dataclass(frozen=True)
class RunFolder:
    """Where a run of a study lives.

    Attributes:
        path: its folder.
    """

    path: Path

    @property
    def log(self) -> Path:
        """Everything that the run printed, all attempts."""
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``--save``."""
        return self.path / "checkpoints"

    def checkpoint_step(self) -> int:
        """Steps of the newest checkpoint, from which the next attempt goes on; 0 without one."""
        try:
            return int((self.checkpoints / _TRACKER).read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def outputs(self, keeps_checkpoints: bool) -> list[str]:
        """Megatron's arguments for the paths it writes."""
        paths = {
            "--tensorboard-dir": self.path / "tensorboard",
            "--data-cache-path": self.path / "cache",
        }
        if keeps_checkpoints:
            paths |= {"--save": self.checkpoints, "--load": self.checkpoints}
        return [part for name, path in paths.items() for part in (name, str(path))]

    def state(self) -> State:
        """How the run stands, by its record; one that broke off is waiting again."""
        return self.record().get("state", "waiting")

    def record(self) -> dict[str, Any]:
        """The content of ``run.json``; empty before the first attempt.

        Raises:
            UsageError: the file is damaged.
        """
        path = self.path / _RECORD
        if not path.exists():
            return {}
        return read_json_object(path, f"remove {self.path}")

    def write_record(self, **content: Any) -> None:
        """Replaces ``run.json``."""
        write_json(self.path / _RECORD, content)

    def begin(self) -> None:
        """Clears what an attempt without checkpoints left, so that its scalars do not mix in."""
        if not (self.checkpoints / _TRACKER).exists():
            for name in ("tensorboard", "cache", "checkpoints"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            self.log.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)

    def has_diverged(self) -> bool:
        """Whether the last attempt ended by a loss or gradient that is no number."""
        last_words = _LAST_WORDS.findall(self._log_tail())
        return any(_NOT_FINITE.search(line) for line in last_words)

    def last_words(self) -> str:
        """The line of the log that says why the run ended, or its last."""
        tail = self._log_tail()
        found = _LAST_WORDS.findall(tail) or tail.strip().splitlines() or [b"no output"]
        return bytes(found[-1]).decode(errors="replace").strip()

    def _log_tail(self) -> bytes:
        if not self.log.exists():
            return b""
        with self.log.open("rb") as log:
            log.seek(max(self.log.stat().st_size - 65536, 0))
            return log.read()

    @contextmanager
    def lock(self) -> Iterator[IO[bytes]]:
        """Holds the folder; a process that inherits the file holds it until it ends as well.

        Raises:
            BlockingIOError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with lock_file(self.path / "lock") as file:
            yield file


@contextmanager
def lock_file(path: Path) -> Iterator[IO[bytes]]:
    """Holds an exclusive lock.

    Raises:
        BlockingIOError: another process holds it.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
