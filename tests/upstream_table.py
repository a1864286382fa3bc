"""``python -m tests.upstream_table`` writes the table of upstream symbols to docs/versions.md."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from megatron_tst.common.atomic_files import write_file
from megatron_tst.upstream.symbols import SYMBOLS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "versions.md"
TITLE = "## What is extended, changed and known of Megatron\n"


def section() -> str:
    """From the first row of the table to its last."""
    lines = ["| file | how | of Megatron | why |", "|---|---|---|---|"]
    for file, symbols in groupby(SYMBOLS, key=lambda symbol: symbol.file):
        for symbol in symbols:
            names = [*symbol.parameters, *(f".{name}" for name in symbol.attributes)]
            needs = f": `{' '.join(names)}`" if names else ""
            path = symbol.path.removeprefix("megatron.")
            lines.append(f"| {file} | {symbol.use} | `{path}`{needs} | {symbol.why} |")
    return "\n".join(lines) + "\n"


def parts(text: str) -> tuple[str, str, str]:
    """The page in front of the table, the table, and what is behind it."""
    before, title, rest = text.partition(TITLE)
    introduction, start, rest = rest.partition("| file |")
    table, gap, behind = rest.partition("\n\n")
    return before + title + introduction, start + table.rstrip() + "\n", gap[1:] + behind


def main() -> None:
    before, _, behind = parts(PAGE.read_text())
    write_file(PAGE, before + section() + behind)


if __name__ == "__main__":
    main()
