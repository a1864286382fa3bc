"""The results in the folder of a study, of which none may be lost when they are written anew."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_tst.common.errors import UsageError
from megatron_tst.report.results import RunResult
from megatron_tst.report.results_table import read_results
from megatron_tst.study.run_folder import ENDED, RunFolder
from megatron_tst.study.study_folder import RESULTS_FILE, RUNS


def refuse_to_lose_results(folder: Path, earlier: Iterable[RunResult]) -> None:
    """Refuses to replace results of which the new ones would lack a run.

    Such a run is of an ``--earlier`` table that was named before and is not now, and may be nowhere
    else.

    Args:
        folder: of the study.
        earlier: runs that the new results hold beside those that have ended in the folder.

    Raises:
        UsageError: naming the runs, or the file if it cannot be read.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        return
    try:
        results = read_results(path)
    except UsageError as error:
        raise UsageError(
            f"the results in {folder} would be replaced, and cannot be read ({error}): move them "
            "away."
        ) from error
    kept = {result.name for result in earlier}
    lost = [
        result.name
        for result in results
        if result.status != "unfinished"
        and result.name not in kept
        and RunFolder(folder / RUNS / result.name).state() not in ENDED
    ]
    if lost:
        raise UsageError(
            f"{path} would lose {', '.join(lost)}, whose folders are not there: pass --earlier "
            f"{path} to keep what it holds, or move it away to train them anew."
        )
