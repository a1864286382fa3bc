"""The folder of a study: one study only, one runner at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_tst.common.atomic_files import write_json
from megatron_tst.common.errors import UsageError, read_json_object
from megatron_tst.study.config import StudyConfig, StudyRun
from megatron_tst.study.execution import Execution
from megatron_tst.study.run_folder import RunFolder, lock_file

STUDY_FILE = "study.json"
RUNS = "runs"
RESULTS_FILE = "results.csv"


@contextmanager
def open_study(study: StudyConfig, folder: Path) -> Iterator[None]:
    """Claims a folder for a study for as long as the context lasts.

    Arms, seeds and models may be added to a study, or left out, from one call to the next.

    Raises:
        UsageError: the folder holds another study, or another runner works in it.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file: name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(folder / "lock"):
            _write_study(check_same_study(study, folder), folder)
            yield
    except BlockingIOError:
        raise UsageError(
            f"--output {folder}: another process runs this study or one of its runs; wait for it, "
            "or end it."
        ) from None


def check_same_study(study: StudyConfig, folder: Path) -> dict[str, dict[str, object]]:
    """Compares a study with what is written down in a folder; returns what is to be written.

    Raises:
        UsageError: naming the keys that differ.
    """
    path = folder / STUDY_FILE
    wanted = {"common": study.common(), "models": _plain(study.models)}
    if not path.exists():
        if any(folder.glob(f"{RUNS}/*")):
            raise UsageError(
                f"--output {folder} has runs but no {STUDY_FILE}: use an empty folder."
            )
        return wanted
    found = read_json_object(path, "use another folder")
    different = [
        *_different(found["common"], wanted["common"]),
        *(f"models.{n}" for n in _different(found["models"], wanted["models"], added=True)),
    ]
    if different:
        raise UsageError(
            f"--output {folder} holds another study, which differs in {', '.join(different)}: "
            "use another folder."
        )
    return {**wanted, "models": {**found["models"], **wanted["models"]}}


def _write_study(content: dict[str, dict[str, object]], folder: Path) -> None:
    write_json(folder / STUDY_FILE, content)


def _different(
    found: dict[str, object], wanted: dict[str, object], added: bool = False
) -> list[str]:
    names = set(found) & set(wanted) if added else set(found) | set(wanted)
    changed = []
    for name in sorted(names):
        before, now = found.get(name), wanted.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            changed += [f"{name}.{inner}" for inner in _different(before, now)]
        elif before != now:
            changed.append(name)
    return changed


def _plain(models: object) -> dict[str, object]:
    plain = json.loads(json.dumps(models))
    assert isinstance(plain, dict)
    return plain


def executions(study: StudyConfig, folder: Path) -> list[Execution]:
    """All runs of a study, to be executed in its folder."""
    return [execution_of(study, run, folder) for run in study.runs()]


def execution_of(study: StudyConfig, run: StudyRun, folder: Path) -> Execution:
    """One run of a study."""
    return Execution(
        name=run.name,
        folder=RunFolder(folder / RUNS / run.name),
        arguments=run.arguments,
        total_steps=run.settings.total_steps,
        processes=study.processes,
        keeps_checkpoints=study.checkpoints > 0,
        record={
            "settings": run.settings.to_dict(),
            "precision": _precision_of(run.arguments),
        },
        model=run.settings.model,
    )


def _precision_of(arguments: Sequence[str]) -> str:
    """What a command line of Megatron trains in."""
    return next((name for name in ("bf16", "fp16") if f"--{name}" in arguments), "fp32")
