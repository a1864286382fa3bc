"""Final losses read off the published tables, and how far they can be trusted.

Between published runs of a model the estimate interpolates: linearly in r and s, and in the length
of the run linearly in ``tokens ** -0.28`` (data exponent of Hoffmann et al., arXiv 2203.15556).
Anything else is an extrapolation: it carries its reasons, and a range that grows with the distance
to what was published. The estimate falls as the run gets longer, with or without superposition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from megatron_tst.common.errors import UsageError
from megatron_tst.planning.accounting import ModelSize
from megatron_tst.planning.gain_table import (
    GainTable,
    borrowed_table,
    gain_decay,
    own_tables,
)
from megatron_tst.planning.published import (
    PUBLISHED_MODELS,
    FloatArray,
    PublishedModel,
    published_grids,
    published_runs,
    published_tst_runs,
)

SCATTER = 0.004
"""Nats; the most by which a cell of the grids at r = 0.2 to 0.4, s >= 5 differs from the mean of
its neighbours in s, rounded."""

LARGEST_STEP_RATIO = 0.9
"""Of the grids: from here to r = 1 the loss rises by a nat or more, and nothing is interpolated."""

_DATA_EXPONENT = 0.28
# Half of every change that was not published counts as unknown.
_DOUBT = 0.5
_ROUNDING = 0.01


@dataclass(frozen=True)
class Estimate:
    """A loss in nats a token.

    Attributes:
        value: best guess.
        low: lower end of its range.
        high: upper end of its range.
        outside: in what way it lies outside of the published tables; empty if it is inside.
    """

    value: float
    low: float
    high: float
    outside: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LossModel:
    """Estimates for one model.

    Attributes:
        size: the model.
        reference: the published model whose tables are used.
        tokens: [n], lengths of its published baselines, ascending.
        losses: [n], their final losses.
        slope: loss for each unit of ``tokens ** -0.28`` beyond them.
        tables: gains by length of run, ascending.
        offset: loss of the model minus that of the reference.
    """

    size: ModelSize
    reference: PublishedModel
    tokens: FloatArray
    losses: FloatArray
    slope: float
    tables: tuple[GainTable, ...]
    offset: float = 0.0

    def baseline(self, equivalent_tokens: float) -> Estimate:
        """Loss of an ordinary run."""
        value = self._baseline(equivalent_tokens) + self.offset
        nearest = self.tokens[np.argmin(abs(np.log(self.tokens / equivalent_tokens)))]
        distance = abs(self._baseline(equivalent_tokens) - self._baseline(float(nearest)))
        outside = self._outside_size() + _outside_length(
            "baselines", equivalent_tokens, self.tokens
        )
        return self._ranged(value, _DOUBT * distance, outside)

    def superposed(self, equivalent_tokens: float, bag_size: int, step_ratio: float) -> Estimate:
        """Loss of a run that superposes input and output.

        Raises:
            UsageError: the step ratio lies beyond the tables.
        """
        if step_ratio > LARGEST_STEP_RATIO:
            raise UsageError(
                f"--tst-step-ratio is {step_ratio}: losses are published up to "
                f"{LARGEST_STEP_RATIO} (best: 0.2 to 0.4); use at most that."
            )
        value = self._superposed(equivalent_tokens, bag_size, step_ratio)
        lengths = np.array([table.equivalent_tokens for table in self.tables], dtype=float)
        nearest = float(lengths[np.argmin(abs(np.log(lengths / equivalent_tokens)))])
        doubt = _DOUBT * abs(value - self._superposed(nearest, bag_size, step_ratio))
        outside = self._outside_size() + _outside_length("TST runs", equivalent_tokens, lengths)
        for table in self.tables:
            outside += table.outside(bag_size, step_ratio)
        if outside:
            doubt += _DOUBT * abs(self.gain(equivalent_tokens, bag_size, step_ratio))
        return self._ranged(value + self.offset, doubt, tuple(dict.fromkeys(outside)))

    def gain(self, equivalent_tokens: float, bag_size: int, step_ratio: float) -> float:
        """Baseline loss minus TST loss at equal FLOPs.

        Constant below the shortest run of the tables; beyond the longest it falls with the power of
        the length that it falls with at 270M, s=6, r=0.3.
        """
        first, last = self.tables[0], self.tables[-1]
        gains = [table.gain(bag_size, step_ratio) for table in (first, last)]
        if equivalent_tokens <= first.equivalent_tokens:
            return gains[0]
        if equivalent_tokens >= last.equivalent_tokens:
            return gains[1] * (equivalent_tokens / last.equivalent_tokens) ** -gain_decay()
        ends = [_abscissa(table.equivalent_tokens) for table in (first, last)]
        share = (_abscissa(equivalent_tokens) - ends[0]) / (ends[1] - ends[0])
        return gains[0] + share * (gains[1] - gains[0])

    def _superposed(self, equivalent_tokens: float, bag_size: int, step_ratio: float) -> float:
        return self._baseline(equivalent_tokens) - self.gain(
            equivalent_tokens, bag_size, step_ratio
        )

    def _baseline(self, equivalent_tokens: float) -> float:
        """Loss of the reference: straight lines in the abscissa, which falls with the length."""
        x, known = _abscissa(equivalent_tokens), _abscissa(self.tokens)
        inside = float(np.interp(x, known[::-1], self.losses[::-1]))
        return inside + self.slope * (x - float(np.clip(x, known[-1], known[0])))

    def _outside_size(self) -> tuple[str, ...]:
        if self.size == self.reference.size:
            return ()
        return (
            f"{self.size.name} was not trained: the level is interpolated or extended between the "
            f"published sizes, the gain is that of {self.reference.size.name}",
        )

    def _ranged(self, value: float, doubt: float, outside: tuple[str, ...]) -> Estimate:
        doubt += SCATTER + _DOUBT * abs(self.offset)
        return Estimate(value, value - doubt, value + doubt, outside)


def loss_model(size: ModelSize) -> LossModel:
    """The estimates for a model: its own tables, or those of the nearest published size."""
    published = PUBLISHED_MODELS.get(size.name)
    if published is not None and published.size == size:
        return _published_loss_model(size.name)
    if size.is_mixture_of_experts:
        name, ours = "10B-A1B", size.matmul_parameters
        theirs = PUBLISHED_MODELS[name].size.matmul_parameters
    else:
        ours = size.parameters
        name = min(
            ("270M", "600M", "3B"),
            key=lambda name: abs(math.log(ours / PUBLISHED_MODELS[name].size.parameters)),
        )
        theirs = PUBLISHED_MODELS[name].size.parameters
    model = _published_loss_model(name)
    return replace(model, size=size, offset=_level(ours) - _level(theirs))


def _level(parameters: float) -> float:
    """Loss of a dense baseline of 42 B tokens: lines in the logarithm of the size, extended."""
    x = math.log(parameters)
    sizes = [math.log(PUBLISHED_MODELS[name].size.parameters) for name in ("270M", "600M", "3B")]
    losses = [_baselines(name)[1][0] for name in ("270M", "600M", "3B")]
    i = 0 if x < sizes[1] else 1
    slope = (losses[i + 1] - losses[i]) / (sizes[i + 1] - sizes[i])
    return float(losses[i] + slope * (x - sizes[i]))


@cache
def _published_loss_model(name: str) -> LossModel:
    tokens, losses = _baselines(name)
    # One baseline has no slope: the mean of the two models that have one.
    slopes = {model: _slope(*_baselines(model)) for model in ("270M", "3B")}
    slope = slopes.get(name, sum(slopes.values()) / len(slopes))
    reference = PUBLISHED_MODELS[name]
    model = LossModel(reference.size, reference, tokens, losses, slope, own_tables(name))
    if model.tables:
        return model
    run = published_tst_runs(name)[0]
    gain = model._baseline(run.equivalent_tokens) - run.final_loss
    return replace(model, tables=(borrowed_table(name, gain),))


@cache
def _baselines(name: str) -> tuple[FloatArray, FloatArray]:
    """Lengths and losses of the baselines of a model; from the grids, which have more digits."""
    points = [(grid.equivalent_tokens, grid.baseline_loss) for grid in published_grids(name)] or [
        (run.equivalent_tokens, run.final_loss)
        for run in published_runs()
        if run.model == name and not run.tst_steps
    ]
    tokens, losses = np.array(sorted(points), dtype=float).T
    return tokens, losses


def _slope(tokens: FloatArray, losses: FloatArray) -> float:
    x = _abscissa(tokens)
    return float((losses[0] - losses[-1]) / (x[0] - x[-1]))


def _abscissa[T: (float, FloatArray)](tokens: T) -> T:
    return (tokens / 1e9) ** -_DATA_EXPONENT


def _outside_length(kind: str, equivalent_tokens: float, published: FloatArray) -> tuple[str, ...]:
    first, last = published[0], published[-1]
    if first * (1 - _ROUNDING) <= equivalent_tokens <= last * (1 + _ROUNDING):
        return ()
    lengths = (
        f"{first / 1e9:.0f} B" if first == last else f"{first / 1e9:.0f} to {last / 1e9:.0f} B"
    )
    return (f"published {kind} have {lengths} equivalent tokens",)
