"""The precision of a study whose file says ``bf16: auto``: what is faster where it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_tst.common.errors import UsageError, read_json_object
from megatron_tst.common.precision import Precision, describe_precision, faster_precision
from megatron_tst.study.config import StudyConfig
from megatron_tst.study.execution import gpus_of_this_machine
from megatron_tst.study.study_folder import STUDY_FILE

AUTO = "auto"
_BF16 = "bf16"


def leaves_precision_open(study: StudyConfig) -> bool:
    """Whether the machine decides.

    Raises:
        UsageError: only some models leave it open.
    """
    for name, arguments in study.models.items():
        if arguments.get(_BF16) == AUTO:
            raise UsageError(f"models.{name}.bf16 is auto: write it under arguments, for all runs.")
    return study.arguments.get(_BF16) == AUTO


def resolve_precision(study: StudyConfig, folder: Path, starts_runs: bool) -> StudyConfig:
    """The study with the precision of this machine in place of ``bf16: auto``.

    Args:
        study: a study file.
        folder: where its runs are, whose precision is written down there.
        starts_runs: whether runs may be started; if not, the precision of those in the folder is
            taken, wherever they ran.

    Raises:
        UsageError: the runs in the folder have another precision than this machine would choose.
    """
    if not leaves_precision_open(study):
        return study
    on_gpu = bool(gpus_of_this_machine())
    here, before = faster_precision(on_gpu), _precision_in(folder)
    if starts_runs and before not in (None, here):
        remedy = "write bf16: true" if before == "bf16" else "leave bf16 out"
        raise UsageError(
            f"--output {folder} holds runs in {before}, and on this machine bf16: auto means "
            f"{describe_precision(on_gpu)}: {remedy} in the study file to go on in {before}, or "
            "use another folder."
        )
    return _in_precision(study, here if before is None else before)


def _precision_in(folder: Path) -> Precision | None:
    path = folder / STUDY_FILE
    if not path.is_file():
        return None
    arguments = read_json_object(path, "use another folder")["common"]["arguments"]
    return "bf16" if _BF16 in arguments else "fp32"


def _in_precision(study: StudyConfig, precision: Precision) -> StudyConfig:
    others = {name: value for name, value in study.arguments.items() if name != _BF16}
    chosen = {_BF16: True} if precision == "bf16" else {}
    return replace(study, arguments={**others, **chosen})
