"""Writes the tables of a comparison as Markdown, for documents beside the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_tst.common.atomic_files import write_file
from megatron_tst.report import cautions, report_tables, wording
from megatron_tst.report.comparison import Study
from megatron_tst.report.decomposition import gains_of


def write_tables(studies: Sequence[Study], output: Path) -> None:
    """Writes a section for each study. The file appears whole or not at all."""
    write_file(output, "\n".join(map(_section, studies)).encode())


def _section(study: Study) -> str:
    parts = [f"# {study.name}\n", *(f"{sentence}\n" for sentence in wording.verdict(study))]
    parts.append("".join(f"- {caution}\n" for caution in cautions.cautions(study)))
    parts.append(report_tables.groups_table(study.groups).markdown())
    if study.matchups:
        parts.append(report_tables.matchups_table(study.matchups).markdown())
    if gains := gains_of(study):
        parts.append(report_tables.gains_table(gains).markdown())
    return "\n".join(parts)
