"""Evaluations of one run's checkpoints, a line of JSON each, and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tst.common.atomic_files import write_file
from megatron_tst.common.errors import UsageError
from megatron_tst.evaluation.results import FORMAT, Results, cell, check_output, rows

_SAME_SETTINGS = ("tasks", "limit", "text_sha256", "window", "stride", "dtype")


class StepTable:
    """The table in a file, which is rewritten with every line: whole at any time.

    Args:
        path: file of JSON lines; it goes on where it exists.
        run: folder of the checkpoints.
        settings: of the evaluations.
        overwrite: begin a new table in the place of an existing one.

    Raises:
        UsageError: the file is something else, of another run, or was made under other settings.
    """

    def __init__(self, path: Path, run: Path, settings: Results, overwrite: bool = False) -> None:
        check_output(path, overwrite=True)
        self.path = path
        self.rows: list[Results] = [] if overwrite or not path.exists() else _read(path)
        for row in self.rows:
            _check_row(row, path, run, settings)

    @property
    def steps(self) -> set[int]:
        """The steps that were evaluated."""
        return {row["checkpoint"]["step"] for row in self.rows}

    @property
    def phases(self) -> set[int | None]:
        """The phases of which there are checkpoints."""
        return {row["checkpoint"]["phase"] for row in self.rows}

    @property
    def has_last_step(self) -> bool:
        """Whether the run has done all of its steps, by the arguments in its last checkpoint."""
        if not self.rows:
            return False
        last = self.rows[-1]["checkpoint"]
        return last["total_steps"] is not None and last["step"] >= last["total_steps"]

    def add(self, row: Results) -> None:
        """Writes a line, in the order of steps."""
        self.rows = sorted([*self.rows, row], key=lambda row: row["checkpoint"]["step"])
        write_file(self.path, "".join(f"{json.dumps(row)}\n" for row in self.rows))


def _read(path: Path) -> list[Results]:
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise _no_table(path, f"cannot be read as JSON lines ({error})") from error
    for row in found:
        if not isinstance(row, dict) or row.get("format") != FORMAT or "checkpoint" not in row:
            raise _no_table(path, "is no table of tst evaluate --follow of this version")
    return found


def _no_table(path: Path, problem: str) -> UsageError:
    return UsageError(f"--output {path} {problem}: name another file, or pass --overwrite.")


def _check_row(row: Results, path: Path, run: Path, settings: Results) -> None:
    other = Path(row["checkpoint"]["folder"]).parent
    if other != run.resolve():
        raise _no_table(path, f"is the table of another run ({other})")
    for name in _SAME_SETTINGS:
        was, now = row["settings"].get(name), settings[name]
        if was != now:
            raise _no_table(path, f"was made with {name} {was}, and this command has {now}")


def header_lines(row: Results) -> str:
    """The head of a table in Markdown, whose lines are those of :func:`table_line`."""
    names = [name for name, _ in _cells(row)]
    return "\n".join(_joined(cells) for cells in (names, ["---:"] * len(names)))


def table_line(row: Results) -> str:
    """An evaluation as a line: of each task its main metric, in per cent, and the text."""
    return _joined([content for _, content in _cells(row)])


def _cells(row: Results) -> list[tuple[str, str]]:
    saved, text = row["checkpoint"], row["text"]
    cells = [
        ("step", _count(saved["step"])),
        ("phase", _count(saved["phase"])),
        ("bag size", _count(saved["bag_size"])),
        ("tokens", _count(saved["data_tokens"])),
    ]
    if text is not None:
        cells.append(("loss of a token", f"{text['bits'] * math.log(2) / text['tokens']:.4f}"))
    tasks = set()
    for found in rows(row):
        if found.task not in tasks:
            tasks.add(found.task)
            name = f"{found.task}, {found.metric}" if found.in_percent else found.metric
            cells.append((name, cell(found.value, found.in_percent)))
    return cells


def _count(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
