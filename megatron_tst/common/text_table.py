"""Tables for people to read, as Markdown or (in ``page``) as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Text in rows.

    Attributes:
        header: a name for each column.
        rows: as many cells each.
        marked: for each row whether it stands out; empty if none does.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[bool] = ()

    def markdown(self) -> str:
        """The table in GitHub's Markdown, ending with a line break."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        rows = ([cell.replace("|", r"\|") for cell in row] for row in (self.header, *self.rows))
        head, *body = (f"| {' | '.join(row)} |\n" for row in rows)
        return "".join([head, f"| {' | '.join(rule)} |\n", *body])
