"""What a comparison keeps of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tst.report.arguments import arguments_that_can_matter
from megatron_tst.report.describing import (
    IntArray,
    Setting,
    Status,
    describe_data,
    describe_machine,
    describe_numerics,
    describe_settings,
    phases_of,
    status_of,
    superposition_settings,
    thin_training_loss,
)
from megatron_tst.report.events import FloatArray
from megatron_tst.report.runs import (
    OFFSET_LOSS_PREFIX,
    TRAINING_LOSS,
    Budget,
    Run,
    read_run,
)
from megatron_tst.settings.phases import Phase


@dataclass(frozen=True, eq=False)
class RunResult:
    """One run, as written to a table of results.

    Attributes:
        name: unique in a set of runs.
        status: whether the run reached its last step, with losses that mean something.
        settings: what the run was asked to do, without what has no influence on the loss (parallel
            layout, kernels). Settings of superposition are there only if they have an influence.
        data: what must be equal for losses to be comparable: text, tokenizer, validation set.
            Files by name, since folders differ between machines.
        machine: processor and cores.
        loss_impl: what computed the losses, ``+`` between several; empty where it is not known.
        numerics: device, releases and formats that round otherwise; what is not known is not there.
        commit: of this project.
        steps: optimizer steps completed at each validation, ascending, [n].
        validation_loss: next-token loss, nats a token, [n].
        equivalent_tokens: latent positions processed until each validation, [n].
        data_tokens: tokens read until each validation, [n].
        seconds: time in training steps until each validation, [n]; NaN where it is not known.
        training_steps: [m].
        training_loss: nats a token, [m]; near the switch as logged, elsewhere means over
            neighbours.
        offset_losses: training loss of the i-th token of the predicted bag, averaged over the last
            tenth of the last phase with bags (of drawn bag sizes, the largest), [its bag size] or
            [0].
        command: command line; not part of a table of results.
        arguments: all that can matter and that the settings do not tell; empty where they were not
            recorded.
        source: what it was first read from, a table or a folder. Runs of one table that recorded
            no arguments were compared when it was written.
    """

    name: str
    status: Status
    settings: dict[str, Setting]
    data: dict[str, str | int | float]
    machine: str
    commit: str
    steps: IntArray
    validation_loss: FloatArray
    equivalent_tokens: IntArray
    data_tokens: IntArray
    seconds: FloatArray
    training_steps: IntArray
    training_loss: FloatArray
    offset_losses: FloatArray = field(default_factory=lambda: np.zeros(0))
    command: str = ""
    arguments: dict[str, Setting] = field(default_factory=dict)
    loss_impl: str = ""
    numerics: dict[str, str] = field(default_factory=dict)
    source: str = ""

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """With as many samples as steps; a baseline has one."""
        return phases_of(self.settings)

    @property
    def bag_size(self) -> int:
        """Tokens in its largest bags; 1 for a baseline."""
        return max(phase.bag_size for phase in self.phases)

    @property
    def switch_step(self) -> int:
        """First step of the last phase; 0 for a baseline."""
        return self.phases[-1].first_step

    @property
    def total_steps(self) -> int:
        """Steps that the run was planned for."""
        return int(self.settings.get("total_steps", self.steps[-1] if self.steps.size else 0))

    @property
    def schedule_share(self) -> float:
        """Length of the learning rate's schedule in units of the run."""
        return float(self.settings.get("lr_decay_share", 1.0))

    @property
    def has_decayed(self) -> bool:
        """Whether it reached the end of its decay, cut off neither by accident nor by its flags."""
        return self.status == "finished" and self.schedule_share <= 1

    @property
    def seed(self) -> int:
        """Seed of weights and data order."""
        return int(self.settings.get("seed", 0))

    @property
    def final_loss(self) -> float:
        """Last validation loss; NaN if there was none."""
        return float(self.validation_loss[-1]) if self.validation_loss.size else float("nan")

    def spent(self, budget: Budget) -> FloatArray:
        """What the run had spent at each validation, [n], ascending."""
        amounts: dict[Budget, IntArray | FloatArray] = {
            "equivalent tokens": self.equivalent_tokens,
            "data tokens": self.data_tokens,
            "seconds": self.seconds,
        }
        return amounts[budget].astype(np.float64)


def read_result(folder: Path, name: str | None = None, status: Status | None = None) -> RunResult:
    """Reads the folder of a run of this project: ``tensorboard/`` with ``tst_run.json``.

    Args:
        folder: what ``--tensorboard-dir <folder>/tensorboard`` was for.
        name: name of the run; the name of the folder by default.
        status: how it ended, where that is known better than the losses tell: a run that was
            stopped at its first infinite loss has logged none. It may lack any scalar then.

    Raises:
        UsageError: naming the folder and what is missing or contradictory.
    """
    run = read_run(folder, may_lack_scalars=status is not None)
    validation = run.validation
    training = run.series(TRAINING_LOSS)
    training_steps, training_loss = thin_training_loss(training, run.schedule.phases)
    settings, arguments = _settings(run), _arguments(run)
    return RunResult(
        name=name or folder.name,
        status=status or status_of(settings, validation, training),
        settings=settings,
        data=describe_data({**arguments, "seq_length": run.schedule.sequence_length}),
        machine=describe_machine(run.info["machine"]),
        commit=str(run.info["commit"] or ""),
        steps=validation.steps,
        validation_loss=validation.values,
        equivalent_tokens=run.validation_spent("equivalent tokens").astype(np.int64),
        data_tokens=run.validation_spent("data tokens").astype(np.int64),
        seconds=run.validation_spent("seconds"),
        training_steps=training_steps,
        training_loss=training_loss,
        offset_losses=_offset_losses(run),
        command=str(run.info["command"]),
        arguments=arguments_that_can_matter(run.info.get("arguments", {})),
        numerics=describe_numerics(run.info.get("arguments", {}), run.info["machine"]),
        loss_impl="+".join(sorted(set(run.info.get("losses", {}).values()))),
        source=name or folder.name,
    )


def all_settings_of(run: Run) -> dict[str, Setting]:
    """All that keeps two runs from being equal but for their seed, by name.

    What is off is not there. Empty for a run of an earlier version, which recorded only a part.
    """
    arguments = run.info.get("arguments")
    if not arguments:
        return {}
    found = {
        **describe_data({**_arguments(run), "seq_length": run.schedule.sequence_length}),
        **_settings(run),
        **arguments_that_can_matter(arguments),
        **describe_numerics(arguments, run.info["machine"]),
    }
    # A stock Megatron run does not record the parameters, which follow from the shape.
    told = {name: value for name, value in found.items() if name not in ("seed", "parameters")}
    return {name: value for name, value in told.items() if value}


def _arguments(run: Run) -> dict[str, Any]:
    # Earlier versions wrote those of some importance only.
    return {**run.info.get("arguments", {}), **run.info["settings"]}


def _settings(run: Run) -> dict[str, Setting]:
    batch_sizes = run.schedule.batch_sizes
    is_constant = len(batch_sizes.entries) == 1
    return {
        "parameters": run.info["parameters"],
        **superposition_settings(run.schedule),
        **describe_settings(_arguments(run)),
        "total_steps": run.schedule.total_steps,
        "sequence_length": run.schedule.sequence_length,
        "global_batch_size": batch_sizes.size_at(0)
        if is_constant
        else batch_sizes.text(run.schedule.sequence_length),
        "seed": run.info["seed"],
    }


def _offset_losses(run: Run) -> FloatArray:
    losses = []
    for phase in run.schedule.phases[:-1][-1:]:
        for i in range(1, phase.bag_size + 1):
            series = run.series(f"{OFFSET_LOSS_PREFIX}{i}")
            sizes = [run.schedule.bag_size_at(int(step) - 1) for step in series.steps]
            is_of_phase = np.array(sizes, dtype=int) == phase.bag_size
            logged = series.values[is_of_phase & (series.steps > phase.first_step)]
            if not logged.size:
                return np.zeros(0)
            losses.append(float(logged[-max(1, len(logged) // 10) :].mean()))
    return np.array(losses)
