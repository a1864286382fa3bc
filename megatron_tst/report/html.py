"""Writes a comparison as one HTML file that needs no network, and its plots as PNG files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from math import exp
from pathlib import Path
from typing import Any

from megatron_tst.report import wording
from megatron_tst.report.comparison import ARMS, Comparison, settings_side_by_side
from megatron_tst.report.plots import Plot, render_plots
from megatron_tst.report.runs import Budget, Run

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --page: #ffffff; --line: #d1d9e0;
  --panel: #f6f8fa; --mark: #fff3c4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9aa4af; --page: #14171b;
  --line: #343b43; --panel: #1c2127; --mark: #4a3d12; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 54rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p { margin: .5rem 0; }
.dim, figcaption { color: var(--dim); font-size: .92rem; }
.verdict { border-left: 4px solid #d9601a; background: var(--panel); padding: .9rem 1.1rem;
  margin: 1.4rem 0; font-size: 1.05rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.differs td { background: var(--mark); }
tr.differs td:first-child { padding-left: .4rem; }
figure { margin: 0 0 1.6rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
pre { background: var(--panel); padding: .8rem 1rem; font-size: .82rem; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 4px; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""


def write_report(
    comparison: Comparison, output: Path, sample_text: str | None = None
) -> list[Path]:
    """Writes ``output`` and, next to it, ``<stem>-<plot>.png`` for each plot.

    Args:
        comparison: what to report.
        output: path of the HTML file.
        sample_text: text that the trained model generated.

    Returns:
        The files written, the report first. Each appears whole or not at all.
    """
    plots = render_plots(comparison)
    files = {output: report_html(comparison, plots, sample_text).encode()}
    files |= {output.with_name(f"{output.stem}-{plot.name}.png"): plot.png for plot in plots}
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(content)
        os.replace(temporary, path)
    return list(files)


def report_html(comparison: Comparison, plots: list[Plot], sample_text: str | None = None) -> str:
    """The page: verdict, cautions, numbers, plots, settings, provenance."""
    config = comparison.tst.schedule.config
    parts = [
        "<h1>Token superposition against baseline</h1>",
        f'<p class="dim">Bag size {config.bag_size}, {escape(config.variant)}, '
        f"{escape(str(config.target_weighting))} target weights; phase 1 is "
        f"{comparison.tst.schedule.switch_step} of {comparison.tst.schedule.total_steps} steps. "
        f"{wording.quantity(comparison.tst.info['parameters'])} parameters.</p>",
        _verdict(comparison),
        _list(wording.cautions(comparison)),
        "<h2>The numbers</h2>",
        _totals_table(comparison),
        "<h2>At equal cost</h2>",
        _equal_budget_table(comparison),
        "<h2>At equal loss</h2>",
        _equal_loss_table(comparison),
        "<h2>Curves</h2>",
        '<p class="dim">Loss axes leave out the drop over the first 5% of the run.</p>',
        *map(_figure, plots),
        "<h2>Settings</h2>",
        _settings_table(comparison),
        *([] if sample_text is None else ["<h2>Generated sample</h2>", _preformatted(sample_text)]),
        "<h2>Provenance</h2>",
        _provenance(comparison),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Token superposition against baseline</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _verdict(comparison: Comparison) -> str:
    headline, *others = map(escape, wording.verdict(comparison))
    paragraphs = "".join(f"<p>{sentence}</p>" for sentence in others)
    return f'<div class="verdict"><p><b>{headline}</b></p>{paragraphs}</div>'


def _totals_table(comparison: Comparison) -> str:
    baseline, tst = comparison.baseline, comparison.tst
    gap = baseline.final_loss - tst.final_loss
    rows = [
        (
            "Final validation loss (nats/token)",
            f"{baseline.final_loss:.4f}",
            f"{tst.final_loss:.4f}",
            f"gap {wording.signed(gap)}",
        ),
        (
            "Final validation perplexity",
            f"{exp(baseline.final_loss):.3f}",
            f"{exp(tst.final_loss):.3f}",
            wording.perplexity_change(gap),
        ),
        _ratio_row(
            "Equivalent tokens", wording.quantity, *_totals(comparison, "equivalent tokens")
        ),
        _ratio_row("Data tokens", wording.quantity, *_totals(comparison, "data tokens")),
        _ratio_row("Training time", wording.duration, *_totals(comparison, "seconds")),
        _ratio_row("Time per step", _milliseconds, _step_time(baseline), _step_time(tst)),
    ]
    if not tst.ended_in_superposition:
        switch, last = tst.schedule.switch_step, tst.last_step
        for name, first, end in (("phase 1", 0, switch), ("phase 2", switch, last)):
            if end > first:
                times = _step_time(baseline), _step_time(tst, first, end)
                rows.append(_ratio_row(f"Time per step, TST in {name}", _milliseconds, *times))
    return _table(("", "Baseline", "TST", "TST against baseline"), rows)


def _totals(comparison: Comparison, budget: Budget) -> list[float]:
    runs = (comparison.baseline, comparison.tst)
    return [run.spent(budget, run.last_step) for run in runs]


def _step_time(run: Run, first: int = 0, end: int | None = None) -> float:
    """Mean seconds a step over a range of steps; the whole run by default."""
    end = run.last_step if end is None else end
    return (run.spent("seconds", end) - run.spent("seconds", first)) / (end - first)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _ratio_row(
    name: str, show: Callable[[float], str], baseline: float, tst: float
) -> tuple[str, str, str, str]:
    return name, show(baseline), show(tst), f"{tst / baseline:.2f}{wording.TIMES}"


def _equal_budget_table(comparison: Comparison) -> str:
    rows = []
    for name, reading in (
        ("Equal FLOPs", comparison.equal_flops),
        ("Equal data", comparison.equal_data),
        ("Equal training time", comparison.equal_time),
    ):
        phase = " (TST in phase 1)" if reading.tst_in_superposition else ""
        rows.append(
            (
                f"{name}: {wording.amount(reading.budget, reading.amount)}{phase}",
                *(
                    "not evaluated yet" if loss is None else f"{loss:.4f}"
                    for loss in (reading.baseline_loss, reading.tst_loss)
                ),
                wording.DASH if reading.gap is None else wording.signed(reading.gap),
            )
        )
    return _table(("", "Baseline loss", "TST loss", "Gap (nats; + is TST ahead)"), rows)


def _equal_loss_table(comparison: Comparison) -> str:
    rows = []
    for reading in comparison.equal_loss:
        speed_up = reading.speed_up
        rows.append(
            (
                f"Final loss of {wording.ARM_NAMES[reading.target_of]} ({reading.target_loss:.4f})",
                wording.cost(reading, "baseline"),
                wording.cost(reading, "TST"),
                wording.DASH if speed_up is None else f"{speed_up:.2f}{wording.TIMES}",
            )
        )
    note = (
        "Read off linearly interpolated validation curves where they first come down to the "
        "target. A curve read before the end of its run has not had its learning-rate decay: the "
        "arm that is read early would have got there sooner in a run planned for that length."
    )
    header = ("Target", "Baseline", "TST", "Speed-up of TST")
    return _table(header, rows) + f'<p class="dim">{note}</p>'


def _settings_table(comparison: Comparison) -> str:
    rows = settings_side_by_side(comparison)
    shown = [(name, _shown(baseline), _shown(tst)) for name, baseline, tst in rows]
    differs = [baseline != tst for _, baseline, tst in rows]
    note = '<p class="dim">Differences are highlighted.</p>'
    return note + _table(("Setting", "Baseline", "TST"), shown, differs)


def _provenance(comparison: Comparison) -> str:
    baseline, tst = comparison.baseline.info, comparison.tst.info
    names = list(dict.fromkeys([*baseline["machine"], *tst["machine"]]))
    pairs = [("commit", baseline["commit"], tst["commit"])]
    pairs += [(name, baseline["machine"].get(name), tst["machine"].get(name)) for name in names]
    table = _table(
        ("", "Baseline", "TST"),
        [(name, _shown(a), _shown(b)) for name, a, b in pairs],
        [a != b for _, a, b in pairs],
    )
    commands = [
        f"<p>Command of {wording.ARM_NAMES[arm]}:</p>{_preformatted(str(info['command']))}"
        for arm, info in zip(ARMS, (baseline, tst), strict=True)
    ]
    return table + "".join(commands)


def _shown(value: Any) -> str:
    if value is None:
        return wording.DASH
    return f"{value:,}" if type(value) is int and abs(value) >= 10_000 else str(value)


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], differs: Sequence[bool] | None = None
) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = []
    for i, row in enumerate(rows):
        mark = ' class="differs"' if differs is not None and differs[i] else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body.append(f"<tr{mark}>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def _figure(plot: Plot) -> str:
    return (
        f"<figure>{plot.svg}<figcaption><b>{escape(plot.title)}.</b> "
        f"{escape(plot.caption)}</figcaption></figure>"
    )


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
