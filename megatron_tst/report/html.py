"""Writes a comparison as one HTML file that needs no network, and its plots as files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_tst.common.atomic_files import write_file
from megatron_tst.report import cautions, page, report_tables, wording
from megatron_tst.report.comparison import Study
from megatron_tst.report.decomposition import gains_of
from megatron_tst.report.drawing import Plot
from megatron_tst.report.plots import prefixes, render_plots
from megatron_tst.report.precision import precision_sentence
from megatron_tst.report.results import RunResult

TITLE = "Token superposition against baseline"
_SHOWN_COMMANDS = 4
_CURVES_NOTE = (
    "Read from linearly interpolated validation curves where they first come down to the target. A "
    "curve read before the end of its run has not had its learning-rate decay: the arm that is "
    "read early would have got there sooner in a run planned for that length. Finished baselines "
    "of several lengths have no such flaw; their final losses are interpolated over the logarithm "
    "of the length. A range lies between validations too far apart to tell more."
)
_NUMBERS_NOTE = (
    "Means over seeds, with half of the 95% interval (Student's t) where there are several. A gap "
    "is the loss of the baseline minus that of TST, paired by seed; it is undecided where its "
    "interval holds zero, and fewer than three seeds decide nothing. Diverged runs are in no mean."
)
_RESULTS_NOTE = "What several seeds say, with intervals, and how much of a gain is the decay"
_GAINS_NOTE = (
    "A longer baseline is read where TST ends, before its own learning rate has decayed. The "
    "control, a finished baseline of the length of TST, gains on it by its decay alone; what TST "
    "gains on the control are the bags. Both parts add up to the gain, seed by seed."
)


def write_report(
    studies: Sequence[Study],
    output: Path,
    sample_text: str | None = None,
    figures: Path | None = None,
    note: str | None = None,
    results_page: Path | None = None,
) -> list[Path]:
    """Writes ``output`` and its plots.

    Args:
        studies: what to report, a section each.
        output: path of the HTML file.
        sample_text: text that the trained model generated.
        figures: folder for ``<plot>.png`` and ``<plot>.pdf``; by default the plots lie next to the
            page as ``<stem>-<plot>.png``.
        note: what a reader must know of all runs, on top of the page.
        results_page: what runs of several seeds say, to be linked; None for no link.

    Returns:
        The files written, the report first. Each appears whole or not at all.
    """
    plots = [render_plots(*one) for one in zip(studies, prefixes(studies), strict=True)]
    address = None
    if results_page is not None:
        address = Path(os.path.relpath(results_page, output.parent)).as_posix()
    files = {output: report_html(studies, plots, sample_text, note, address).encode()}
    for plot in (plot for of_study in plots for plot in of_study):
        if figures is None:
            files[output.with_name(f"{output.stem}-{plot.name}.png")] = plot.png
        else:
            files[figures / f"{plot.name}.png"] = plot.png
            files[figures / f"{plot.name}.pdf"] = plot.pdf
    for path, content in files.items():
        write_file(path, content)
    return list(files)


def report_html(
    studies: Sequence[Study],
    plots: Sequence[Sequence[Plot]],
    sample_text: str | None = None,
    note: str | None = None,
    results_page: str | None = None,
) -> str:
    """The page: for each study its verdict, cautions, numbers, plots, settings and origin."""
    parts = [f"<h1>{TITLE}</h1>"]
    if note is not None:
        parts.append(page.bullets([note]))
    if results_page is not None:
        parts.append(page.link(_RESULTS_NOTE, results_page))
    if len(studies) > 1:
        names = [study.name for study in studies]
        parts.append(
            page.note(
                "Losses of different models, corpora, tokenizers or validation sets cannot be "
                "compared; the runs are of these kinds, with a section each:"
            )
        )
        parts.append(page.bullets(names))
    for study, drawn in zip(studies, plots, strict=True):
        parts += _study(study, drawn, level=2 if len(studies) == 1 else 3)
    if sample_text is not None:
        parts += ["<h2>Generated sample</h2>", page.preformatted(sample_text)]
    return page.document(TITLE, parts)


def _study(study: Study, plots: Sequence[Plot], level: int) -> list[str]:
    def heading(text: str) -> str:
        return f"<h{level}>{escape(text)}</h{level}>"

    name = f"<h2>{escape(study.name)}</h2>" if level > 2 else page.note(f"{study.name}.")
    precision = precision_sentence(run for group in study.groups for run in group.runs)
    parts = [
        name,
        page.note(precision),
        page.verdict_box(wording.verdict(study)),
        page.bullets(cautions.cautions(study)),
        heading("The numbers"),
        page.note(_NUMBERS_NOTE),
        page.table(report_tables.groups_table(study.groups)),
    ]
    if study.matchups:
        parts += [
            heading("TST against the baseline"),
            page.table(report_tables.matchups_table(study.matchups)),
        ]
    if gains := gains_of(study):
        parts += [
            heading("What is the decay, and what are the bags"),
            page.note(_GAINS_NOTE),
            page.table(report_tables.gains_table(gains)),
        ]
    parts += _pair_tables(study, heading("At equal cost"), heading("At equal loss"))
    if plots:
        curves_note = "Loss axes leave out the drop over the first 5% of the run."
        parts += [heading("Plots"), page.note(curves_note), *map(page.figure, plots)]
    settings_note, settings = report_tables.settings_table(study)
    return [
        *parts,
        heading("Settings"),
        page.note(settings_note),
        page.table(settings),
        heading("Origin"),
        *_origin(study),
    ]


def _pair_tables(study: Study, cost_heading: str, loss_heading: str) -> list[str]:
    """The readings of a single pair in full."""
    if len(study.ranked) != 1 or len(study.ranked[0].pairs) != 1:
        return [page.note(_CURVES_NOTE)] if study.ranked else []
    matchup = study.ranked[0]
    pair, with_time = matchup.pairs[0], matchup.times_are_comparable
    return [
        cost_heading,
        page.table(report_tables.equal_budget_table(pair, with_time)),
        loss_heading,
        page.note(_CURVES_NOTE),
        page.table(report_tables.equal_loss_table(pair, with_time)),
    ]


def _origin(study: Study) -> list[str]:
    runs = [run for group in study.groups for run in group.runs]
    return [
        page.table(report_tables.data_table(runs[0])),
        page.folded(f"All runs ({len(runs)})", page.table(report_tables.runs_table(study.groups))),
        *_commands(runs),
    ]


def _commands(runs: Sequence[RunResult]) -> list[str]:
    known = [run for run in runs if run.command]
    if len(known) > _SHOWN_COMMANDS:
        return []
    return [
        f"<p>Command of {escape(run.name)}:</p>{page.preformatted(run.command)}" for run in known
    ]
