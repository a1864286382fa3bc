"""Reads a finished run: what it was asked to do, and the scalars it logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_tst.common.errors import UsageError, read_json_object
from megatron_tst.report.events import FloatArray, Series, read_scalars
from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.phases import Phase, bags_of
from megatron_tst.settings.schedule import SuperpositionSchedule

Budget = Literal["equivalent tokens", "data tokens", "seconds"]
"""What a run spends: FLOPs (proportional to equivalent tokens), text, or training time."""

RUN_FILE = "tst_run.json"
TRAINING_LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"
SECONDS = "tst/seconds"
OFFSET_LOSS_PREFIX = "tst/loss at offset "
_TOKEN_SCALARS = ("tst/equivalent tokens", "tst/data tokens")
_REQUIRED_SCALARS = (TRAINING_LOSS, VALIDATION_LOSS, SECONDS, *_TOKEN_SCALARS)
_REQUIRED_KEYS = (
    "superposition",
    "switch_step",
    "total_steps",
    "batch_sizes",
    "sequence_length",
    "text_share",
    "parameters",
    "seed",
    "settings",
    "commit",
    "machine",
    "command",
)
NOT_LOGGED = Series(np.zeros(0, dtype=np.int64), np.zeros(0))
# TensorBoard stores float32.
_TOKEN_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        folder: where it was read from.
        schedule: its phases and its token arithmetic.
        info: the content of ``tst_run.json``.
        scalars: every logged scalar by TensorBoard tag.
    """

    folder: Path
    schedule: SuperpositionSchedule
    info: dict[str, Any]
    scalars: dict[str, Series]

    @property
    def validation(self) -> Series:
        """Next-token validation loss in nats a token; the same quantity in both phases."""
        return self.series(VALIDATION_LOSS)

    def series(self, tag: str) -> Series:
        """A logged scalar; empty if it never was."""
        return self.scalars.get(tag, NOT_LOGGED)

    def spent(self, budget: Budget, step: float) -> float:
        """What the first ``step`` steps cost."""
        return float(self._spent_at(budget, np.array([step]))[0])

    def validation_spent(self, budget: Budget) -> FloatArray:
        """What the run had spent at each validation, [n], ascending."""
        return self._spent_at(budget, self.validation.steps.astype(np.float64))

    def _spent_at(self, budget: Budget, steps: FloatArray) -> FloatArray:
        if budget == "equivalent tokens":
            spent = [self.schedule.equivalent_tokens(int(step)) for step in steps]
        elif budget == "data tokens":
            spent = [self.schedule.data_tokens(int(step)) for step in steps]
        else:
            return seconds_at(steps, self.series(SECONDS))
        return np.array(spent, dtype=np.float64)


def seconds_at(steps: FloatArray, logged: Series) -> FloatArray:
    """Time in training steps until each step, [n]; NaN if none was logged.

    Args:
        steps: [n].
        logged: seconds since the start, by step.
    """
    if not logged.steps.size:
        return np.full(len(steps), np.nan)
    at = np.interp(steps, [0, *logged.steps], [0.0, *logged.values])
    # The last validation may come later than the last logged step; go on at the mean speed.
    beyond = steps > logged.steps[-1]
    return np.where(beyond, logged.values[-1] * steps / logged.steps[-1], at)


def read_run(folder: Path, may_lack_scalars: bool = False) -> Run:
    """Reads ``folder/tensorboard``: the event files and ``tst_run.json``.

    Args:
        folder: of the run.
        may_lack_scalars: accept a run that ended before it logged or evaluated.

    Raises:
        UsageError: naming the folder and what is missing or contradictory.
    """
    events = folder / "tensorboard"
    if not events.is_dir():
        raise UsageError(
            f"{folder} has no folder tensorboard/: pass the folder of a run that was started with "
            "python -m megatron_tst.pretrain and --tensorboard-dir <folder>/tensorboard."
        )
    info = _read_info(events / RUN_FILE)
    schedule = _schedule(info, folder)
    scalars = read_scalars(events)
    scalars |= _of_the_only_set(scalars)
    missing = [tag for tag in _REQUIRED_SCALARS if tag not in scalars]
    if missing and not may_lack_scalars:
        raise UsageError(
            f"{events} has no values of {', '.join(map(repr, missing))}: the run must log to "
            "TensorBoard and evaluate at least once (--tensorboard-dir, --eval-interval), on one "
            "validation set."
        )
    run = Run(folder=folder, schedule=schedule, info=info, scalars=scalars)
    _check_tokens(run)
    return run


def _of_the_only_set(scalars: Mapping[str, Series]) -> dict[str, Series]:
    """The validation loss of a run with ``--full-validation`` of one set, whose tag names it."""
    found = [
        series
        for tag, series in scalars.items()
        if tag.startswith(f"{VALIDATION_LOSS}-") and not tag.endswith((" vs samples", " ppl"))
    ]
    return {VALIDATION_LOSS: found[0]} if len(found) == 1 and VALIDATION_LOSS not in scalars else {}


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = read_json_object(path, "the file was damaged")
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist: it is written by python -m megatron_tst.pretrain."
        ) from None
    missing = [key for key in _REQUIRED_KEYS if key not in info]
    if missing:
        raise UsageError(f"{path} has no {', '.join(missing)}: it was written by another version.")
    return info


def _schedule(info: dict[str, Any], folder: Path) -> SuperpositionSchedule:
    try:
        # Runs of earlier versions have no list of phases, and one switch.
        bags = bags_of([Phase(**phase) for phase in info.get("phases", ())])
        schedule = SuperpositionSchedule(
            config=SuperpositionConfig(**info["superposition"]),
            total_steps=info["total_steps"],
            batch_sizes=BatchSizes(tuple((first, size) for first, size in info["batch_sizes"])),
            sequence_length=info["sequence_length"],
            text_share=info["text_share"],
            # Runs of earlier versions counted all bag sizes by one share.
            text_shares=tuple((size, share) for size, share in info.get("text_shares", ())),
            bags=bags if len(bags) > 1 else (),
            seed=info["seed"],
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder}: {RUN_FILE} describes no valid run: {error}") from error
    if schedule.switch_step != info["switch_step"]:
        raise UsageError(
            f"{folder}: {RUN_FILE} says switch_step {info['switch_step']}, but its superposition "
            f"settings switch at step {schedule.switch_step}: the file was edited."
        )
    return schedule


def _check_tokens(run: Run) -> None:
    """Refuses a ``tst_run.json`` that lies beside the event files of another run."""
    for tag in _TOKEN_SCALARS:
        if tag not in run.scalars:
            continue
        step = int(run.scalars[tag].steps[-1])
        logged = float(run.scalars[tag].values[-1])
        budget: Budget = "data tokens" if tag.endswith("data tokens") else "equivalent tokens"
        expected = run.spent(budget, step)
        if abs(logged - expected) > _TOKEN_TOLERANCE * expected:
            raise UsageError(
                f"{run.folder}: {tag!r} is {logged:.0f} at step {step}, but {RUN_FILE} gives "
                f"{expected:.0f}: the folder mixes two runs; use an empty folder for each run."
            )
