"""Stands for a launcher on PATH: records a training command and ends the script that called it.

It runs in a process of its own, without torch. What starts nothing runs as it would by itself, and
keeps the stand-ins in front of its PATH. What would start something else is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_tst.common.platform import CONNECTIONS
from megatron_tst.preflight.launch_words import find_program
from megatron_tst.preflight.launchers import (
    PYTHONS,
    QUERIES,
    SHELLS,
    is_parallel,
    is_question_to_python,
    stand_ins,
    started_command,
    starts_something,
)

# What Megatron looks at.
_RECORDED_VARIABLES = (CONNECTIONS,)
_BEHIND = "MEGATRON_TST_PREFLIGHT_BEHIND"
_RUNNING = "MEGATRON_TST_PREFLIGHT_RUNNING"
# The rank as which a command behind a launcher is read.
_FIRST_RANK = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
)


def main(folder: str, name: str, arguments: Sequence[str]) -> NoReturn:
    """Acts as the command ``name``.

    Args:
        folder: has ``bin`` with the stand-ins and ``session`` with that of the script, and gets
            ``record.json``.
        name: of the command, or its path where the script calls it by one.
        arguments: of the command.
    """
    _StandIn(Path(folder)).act(name, arguments)


class _StandIn:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bin = str(folder / "bin")

    def act(self, name: str, arguments: Sequence[str]) -> NoReturn:
        kind = Path(name).name
        behind = os.environ.get(_BEHIND)
        if find_program([kind, *arguments]) is not None:
            self._record([kind, *arguments], is_refused=False)
        if is_parallel(kind):
            self._act_behind(kind, arguments)
        is_unknown = kind in PYTHONS and behind is not None and not is_question_to_python(arguments)
        if is_unknown or starts_something(kind, arguments):
            self._record([name, *arguments], is_refused=True)
        self._run(name, arguments)

    def _act_behind(self, launcher: str, arguments: Sequence[str]) -> NoReturn:
        """What the launcher would start on every node is read here, if a shell reads it."""
        line = [launcher, *arguments]
        command = _without_assignments(started_command(launcher, arguments))
        kind = Path(command[0]).name if command else ""
        os.environ.setdefault(_BEHIND, shlex.join(line))
        for variable in _FIRST_RANK:
            os.environ.setdefault(variable, "0")
        if kind in QUERIES:
            if shutil.which(command[0]) is None:
                sys.exit(0)
        elif kind in stand_ins():
            self.act(command[0], command[1:])
        elif not _is_shell_command(command):
            self._record(line, is_refused=True)
        self._run(command[0], command[1:])

    def _run(self, name: str, arguments: Sequence[str]) -> NoReturn:
        others = [p for p in os.environ.get("PATH", os.defpath).split(os.pathsep) if p != self._bin]
        # A shim such as pyenv's, which runs the next of its name on PATH, in the same process.
        is_shim = os.environ.get(_RUNNING) == f"{os.getpid()} {name}"
        os.environ[_RUNNING] = f"{os.getpid()} {name}"
        os.environ["PATH"] = os.pathsep.join(others if is_shim else [self._bin, *others])
        found = shutil.which(name, path=os.pathsep.join(others))
        if found is None:
            print(f"{name}: command not found", file=sys.stderr)
            sys.exit(127)
        # Python finds its packages by this path.
        os.execv(found, [found, *arguments])

    def _record(self, command: Sequence[str], *, is_refused: bool) -> NoReturn:
        environment = {n: os.environ[n] for n in _RECORDED_VARIABLES if n in os.environ}
        record = {
            "command": list(command),
            "behind": os.environ.get(_BEHIND),
            "is_refused": is_refused,
            "environment": environment,
        }
        own = self._folder / f"record.{os.getpid()}"
        own.write_text(json.dumps(record), encoding="utf-8", errors="surrogateescape")
        # The first one stays.
        with contextlib.suppress(FileExistsError):
            os.link(own, self._folder / "record.json")
        # The script does not go on behind its launch. It may have started this in another session.
        end_session(int((self._folder / "session").read_text(encoding="utf-8")))
        end_session(os.getsid(0))
        os._exit(1)


def processes_of(session: int) -> list[int]:
    """The processes of a session, but for the one that calls."""
    found = []
    for pid in [session, *(int(entry.name) for entry in Path("/proc").glob("[0-9]*"))]:
        with contextlib.suppress(OSError):
            if pid != os.getpid() and os.getsid(pid) == session:
                found.append(pid)
    return found


def end_session(session: int) -> None:
    """Kills them."""
    for pid in processes_of(session):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _without_assignments(command: list[str]) -> list[str]:
    """The command behind ``env NAME=value``, which are set here."""
    if command[:1] != ["env"]:
        return command
    for place, word in enumerate(command[1:], start=1):
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            return command[place:]
        os.environ[name] = value
    return command[:1]


def _is_shell_command(command: Sequence[str]) -> bool:
    """Whether a shell would read it here: a text, its input, or a script that is there."""
    if not command:
        return False
    if Path(command[0]).name not in SHELLS:
        return _is_shell_script(command[0])
    options = list(itertools.takewhile(lambda word: word.startswith(("-", "+")), command[1:]))
    script = command[1 + len(options) :]
    is_text = any(re.fullmatch("-[a-z]*c", option) for option in options)
    return is_text or not script or os.path.isfile(script[0])


def _is_shell_script(path: str) -> bool:
    found = shutil.which(path)
    if found is None:
        return False
    with open(found, "rb") as file:
        first = file.readline(200)
    words = first.removeprefix(b"#!").split()
    names = {os.path.basename(word.decode(errors="replace")) for word in words}
    return first.startswith(b"#!") and bool(names & SHELLS)
