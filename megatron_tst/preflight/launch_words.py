"""Which words of a command are the program that trains, and which its arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from megatron_tst.preflight.shell_text import split_commands

_SCRIPT = re.compile(r"[^:,=]*pretrain[^/:,=\s]*\.py")
_MODULE = re.compile(r"[\w.]*pretrain\w*")
_MODULE_FLAG = re.compile(r"-[a-zA-Z]*m|--module")
# python -mpackage.pretrain
_JOINED_MODULE = re.compile(r"-[a-zA-Z]*m[\w.]*\.pretrain\w*")
# sh -c, bash -lc, sbatch --wrap
_TEXT_FLAG = re.compile(r"-[a-zA-Z]*c|--wrap")
# What follows the host is put together and read by a shell there.
_REMOTE_SHELLS = {"ssh", "pdsh", "clush"}


@dataclass(frozen=True)
class Program:
    """A program that trains, in a command.

    Attributes:
        before: the words up to its arguments.
        arguments: what it is given.
    """

    before: list[str]
    arguments: list[str]


def find_program(command: Sequence[str]) -> Program | None:
    """The first program named pretrain: ``pretrain_gpt.py``, ``-m x.pretrain``, ``tst pretrain``.

    Values of a launcher's options are none. The text behind ``-c`` is read as a shell reads it,
    up to the end of the command that has the program.
    """
    is_remote = any(PurePath(word).name in _REMOTE_SHELLS for word in command[:1])
    previous = ""
    for place, word in enumerate(command):
        text = word if _TEXT_FLAG.fullmatch(previous) else None
        if word.startswith("--wrap="):
            text = word.removeprefix("--wrap=")
        if is_remote and place and re.search(r"\s", word):
            text = word
        if text is not None:
            inside = _find_in_text(text)
            if inside is not None:
                return Program([*command[:place], *inside.before], inside.arguments)
        elif _is_program(previous, word):
            return Program(list(command[: place + 1]), list(command[place + 1 :]))
        previous = word
    return None


def _find_in_text(text: str) -> Program | None:
    try:
        commands = split_commands(text)
    except ValueError:
        return None
    return find_in_commands(commands)


def find_in_commands(commands: Sequence[Sequence[str]]) -> Program | None:
    """That of the first command that has one, with all words before it."""
    before: list[str] = []
    for command in commands:
        found = find_program(command)
        if found is not None:
            return Program(before + found.before, found.arguments)
        before += command
    return None


def _is_program(previous: str, word: str) -> bool:
    if word.startswith("-"):
        return bool(_JOINED_MODULE.fullmatch(word))
    if _MODULE_FLAG.fullmatch(previous) and _MODULE.fullmatch(word):
        return True
    if word == "pretrain":
        return PurePath(previous).name == "tst"
    # A path may have spaces; a text that is no word of its own does not begin as one.
    is_one_word = not re.search(r"\s", word) or word.startswith(("/", "."))
    return is_one_word and bool(_SCRIPT.fullmatch(word))
