"""What a check of a launch found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One sentence on a launch.

    Attributes:
        level: error: the run would not start, not fit, or not do what its arguments say; warning:
            legal, and probably not intended; note: what was assumed.
        text: names the argument, its value and the remedy.
    """

    level: Level
    text: str


def error(text: str) -> Finding:
    """A finding because of which the run must not be launched."""
    return Finding("error", text)


def warning(text: str) -> Finding:
    """A finding that somebody should look at."""
    return Finding("warning", text)


def note(text: str) -> Finding:
    """An assumption."""
    return Finding("note", text)
