"""Stands for a launcher or a Python: records a training command and ends the script that called it.

It runs in a process of its own, without torch. What starts nothing runs as it would by itself, and
keeps the stand-ins in front of its paths. What would start something else is refused.
"""

from __future__ import annotations

import contextlib
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
    as_command,
    exported_variables,
    has_own_environment,
    is_parallel,
    is_question_to_python,
    stand_ins,
    started_command,
    starts_something,
)

# What Megatron looks at.
_RECORDED_VARIABLES = (CONNECTIONS,)
_BEHIND = "MEGATRON_TST_PREFLIGHT_BEHIND"
# The process that a stand-in has looked at, and as what.
RUNNING = "MEGATRON_TST_PREFLIGHT_RUNNING"
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
        folder: has ``bin`` with the stand-ins, ``site`` with what makes a Python one, and
            ``session`` with that of the script, and gets ``record.json``.
        name: of the command, or its path where the script calls it by one.
        arguments: of the command.
    """
    _StandIn(Path(folder)).act(name, arguments)


class _StandIn:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def act(self, name: str, arguments: Sequence[str]) -> NoReturn:
        line = as_command(name, arguments)
        kind, *asked = line
        if is_parallel(kind):
            self._act_behind(kind, asked)
        if find_program(line) is not None:
            self._record(line, is_refused=False)
        is_behind = _BEHIND in os.environ
        is_unknown = kind in PYTHONS and is_behind and not is_question_to_python(asked)
        if is_unknown or starts_something(kind, asked):
            self._record(line, is_refused=True)
        self._run(name, arguments)

    def _act_behind(self, launcher: str, arguments: Sequence[str]) -> NoReturn:
        """What the launcher would start on every node is read here, if a shell reads it."""
        line = [launcher, *arguments]
        command = started_command(launcher, arguments)
        options = arguments[: len(arguments) - len(command)]
        os.environ.update(exported_variables(options))
        command = _without_assignments(command)
        kind = Path(command[0]).name if command else ""
        is_shell = kind not in stand_ins() and _is_shell_command(command)
        if is_shell:
            command = _without_login(command)
        has_program = find_program(line) is not None
        if has_program and not (is_shell and not has_own_environment(options)):
            self._record(line, is_refused=False)
        os.environ.setdefault(_BEHIND, shlex.join(line))
        for variable in _FIRST_RANK:
            os.environ.setdefault(variable, "0")
        if has_program:
            # Its text has what the shell does not come to here.
            found = self._find(command[0])
            os.spawnv(os.P_WAIT, found, [found, *command[1:]])
            self._record(line, is_refused=False)
        if kind in QUERIES:
            if shutil.which(command[0]) is None:
                sys.exit(0)
        elif kind in PYTHONS or is_parallel(kind):
            self.act(command[0], command[1:])
        elif not is_shell:
            self._record(line, is_refused=True)
        self._run(command[0], command[1:])

    def _run(self, name: str, arguments: Sequence[str]) -> NoReturn:
        found = self._find(name)
        # Python finds its packages by this path.
        os.execv(found, [found, *arguments])

    def _find(self, name: str) -> str:
        """The real program, for which the environment is made ready."""
        mark = f"{os.getpid()} {name}"
        # A shim such as pyenv's, which runs the next of its name on PATH, in the same process.
        is_shim = os.environ.get(RUNNING) == mark
        own = str(self._folder / "bin")
        paths = search_paths(self._folder)
        others = os.pathsep.join(p for p in paths["PATH"].split(os.pathsep) if p != own)
        os.environ.update(paths)
        os.environ[RUNNING] = mark
        if is_shim:
            os.environ["PATH"] = others
        found = shutil.which(name, path=others)
        if found is None:
            print(f"{name}: command not found", file=sys.stderr)
            sys.exit(127)
        return found

    def _record(self, command: Sequence[str], *, is_refused: bool) -> NoReturn:
        behind = shlex.split(os.environ.get(_BEHIND, ""))
        if is_refused and find_program(behind) is not None:
            command, is_refused = behind, False
        environment = {n: os.environ[n] for n in _RECORDED_VARIABLES if n in os.environ}
        record = {
            "command": list(command),
            "behind": os.environ.get(_BEHIND),
            "is_refused": is_refused,
            "environment": environment or (None if has_own_environment(behind) else {}),
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


def search_paths(folder: Path) -> dict[str, str]:
    """The variables by which the stand-ins are found, with what else is in them."""
    variables = {}
    for name, own, default in (("PATH", "bin", os.defpath), ("PYTHONPATH", "site", "")):
        first = str(folder / own)
        earlier = os.environ.get(name) or default
        others = [path for path in earlier.split(os.pathsep) if path != first]
        variables[name] = os.pathsep.join([first, *(others if any(others) else [])])
    return variables


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


def _without_login(command: list[str]) -> list[str]:
    """A shell that reads no profile, which would set PATH anew: ``bash -lc``."""
    option = command[1] if len(command) > 1 else ""
    if not re.fullmatch("--login|-[a-zA-Z]*l[a-zA-Z]*", option):
        return command
    kept = option.removeprefix("--login").replace("l", "")
    return [command[0], *([kept] if len(kept) > 1 else []), *command[2:]]


def _is_shell_command(command: Sequence[str]) -> bool:
    """Whether a shell would read it here: a text, its input, or a script that is there."""
    if not command:
        return False
    if Path(command[0]).name not in SHELLS:
        return _is_shell_script(command[0])
    if shutil.which(command[0]) is None:
        return False
    words = iter(command[1:])
    for word in words:
        if not word.startswith(("-", "+")):
            return os.path.isfile(word)
        if re.fullmatch("-[a-zA-Z]*c[a-zA-Z]*", word):
            return True
        # -euo pipefail
        if re.fullmatch("[-+][a-zA-Z]*[oO]", word):
            next(words, None)
    return True


def _is_shell_script(path: str) -> bool:
    found = shutil.which(path)
    if found is None:
        return False
    with open(found, "rb") as file:
        first = file.readline(200)
    words = first.removeprefix(b"#!").split()
    names = {os.path.basename(word.decode(errors="replace")) for word in words}
    return first.startswith(b"#!") and bool(names & SHELLS)
