"""Keeps the numbers of docs/results/origins.md those of their rows and columns in its tables.

A number stands before a comment that says which cell of origins-tables.md it is, as in
``+0.0195 ± 0.0290<!--By position; 65 to 128; s = 2 ahead by-->``: heading, row and column. Of the
moments the row is an arm and a tensor, with a comma. ``python -m tests.origins_page`` writes each
anew, and a test compares. Other comments:

- ``row TABLE; ROW; COLUMN + COLUMN`` in the first cell of a row of the page: the cells behind it;
- ``least TABLE; ARM; COLUMN`` and ``most``: over all tensors of an arm;
- ``must zero TABLE; ROW; COLUMN``: words that the interval holds zero, ``must off`` that it leaves
  it out; ROW may be ``each``. Nothing is written where it is so, and "not so" where not;
- ``results`` and a comment of :mod:`tests.results_page`: of the studies, not of these tables.
"""

from __future__ import annotations

import re
from functools import cache

from megatron_tst.common.units import MINUS, PLUS_MINUS
from tests import results_page

FOLDER = results_page.TABLES
PAGE = FOLDER / "origins.md"
TABLES = FOLDER / "origins-tables.md"
EACH, NOT_SO = "each", "not so"

_NUMBER = rf"[+{MINUS}]?\d+(?:\.\d+)?(?: {PLUS_MINUS} [\d.]*\d| in \d+ of \d+)?"
_WORDS = "|".join([NOT_SO, *results_page.STATES])
_MARKED = re.compile(rf"(?P<value>{_NUMBER}|{_WORDS}|)<!--(?P<what>[^>]+)-->")
_ROW = re.compile(r"^(?P<first>\|[^|\n]*<!--row (?P<what>[^>]+)--> \|)(?P<cells>.*)\|$", re.M)
_UNMARKED = re.compile(rf"[+{MINUS}]?\d+\.\d{{2,}}(?: {PLUS_MINUS} [\d.]*\d)?")
_NO_RESULTS = re.compile(r"```.*?```|`[^`\n]*`|^\| (?:model|training|text) .*?$", re.S | re.M)
_CHOSEN = {"0.95"}
"""Settings."""


def refreshed(page: str) -> str:
    """The page with its numbers as the tables have them."""
    page = _ROW.sub(lambda row: f"{row['first']}{_cells(row['what'], row['cells'])}|", page)
    return _MARKED.sub(lambda found: _marked(found["what"], found["value"]), page)


def unmarked(page: str) -> list[str]:
    """Results that no comment says the place of."""
    rest = _NO_RESULTS.sub("", _MARKED.sub("", _ROW.sub("", page)))
    return [found[0] for found in _UNMARKED.finditer(rest) if found[0] not in _CHOSEN]


def told(what: str, value: str = "") -> str:
    """What stands before a comment, which has ``value`` there now."""
    kind, _, rest = what.partition(" ")
    if kind == "results":
        return results_page.told(rest)
    if kind == "row":
        return value
    if kind in ("least", "most"):
        table, arm, column = rest.split("; ")
        cells = [row[column] for name, row in _table(table).items() if name.startswith(f"{arm}, ")]
        return (min if kind == "least" else max)(cells, key=float)
    if kind == "must":
        # What stands before it is the page's.
        return ("" if value == NOT_SO else value) + ("" if _holds(rest) else NOT_SO)
    table, row, column = what.split("; ")
    return _table(table)[row][column]


def leaving_out_zero(table: str) -> set[tuple[str, str]]:
    """Rows and columns of a table whose intervals leave out zero."""
    return {
        (row, column)
        for row, cells in _table(table).items()
        for column, cell in cells.items()
        if PLUS_MINUS in cell and not _holds_zero(cell)
    }


def _holds(claim: str) -> bool:
    kind, _, rest = claim.partition(" ")
    table, row, column = rest.split("; ")
    rows = _table(table)
    cells = [each[column] for each in rows.values()] if row == EACH else [rows[row][column]]
    decided = [_holds_zero(cell) == (kind == "zero") for cell in cells if PLUS_MINUS in cell]
    return bool(decided) and all(decided)


def _holds_zero(cell: str) -> bool:
    interval = cell.replace(MINUS, "-").partition(" (")[0]
    mean, half = interval.split(f" {PLUS_MINUS} ")
    return abs(float(mean)) <= float(half)


def _cells(what: str, cells: str) -> str:
    table, row, columns = what.split("; ")
    found = [f" {_table(table)[row][column]} " for column in columns.split(" + ")]
    return "|".join([*found, *cells.split("|")[len(found) :]])


def _marked(what: str, value: str) -> str:
    return f"{told(what, value)}<!--{what}-->"


def _table(name: str) -> dict[str, dict[str, str]]:
    return tables()[name]


@cache
def tables() -> dict[str, dict[str, dict[str, str]]]:
    """Cells of origins-tables.md by heading, row and column."""
    _, *sections = TABLES.read_text().split("\n## ")
    return {section.partition("\n")[0]: _rows(section) for section in sections}


def _rows(section: str) -> dict[str, dict[str, str]]:
    head, _, *lines = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    )
    labels = 2 if head[1] == "tensor" else 1
    return {
        ", ".join(cells[:labels]): dict(zip(head[labels:], cells[labels:], strict=True))
        for cells in lines
    }


def main() -> None:
    """Writes the page anew."""
    PAGE.write_text(refreshed(PAGE.read_text()))


if __name__ == "__main__":
    main()
