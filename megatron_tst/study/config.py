"""A study: runs over one text, and the Megatron command line of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tst.study.settings import RunSettings

MAX_EPOCHS = "tst-max-epochs"
"""How often the runs may read their text: it changes no run."""


@dataclass(frozen=True)
class Validation:
    """How the runs are evaluated, all on the same text.

    Attributes:
        times: evaluations a run, evenly spaced.
        tokens: at least so many of the validation text each time.
        batch_size: sequences a forward pass; memory against speed.
    """

    times: int
    tokens: int
    batch_size: int


@dataclass(frozen=True)
class StudyRun:
    """One run.

    Attributes:
        settings: what distinguishes it.
        arguments: its Megatron command line without the paths of its outputs.
    """

    settings: RunSettings
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique in the study."""
        return self.settings.name


@dataclass(frozen=True)
class StudyConfig:
    """A study file.

    Attributes:
        arguments: Megatron arguments of all runs, by name without the dashes.
        models: Megatron arguments of each model.
        warmup_share: fraction of a run's steps in which the learning rate rises.
        decay_share: fraction of a run's steps, at its end, in which it falls.
        validation: how runs are evaluated.
        checkpoints: how many are kept ready to go on from, a run; 0: a broken run starts anew.
        processes: ranks of each run.
        grid: every run, each once; the controls last.
        controls: how many of them are baselines that no arm lists: each run with superposition has
            one of its model, length, learning rate and seed.
    """

    arguments: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    warmup_share: float
    decay_share: float
    validation: Validation
    checkpoints: int
    processes: int
    grid: tuple[RunSettings, ...]
    controls: int

    def runs(self) -> list[StudyRun]:
        """All runs, the first seed of every arm before the second of any."""
        ordered = sorted(self.grid, key=lambda run: run.seed)
        return [StudyRun(run, tuple(self._arguments_of(run))) for run in ordered]

    def common(self) -> dict[str, Any]:
        """What two runs must share to be of one study, as plain values."""
        shared = ("warmup_share", "decay_share", "processes")
        return {
            "arguments": {k: v for k, v in self.arguments.items() if k != MAX_EPOCHS},
            **{name: getattr(self, name) for name in shared},
            "validation": vars(self.validation),
        }

    def _arguments_of(self, run: RunSettings) -> list[str]:
        merged = {**self.arguments, **self.models[run.model]}
        length, batch = int(merged["seq-length"]), self.validation.batch_size
        evaluation = {
            # One short of every share, as pretrain evaluates after the last step in any case.
            "eval-interval": run.total_steps // self.validation.times + 1,
            "eval-iters": -(-self.validation.tokens // (batch * length)),
            "eval-micro-batch-size": batch // self.processes,
            "eval-global-batch-size": batch,
        }
        if self.checkpoints:
            evaluation["save-interval"] = max(run.total_steps // self.checkpoints, 1)
        return [
            *command_line(merged),
            *command_line(evaluation),
            *run.arguments(self.warmup_share, self.decay_share),
        ]


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """``{"bf16": True, "lr": 0.1}`` as ``["--bf16", "--lr", "0.1"]``."""
    parts: list[str] = []
    for name, value in arguments.items():
        parts.append(f"--{name}")
        if isinstance(value, list):
            parts += [str(item) for item in value]
        elif value is not True:
            parts.append(str(value))
    return parts
