"""The published runs as the planner predicts them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rich import box
from rich.table import Table

from megatron_tst.common.units import quantity
from megatron_tst.planning.accounting import Cluster
from megatron_tst.planning.loss_estimate import Estimate, loss_model
from megatron_tst.planning.published import (
    PUBLISHED_MODELS,
    PublishedRun,
    published_runs,
)
from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.schedule import SuperpositionSchedule


def published_tokens_per_second(model: str) -> float:
    """Equivalent tokens a second and B200, from the first baseline of a published model."""
    run = next(run for run in published_runs() if run.model == model)
    return Cluster(1, 1.0).gpu_hours(run.equivalent_tokens) / run.gpu_hours


@dataclass(frozen=True)
class Prediction:
    """A published run, and what the planner says of it.

    Attributes:
        run: as published.
    """

    run: PublishedRun

    @cached_property
    def data_tokens(self) -> int:
        """Text read."""
        model = PUBLISHED_MODELS[self.run.model]
        config = (
            SuperpositionConfig(bag_size=self.run.bag_size, steps=self.run.tst_steps)
            if self.run.tst_steps
            else SuperpositionConfig()
        )
        sequences = BatchSizes.constant(model.batch_tokens // model.sequence_length)
        steps = self.run.total_steps
        schedule = SuperpositionSchedule(config, steps, sequences, model.sequence_length)
        return schedule.data_tokens(steps)

    @cached_property
    def gpu_hours(self) -> float:
        """At the speed of the first baseline of the model."""
        cluster = Cluster(1, published_tokens_per_second(self.run.model))
        return cluster.gpu_hours(self.run.equivalent_tokens)

    @cached_property
    def loss(self) -> Estimate:
        """Inside of the tables by construction, apart from what the grids and the runs disagree."""
        run, losses = self.run, loss_model(PUBLISHED_MODELS[self.run.model].size)
        if not run.tst_steps:
            return losses.baseline(run.equivalent_tokens)
        ratio = run.tst_steps / run.total_steps
        return losses.superposed(run.equivalent_tokens, run.bag_size, ratio)


def predictions_table() -> Table:
    """All published runs, predicted and published, as Markdown."""
    table = Table(
        "model",
        "steps (phase 1 + 2)",
        "s",
        "data tokens",
        "published",
        "B200-hours",
        "published",
        "loss",
        "published",
        box=box.MARKDOWN,
    )
    for run in published_runs():
        prediction = Prediction(run)
        table.add_row(
            run.model,
            f"{run.tst_steps} + {run.total_steps - run.tst_steps}",
            str(run.bag_size),
            _compared(prediction.data_tokens, run.data_tokens, quantity(prediction.data_tokens)),
            quantity(run.data_tokens),
            _compared(prediction.gpu_hours, run.gpu_hours, f"{prediction.gpu_hours:,.0f}"),
            f"{run.gpu_hours:,.0f}",
            f"{prediction.loss.value:.3f}",
            f"{run.final_loss:.3f}",
        )
    return table


def _compared(predicted: float, published: float, text: str) -> str:
    return f"{text} ({predicted / published - 1:+.1%})"
