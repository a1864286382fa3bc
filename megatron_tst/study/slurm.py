"""Submits the runs of a study to Slurm as arrays, through submitit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.study.config import StudyConfig
from megatron_tst.study.execution import (
    Execution,
    Slot,
    cores_of_this_process,
    gpus_of_this_machine,
)
from megatron_tst.study.run_folder import ENDED, State
from megatron_tst.study.study_folder import executions

_POLL_SECONDS = 5.0
_REQUIRED = ("timeout_min",)


def parse_slurm_options(options: Sequence[str]) -> dict[str, str | int]:
    """``["timeout_min=60"]`` as ``{"timeout_min": 60}``.

    Raises:
        UsageError: an option that is not ``KEY=VALUE``, or a parameter that is missing.
    """
    parameters: dict[str, str | int] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (name and equals and value):
            raise UsageError(f"--slurm {option}: write KEY=VALUE, such as timeout_min=240.")
        parameters[name] = int(value) if value.isdecimal() else value
    for name in _REQUIRED:
        if name not in parameters:
            raise UsageError(f"--slurm has no {name}: add {name}=240, the minutes a run may take.")
    return parameters


def submit(
    study: StudyConfig,
    folder: Path,
    jobs: int | None,
    parameters: dict[str, Any],
    cluster: str = "slurm",
) -> list[tuple[str, str]]:
    """Submits every run that has not ended.

    A task whose run has ended or is held by another task does nothing: submitting twice is safe.

    Args:
        study: the grid.
        folder: its folder, which the nodes must share.
        jobs: runs at once; None: as many as Slurm gives.
        parameters: of submitit's ``update_parameters``.
        cluster: ``slurm``, or ``local`` for processes on this machine.

    Returns:
        Names of runs, and of the jobs that will run them.

    Raises:
        UsageError: submitit is missing, Slurm is, or a parameter is unknown.
    """
    try:
        import submitit
    except ImportError:
        raise UsageError("--slurm needs submitit: pip install 'megatron-tst[study]'.") from None
    left = [e for e in executions(study, folder) if e.folder.state() not in ENDED]
    if not left:
        return []
    try:
        executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=cluster)
        if jobs is not None and cluster == "slurm":
            parameters = {**parameters, "slurm_array_parallelism": jobs}
        executor.update_parameters(name="megatron-tst-study", **parameters)
        submitted = executor.map_array(run_in_job, left)
    except (RuntimeError, NameError, TypeError, FileNotFoundError) as error:
        raise UsageError(f"--slurm: {error}") from error
    return [(e.name, str(job.job_id)) for e, job in zip(left, submitted, strict=True)]


def run_in_job(execution: Execution) -> State:
    """What a task of the array does; its cores and GPUs are those that Slurm gave it."""
    if execution.folder.state() in ENDED:
        return execution.folder.state()
    try:
        threads = max(len(cores_of_this_process()) // execution.processes, 1)
        execution.start(Slot(gpus=tuple(gpus_of_this_machine()), threads=threads))
    except BlockingIOError:
        return "running"
    try:
        while (state := execution.poll()) == "running":
            time.sleep(_POLL_SECONDS)
    finally:
        execution.stop()
    return state
