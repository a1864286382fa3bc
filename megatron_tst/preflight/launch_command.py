"""The arguments that a launch script gives to Megatron, found without launching anything."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_tst.common.errors import UsageError

_TIMEOUT_SECONDS = 60
# Launchers, and which of their words mean training; python does other things in scripts too.
_LAUNCHERS = {
    "torchrun": "*pretrain*",
    "srun": "*pretrain*",
    "mpirun": "*pretrain*",
    "python": "*pretrain*.py|*.pretrain",
    "python3": "*pretrain*.py|*.pretrain",
    "tst": "pretrain",
}
# Stands for a launcher in front of PATH: records a training command, runs anything else.
_RECORDER = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    {pattern})
      printf '%s\\0' "$@" >{record}
      exit 0 ;;
  esac
done
PATH={path}
exec {name} "$@"
"""
# pretrain_gpt.py of Megatron-LM, or a module such as megatron_tst.pretrain.
_PROGRAM = re.compile(r"(^|/)pretrain\w*\.py$|^[\w.]*\bpretrain\w*$")


def read_launch(path: Path, extra: Sequence[str] = ()) -> list[str]:
    """The arguments of a training run.

    A file that ends in ``.sh`` or begins with ``#!`` is run with ``DRY_RUN=1``, with stand-ins for
    torchrun, srun, mpirun, python and tst in front of ``PATH`` that record a command with a program
    named pretrain and do not run it. A script that prints its command under ``DRY_RUN`` is read
    from its last line. Any other file is read as arguments, quoted as in a shell, with comments.

    Args:
        path: script or file.
        extra: further arguments, which a script gets as its own and a file has appended.

    Raises:
        UsageError: there is no such file, the script fails or launches nothing, or the text is not
            quoted properly.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}): pass a launch script or a file of arguments."
        ) from error
    if path.suffix == ".sh" or text.startswith("#!"):
        return _arguments_of(path, _command_of(path, extra))
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise UsageError(f"{path} is not quoted as in a shell ({error}).") from error
    # A whole command is taken too.
    launches = any(_PROGRAM.search(word) for word in words if not word.startswith("-"))
    return [*(_arguments_of(path, words) if launches else words), *extra]


def _command_of(script: Path, extra: Sequence[str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "command"
        for name, pattern in _LAUNCHERS.items():
            recorder = Path(folder) / name
            recorder.write_text(
                _RECORDER.format(
                    record=shlex.quote(str(record)),
                    path=shlex.quote(os.environ.get("PATH", os.defpath)),
                    name=name,
                    pattern=pattern,
                )
            )
            recorder.chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        printed = _run(script, extra, {**os.environ, "DRY_RUN": "1", "PATH": path})
        if record.exists():
            return record.read_text(encoding="utf-8", errors="replace").split("\0")[:-1]
    lines = [line for line in printed.splitlines() if line.strip()]
    try:
        return shlex.split(lines[-1]) if lines else []
    except ValueError:
        return []


def _run(script: Path, extra: Sequence[str], environment: dict[str, str]) -> str:
    try:
        done = subprocess.run(
            ["bash", str(script), *extra],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{script} did not print its command under DRY_RUN=1: {error}.") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        # Usage follows the error.
        reason = lines[0] if lines else "it printed nothing"
        raise UsageError(
            f"{script} ended with {done.returncode} under DRY_RUN=1: {reason}. Set the variables "
            "that it needs, as for a launch."
        )
    return done.stdout


def _arguments_of(path: Path, command: list[str]) -> list[str]:
    for place, word in enumerate(command):
        # srun sh -c "python pretrain_gpt.py ..."
        if any(_PROGRAM.search(part) for part in word.split()[:-1]):
            return _arguments_of(path, shlex.split(word))
        if not word.startswith("--") and _PROGRAM.search(word):
            return command[place + 1 :]
    raise UsageError(
        f"{path} launches no program named pretrain (pretrain_gpt.py, megatron_tst.pretrain): let "
        "it call torchrun, srun or python by name, print its command under DRY_RUN=1, or pass a "
        "file with the arguments of Megatron."
    )
