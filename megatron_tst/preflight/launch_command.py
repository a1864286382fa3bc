"""The arguments that a launch script gives to Megatron, found without launching anything."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tst.common.errors import UsageError
from megatron_tst.common.platform import CONNECTIONS
from megatron_tst.preflight.launch_words import Program, find_in_commands, find_program
from megatron_tst.preflight.launchers import has_own_environment
from megatron_tst.preflight.script_run import run_script
from megatron_tst.preflight.shell_text import join_lines, split_commands, split_words

# NAME=VALUE, and the two words of MPI.
_SET_CONNECTIONS = re.compile(
    rf"(?:(?:^|[\s,=]){CONNECTIONS}=[\"']?|(?:^|\s)-g?env {CONNECTIONS} )(\w*)"
)


@dataclass(frozen=True)
class LaunchCommand:
    """A training program and what it is given.

    Attributes:
        arguments: of the program.
        environment: in which it starts, as far as Megatron looks at it; None if that is unknown.
    """

    arguments: list[str]
    environment: Mapping[str, str] | None


def read_launch(path: Path, extra: Sequence[str] = ()) -> LaunchCommand:
    """The arguments of a training run.

    A file that ends in ``.sh`` or begins with ``#!`` is run with ``DRY_RUN=1`` up to its launch,
    which :mod:`~megatron_tst.preflight.script_run` records and does not run. A script that prints
    its command under ``DRY_RUN`` is read from its last line. Any other file is read as arguments if
    it begins with one, and as a command otherwise, as a shell would read them.

    Args:
        path: script or file.
        extra: further arguments, which a script gets as its own and a file has appended.

    Raises:
        UsageError: there is no such file, the script fails or launches nothing that can be read,
            or the text is not quoted properly.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}): pass a launch script or a file of arguments."
        ) from error
    if path.suffix == ".sh" or text.startswith("#!"):
        return _read_script(path, extra)
    try:
        words = split_words(text)
        commands = split_commands(text)
    except ValueError as error:
        raise UsageError(f"{path} is not quoted as in a shell ({error}).") from error
    if not words or words[0].startswith("-"):
        return LaunchCommand([*words, *extra], None)
    found = _launch(path, find_in_commands(commands), None)
    return LaunchCommand([*found.arguments, *extra], found.environment)


def _read_script(path: Path, extra: Sequence[str]) -> LaunchCommand:
    launched = run_script(path, extra)
    if launched.command is not None:
        return _launch(path, find_program(launched.command), launched.environment)
    lines = [line for line in join_lines(launched.printed).splitlines() if line.strip()]
    try:
        words = shlex.split(lines[-1]) if lines else []
    except ValueError:
        words = []
    return _launch(path, find_program(words), None, launched.last_words)


def _launch(
    path: Path,
    program: Program | None,
    environment: Mapping[str, str] | None,
    last_words: str = "",
) -> LaunchCommand:
    if program is None:
        raise UsageError(
            f"{path} launches no program named pretrain (pretrain_gpt.py, megatron_tst.pretrain): "
            "let it call torchrun, srun or python by name, print its command under DRY_RUN=1, or "
            "pass a file with the arguments of Megatron."
            + (f" It ended with: {last_words}" if last_words else "")
        )
    for word in program.arguments:
        if "$(" in word or "`" in word:
            raise UsageError(
                f"{path}: {word} among the arguments is a command of the shell, which is not run "
                "here: write its value in its place."
            )
    given = _SET_CONNECTIONS.findall(" ".join(program.before))
    if given:
        environment = {**(environment or {}), CONNECTIONS: given[-1]}
    elif has_own_environment(program.before):
        environment = None
    return LaunchCommand(program.arguments, environment)
