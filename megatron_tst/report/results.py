"""What a comparison keeps of a run, and a set of runs as one tidy table.

A row of the table is one logged loss. Rows of validation losses repeat the settings of their run,
so that the table can be filtered and grouped as it is; those of training losses leave them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megatron_tst.report.describing import (
    IntArray,
    Setting,
    Status,
    describe_data,
    describe_machine,
    describe_settings,
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
from megatron_tst.report.tables import Row, read_table, write_table

VALIDATION, TRAINING, OFFSET = "validation loss", "training loss", "loss at offset"
_DATA_PREFIX = "data."
_LEADING = (
    "run",
    "status",
    "quantity",
    "step",
    "loss",
    "equivalent_tokens",
    "data_tokens",
    "seconds",
)
_TRAILING = ("machine", "commit")
# Never read as numbers, whatever they look like.
_TEXT = {
    "run",
    "status",
    "quantity",
    "machine",
    "commit",
    "variant",
    "target_weighting",
    "objective",
    "reset_at_switch",
    "document_boundary",
    "lr_decay_style",
    "lr_wsd_decay_style",
    "data.data_path",
    "data.split",
    "data.tokenizer_type",
    "data.tokenizer_model",
}


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
        commit: of this project.
        steps: optimizer steps completed at each validation, ascending, [n].
        validation_loss: next-token loss, nats a token, [n].
        equivalent_tokens: latent positions processed until each validation, [n].
        data_tokens: tokens of text read until each validation, [n].
        seconds: time in training steps until each validation, [n]; NaN where it is not known.
        training_steps: [m].
        training_loss: nats a token, [m]; near the switch as logged, elsewhere means over
            neighbours.
        offset_losses: phase 1 training loss of the i-th token of the predicted bag, averaged over
            the last tenth of the phase, [bag_size] or [0].
        command: command line; not part of a table of results.
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

    @property
    def bag_size(self) -> int:
        """Tokens a bag in phase 1; 1 for a baseline."""
        return int(self.settings.get("bag_size", 1))

    @property
    def switch_step(self) -> int:
        """First step of phase 2; 0 for a baseline."""
        return int(self.settings.get("switch_step", 0))

    @property
    def total_steps(self) -> int:
        """Steps that the run was planned for."""
        return int(self.settings.get("total_steps", self.steps[-1] if self.steps.size else 0))

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
        ValueError: naming the folder and what is missing or contradictory.
    """
    run = read_run(folder, may_lack_scalars=status is not None)
    validation = run.validation
    training = run.series(TRAINING_LOSS)
    training_steps, training_loss = thin_training_loss(training, run.schedule.switch_step)
    settings = _settings(run)
    return RunResult(
        name=name or folder.name,
        status=status or status_of(settings, validation, training),
        settings=settings,
        data=describe_data({**run.info["settings"], "seq_length": run.schedule.sequence_length}),
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
    )


def write_results(results: Sequence[RunResult], path: Path) -> None:
    """Writes runs to ``path``, Parquet if its suffix is ``.parquet``, else CSV.

    Losses keep six significant digits. The file appears whole or not at all.

    Raises:
        ValueError: two runs have one name.
    """
    names = [result.name for result in results]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: several runs are called {', '.join(twice)}: rename them.")
    rows = [row for result in results for row in _rows(result)]
    columns = _columns(results)
    write_table(path, rows, columns)


def read_results(path: Path) -> list[RunResult]:
    """Reads what :func:`write_results` wrote; rows may be in any order of runs.

    Raises:
        ValueError: naming the file and the column or run that is wrong.
    """
    rows = read_table(path, required=_LEADING, text_columns=_TEXT)
    by_run: dict[str, list[Row]] = {}
    for row in rows:
        by_run.setdefault(row["run"], []).append(row)
    if not by_run:
        raise ValueError(f"{path} holds no run.")
    return [_result(path, name, rows) for name, rows in by_run.items()]


def _columns(results: Sequence[RunResult]) -> list[str]:
    settings = [name for result in results for name in result.settings]
    data = [f"{_DATA_PREFIX}{name}" for result in results for name in result.data]
    return list(dict.fromkeys([*_LEADING, *settings, *data, *_TRAILING]))


def _rows(result: RunResult) -> Iterator[Row]:
    described: Row = {
        "run": result.name,
        "status": result.status,
        **result.settings,
        **{f"{_DATA_PREFIX}{name}": value for name, value in result.data.items()},
        "machine": result.machine,
        "commit": result.commit,
    }
    if not result.steps.size:
        yield described
    for i, step in enumerate(result.steps):
        yield {
            **described,
            "quantity": VALIDATION,
            "step": int(step),
            "loss": _rounded(result.validation_loss[i]),
            "equivalent_tokens": int(result.equivalent_tokens[i]),
            "data_tokens": int(result.data_tokens[i]),
            "seconds": _rounded(result.seconds[i]),
        }
    for quantity, steps, losses in (
        (TRAINING, result.training_steps, result.training_loss),
        (OFFSET, np.arange(1, len(result.offset_losses) + 1), result.offset_losses),
    ):
        for step, loss in zip(steps, losses, strict=True):
            yield {
                "run": result.name,
                "quantity": quantity,
                "step": int(step),
                "loss": _rounded(loss),
            }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _result(path: Path, name: str, rows: list[Row]) -> RunResult:
    described = next((row for row in rows if row.get("status")), None)
    if described is None or described["status"] not in get_args(Status):
        raise ValueError(f"{path}: run {name} has no row with its status and settings.")
    known = {*_LEADING, *_TRAILING}
    rest = {key: value for key, value in described.items() if key not in known}
    present = {key: value for key, value in rest.items() if value is not None}
    try:
        return RunResult(
            name=name,
            status=described["status"],
            settings={k: v for k, v in present.items() if not k.startswith(_DATA_PREFIX)},
            data={
                key.removeprefix(_DATA_PREFIX): value
                for key, value in present.items()
                if key.startswith(_DATA_PREFIX)
            },
            machine=described.get("machine") or "",
            commit=described.get("commit") or "",
            **_curves(rows),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: run {name} has a row that cannot be read: {error}") from error


def _curves(rows: list[Row]) -> dict[str, Any]:
    by_quantity: dict[str, list[Row]] = {VALIDATION: [], TRAINING: [], OFFSET: []}
    for row in rows:
        if row.get("quantity"):
            by_quantity[row["quantity"]].append(row)

    def column(quantity: str, name: str, dtype: type) -> Any:
        ordered = sorted(by_quantity[quantity], key=lambda row: row["step"])
        return np.array([row[name] for row in ordered], dtype=dtype)

    return {
        "steps": column(VALIDATION, "step", np.int64),
        "validation_loss": column(VALIDATION, "loss", np.float64),
        "equivalent_tokens": column(VALIDATION, "equivalent_tokens", np.int64),
        "data_tokens": column(VALIDATION, "data_tokens", np.int64),
        "seconds": column(VALIDATION, "seconds", np.float64),
        "training_steps": column(TRAINING, "step", np.int64),
        "training_loss": column(TRAINING, "loss", np.float64),
        "offset_losses": column(OFFSET, "loss", np.float64),
    }


def _settings(run: Run) -> dict[str, Setting]:
    batch_sizes = run.schedule.batch_sizes
    is_constant = len(batch_sizes.entries) == 1
    return {
        "parameters": run.info["parameters"],
        **superposition_settings(run.schedule),
        **describe_settings(run.info["settings"]),
        "total_steps": run.schedule.total_steps,
        "sequence_length": run.schedule.sequence_length,
        "global_batch_size": batch_sizes.size_at(0)
        if is_constant
        else batch_sizes.text(run.schedule.sequence_length),
        "seed": run.info["seed"],
    }


def _offset_losses(run: Run) -> FloatArray:
    losses = []
    for i in range(1, run.schedule.config.bag_size + 1):
        series = run.scalars.get(f"{OFFSET_LOSS_PREFIX}{i}")
        if series is None:
            return np.zeros(0)
        losses.append(float(series.values[-max(1, len(series.values) // 10) :].mean()))
    return np.array(losses)
