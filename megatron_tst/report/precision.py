"""Says what the runs of a comparison were trained in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megatron_tst.report.describing import OFF
from megatron_tst.report.results import RunResult


def precision_sentence(runs: Iterable[RunResult]) -> str:
    """What the runs were trained in, by their settings."""
    counts = Counter(map(_precision_of, runs))
    if len(counts) == 1:
        return f"Trained in {next(iter(counts))}."
    parts = (f"{name} ({count} of {counts.total()} runs)" for name, count in counts.items())
    return f"Trained in {' and '.join(parts)}: part of a gap may be due to that."


def _precision_of(run: RunResult) -> str:
    if "bf16" not in run.settings:
        return "a precision that was not recorded"
    for name in ("fp4", "fp8", "fp16"):
        if run.numerics.get(name, OFF) != OFF:
            return name
    return "bf16" if run.settings["bf16"] else "fp32"
