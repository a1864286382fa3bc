"""The published runs and loss grids (arXiv 2605.06546), read from the tables in ``data/``."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from megatron_tst.planning.accounting import ModelSize, parse_tokens
from megatron_tst.settings.config import POWER_LAW_FROM_BAG_SIZE

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PublishedModel:
    """A model of the paper.

    Attributes:
        size: shape; that of the reading which fits the published parameter count.
        batch_tokens: equivalent tokens a step.
        sequence_length: latent positions a sequence; not stated in the paper, chosen here.
        learning_rate: peak.
        bag_sizes: smallest and largest of the best bag sizes, or the one that was used.
        step_ratios: lowest and highest of the best step ratios, or the one that was used.
    """

    size: ModelSize
    batch_tokens: int
    sequence_length: int
    learning_rate: float
    bag_sizes: tuple[int, int]
    step_ratios: tuple[float, float]

    @property
    def has_grid(self) -> bool:
        """Whether settings were varied at this size."""
        return self.bag_sizes[0] < self.bag_sizes[1]


def _dense(
    name: str, parameters: int, layers: int, hidden: int, rate: float, bags: tuple[int, int]
) -> PublishedModel:
    embedding = 128_256 * hidden
    return PublishedModel(
        size=ModelSize(name, parameters, parameters - embedding, layers, hidden),
        batch_tokens=2**21,
        sequence_length=4096,
        learning_rate=rate,
        bag_sizes=bags,
        step_ratios=(0.2, 0.4) if bags[0] < bags[1] else (0.3, 0.3),
    )


PUBLISHED_MODELS: dict[str, PublishedModel] = {
    model.size.name: model
    for model in (
        _dense("270M", 267_225_408, 30, 576, 2e-3, (3, 8)),
        _dense("600M", 600_208_320, 32, 960, 1e-3, (6, 10)),
        _dense("3B", 3_337_766_912, 36, 2048, 2e-4, (6, 6)),
        PublishedModel(
            # Active: without input embeddings, with the output layer.
            size=ModelSize("10B-A1B", 10_489_144_832, 1_196_074_496, 32, 24 * 128),
            batch_tokens=2**23,
            sequence_length=4096,
            learning_rate=3e-4,
            bag_sizes=(16, 16),
            step_ratios=(0.25, 0.25),
        ),
    )
}
"""By name. Shapes: SmolLM2-135M, SmolLM2-360M (both with as many KV heads as heads), SmolLM3-3B,
and Qwen3-MoE scaled down, as named in the paper."""


@dataclass(frozen=True)
class PublishedRun:
    """A row of ``published_runs.csv``.

    Attributes:
        model: key of ``PUBLISHED_MODELS``.
        tst_steps: steps of phase 1; 0 for a baseline.
        total_steps: steps of both phases.
        bag_size: s; 1 for a baseline.
        data_tokens: text read, rounded as in the paper.
        gpu_hours: B200-hours.
        final_loss: nats a token.
    """

    model: str
    tst_steps: int
    total_steps: int
    bag_size: int
    data_tokens: int
    gpu_hours: float
    final_loss: float

    @property
    def equivalent_tokens(self) -> int:
        """Latent positions of the whole run."""
        return self.total_steps * PUBLISHED_MODELS[self.model].batch_tokens

    @property
    def tokens_a_parameter(self) -> float:
        """Equivalent tokens for each parameter, of a mixture of experts for each visited one."""
        return self.equivalent_tokens / PUBLISHED_MODELS[self.model].size.visited_parameters


@cache
def published_runs() -> tuple[PublishedRun, ...]:
    """All runs, in the order of the paper: the baselines of a model, then TST."""
    return tuple(
        PublishedRun(
            model=row["parameters"],
            tst_steps=int(row["tst_steps"]),
            total_steps=int(row["total_steps"]),
            bag_size=int(row["bag_size_s"]),
            data_tokens=round(parse_tokens("total_tokens", row["total_tokens"])),
            gpu_hours=float(row["b200_hours"]),
            final_loss=float(row["final_loss"]),
        )
        for row in _read("published_runs.csv")
    )


def published_tst_runs(model: str) -> list[PublishedRun]:
    """The runs of a model with superposition."""
    return [run for run in published_runs() if run.model == model and run.tst_steps]


@dataclass(frozen=True, eq=False)
class LossGrid:
    """Final losses by step ratio and bag size, at one size and number of steps.

    Attributes:
        equivalent_tokens: of each run.
        ratios: [n], ascending from 0.
        losses: [n, s_max], nats a token; column ``s - 1`` is bag size s. The row of ratio 0 and the
            column of bag size 1 hold the loss of the baseline.
    """

    equivalent_tokens: int
    ratios: FloatArray
    losses: FloatArray

    @property
    def baseline_loss(self) -> float:
        """Loss without superposition."""
        return float(self.losses[0, 0])

    @property
    def largest_bag_size(self) -> int:
        """Bag sizes go from 1 to this one."""
        return self.losses.shape[1]


@cache
def published_grids(model: str) -> tuple[LossGrid, ...]:
    """The grids of a model, by length of run; none for the models without one."""
    if model == "270M":
        return tuple(_grid(f"loss_270m_{steps}k_steps_uniform.csv", steps) for steps in (20, 100))
    return (grid_600m(),) if model == "600M" else ()


@cache
def grid_600m() -> LossGrid:
    """The grid of the 600M model, with the target weights that each bag size has by default."""
    uniform, power_law = (
        _grid(f"loss_600m_20k_steps_{weights}.csv", 20) for weights in ("uniform", "power_law")
    )
    split = POWER_LAW_FROM_BAG_SIZE - 1
    losses = np.hstack([uniform.losses[:, :split], power_law.losses[:, split:]])
    return LossGrid(uniform.equivalent_tokens, uniform.ratios, losses)


def _grid(name: str, thousand_steps: int) -> LossGrid:
    """Reads a grid; ratio 1 is left out, which has no phase 2 and so no ordinary model."""
    rows = [
        (float(row["step_ratio_r"]), int(row["bag_size_s"]), float(row["final_loss"]))
        for row in _read(name)
    ]
    ratios = sorted({ratio for ratio, _, _ in rows if ratio < 1})
    baseline = next(loss for ratio, _, loss in rows if ratio == 0)
    losses = np.full((len(ratios), max(bag_size for _, bag_size, _ in rows)), np.nan)
    losses[0, :] = losses[:, 0] = baseline
    for ratio, bag_size, loss in rows:
        if ratio < 1:
            losses[ratios.index(ratio), bag_size - 1] = loss
    assert np.isfinite(losses).all()
    return LossGrid(thousand_steps * 1000 * 2**21, np.array(ratios), losses)


def _read(name: str) -> list[dict[str, str]]:
    with (files("megatron_tst.planning") / "data" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
