"""When arms are back under the first one after the switch, as reports of studies say it."""

from __future__ import annotations

import numpy as np

from megatron_tst.report.origins import VALIDATION, Arm, Trace
from megatron_tst.report.pairs import Pair
from megatron_tst.report.recovery import Recovery, recovery_over
from megatron_tst.report.results import RunResult


def recovery_of_arm(baseline: Arm, arm: Arm) -> Recovery | None:
    """When the validation loss comes under the baseline's to stay; None without such a pair."""
    pairs = [
        Pair(_as_result(baseline.runs[seed]), _as_result(run))
        for seed, run in sorted(arm.runs.items())
        if seed in baseline.runs and run.switch_step is not None
    ]
    found = recovery_over([pair for pair in pairs if pair.switch().is_read])
    return found if found.seeds else None


def _as_result(run: Trace) -> RunResult:
    """The validation curve and the phases of a run; it has nothing else that is read here."""
    curve = run.series(VALIDATION)
    of_run = {"bag_size": run.bag_size, "total_steps": run.total_steps}
    if run.switch_step is not None:
        of_run["switch_step"] = run.switch_step
    no_steps, no_values = np.zeros(0, dtype=np.int64), np.zeros(0)
    return RunResult(
        name=f"{run.arm}, seed {run.seed}",
        status="finished",
        settings={**run.settings, **of_run},
        data={},
        machine=run.machine,
        commit=run.commit,
        steps=np.array(list(curve), dtype=np.int64),
        validation_loss=np.array(list(curve.values())),
        equivalent_tokens=no_steps,
        data_tokens=no_steps,
        seconds=no_values,
        training_steps=no_steps,
        training_loss=no_values,
    )
