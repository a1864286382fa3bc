"""What runs did not record, so that nobody has compared it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_tst.report.comparison import Study
from megatron_tst.report.describing import NUMERICS
from megatron_tst.report.missing import nearest_baseline
from megatron_tst.report.results import RunResult

_NAMED = 3


def unchecked(study: Study) -> Iterator[str]:
    """One sentence on all arguments and numerics that some of the compared runs do not tell."""
    groups = [group for one in study.matchups for group in (one.baseline, *one.baselines, one.tst)]
    if baselines := [group for group in study.groups if group.is_baseline]:
        groups += [g for tst in study.alone for g in (nearest_baseline(tst, baselines), tst)]
    runs = list(dict.fromkeys(run for group in groups for run in group.runs))
    lacking = {what: _lacking(runs, tells) for what, tells in _records().items()}
    lacking = {what: found for what, found in lacking.items() if found}
    if not lacking:
        return
    some = {run for found in lacking.values() for run in found}
    names = [run.name for run in runs if run in some]
    shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    yield (
        f"{len(names)} of {len(runs)} runs ({shown}) did not record: {', '.join(lacking)}. That "
        "the runs are equal in this was not checked."
    )


def _records() -> dict[str, Callable[[RunResult], bool]]:
    def tells(name: str) -> Callable[[RunResult], bool]:
        return lambda run: name in run.numerics or name in run.settings

    numerics = {name: tells(name) for name in NUMERICS}
    return {"arguments beyond the settings": lambda run: bool(run.arguments), **numerics}


def _lacking(runs: list[RunResult], tells: Callable[[RunResult], bool]) -> list[RunResult]:
    """Runs that do not tell something; none where all are of one table, which had compared them."""
    found = [run for run in runs if not tells(run)]
    is_of_one_table = len(found) == len(runs) and len({run.source for run in runs}) <= 1
    return [] if is_of_one_table else found
