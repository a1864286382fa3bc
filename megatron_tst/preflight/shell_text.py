"""Text that a shell would read, as words."""

from __future__ import annotations

import re
import shlex

_WORD_START = r"(?<![^\s;|&()<>])"
_PIECE = re.compile(
    rf"""
    (?P<kept> '[^']*' | \$\( | \\[^\r\n] )
    | (?P<quoted> "(?:\\.|[^"\\])*" )
    | (?P<joined> \\\r?\n )
    | (?P<comment> {_WORD_START}\#[^\n]* )
    | (?P<descriptor> {_WORD_START}\d+(?=[<>]) )
    | (?P<operator> [;|&()<>]+ | \n )
    """,
    re.VERBOSE | re.DOTALL,
)
# Stands before an operator, which a quoted word of the same characters is not.
_MARK = "\0"
_REDIRECTIONS = {"<", ">", ">>", ">|", ">&", "<&", "<>", "&>", "&>>", "<<", "<<-", "<<<"}


def join_lines(text: str) -> str:
    """The text without backslashes at the ends of lines, as a shell joins them."""
    return _PIECE.sub(lambda piece: _joined(piece), text)


def split_words(text: str) -> list[str]:
    """The words of a text that is no command: lines do not matter, nor do operators.

    Raises:
        ValueError: a quotation has no end.
    """
    return shlex.split(_PIECE.sub(lambda piece: _joined(piece, comment=""), text))


def split_commands(text: str) -> list[list[str]]:
    """The simple commands of a text, without redirections; nothing is expanded.

    Raises:
        ValueError: a quotation has no end.
    """
    commands: list[list[str]] = [[]]
    is_target = False
    for word in shlex.split(_PIECE.sub(_marked, text)):
        if word.startswith(_MARK):
            is_target = word.removeprefix(_MARK) in _REDIRECTIONS
            if not is_target:
                commands.append([])
        elif is_target:
            is_target = False
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def _joined(piece: re.Match[str], comment: str | None = None) -> str:
    if piece["joined"]:
        return ""
    if piece["quoted"]:
        return re.sub(r"\\\r?\n", "", piece[0])
    return comment if piece["comment"] and comment is not None else piece[0]


def _marked(piece: re.Match[str]) -> str:
    if piece["operator"]:
        return f" {_MARK}{piece[0].strip() or ';'} "
    return "" if piece["descriptor"] else _joined(piece, comment="")
