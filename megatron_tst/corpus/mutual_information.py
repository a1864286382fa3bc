"""Mutual information between tokens at a distance, and the power law of its decay.

``I(D)`` is the mutual information in nats between the tokens at positions t and t + D. In text it
falls roughly as ``C0 + a * D^k`` (arXiv 2605.06546 fits k = -1.25 on DCLM); what the i-th token of
a target bag has in common with the text before it falls in the same way, which makes ``i^k`` a
weight for it.

A vocabulary has far more pairs of tokens than a sample has pairs, so the plug-in estimate comes out
much too high. Two corrections are made, because neither is enough:

* Grassberger's estimator (arXiv physics/0307138) replaces ``log n`` of each count. Of plug-in,
  Miller-Madow, Chao-Shen and Grassberger it found the exponent of known laws best: Miller-Madow's
  term, one half for each pair seen, presumes that all pairs that exist were seen.
* The same estimate for pairs from unrelated places of the sample, whose true value is 0, is
  subtracted from all distances. Independent tokens then give 0. It moves C0 and not k.

All distances are measured from the same positions: what bias is left, and the mix of documents, is
nearly the same at each of them and goes into C0. It does fade as the sample grows, most where
tokens share most: :class:`DecayFit` therefore reports the exponent of a quarter of the sample too.

Nothing here depends on torch or Megatron.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.token_sample import GROUP_BITS, ID_BITS, TokenSample

FloatArray = NDArray[np.float64]

DEFAULT_PAIRS = 1 << 24
"""Pairs at each distance. All distances together take one to two minutes and 2 GB of memory."""

MIN_DOCUMENTS = 20
"""Fewer documents than this say nothing about the spread between documents."""

_EXPONENTS = -np.geomspace(0.01, 10.0, 8000)


def pair_information(
    first: NDArray[np.int32], second: NDArray[np.int32], groups: NDArray[np.int16]
) -> FloatArray:
    """Contributions to the mutual information of ``first`` and ``second``, in nats.

    Grassberger's estimate is a mean over the pairs of ``log N + G(n_xy) - G(n_x) - G(n_y)``, with
    the counts of the pair and of its two tokens among all N pairs.

    Args:
        first: [n] int32 token ids.
        second: [n] int32 token ids.
        groups: [n] int16, a group for each pair.

    Returns:
        [groups] float64, the sum of that quantity over the pairs of each group.
    """
    # A pair and its group as one integer of 63 bits.
    pairs = first.astype(np.int64) << ID_BITS
    pairs |= second
    pairs <<= GROUP_BITS
    pairs |= groups
    # In place, and of plain integers, which NumPy sorts ten times as fast as it finds an order.
    pairs.sort()
    sorted_groups = pairs & ((1 << GROUP_BITS) - 1)
    pairs >>= GROUP_BITS
    bounds = np.flatnonzero(np.diff(pairs, prepend=-1, append=-1))
    counts = np.diff(bounds)
    unique = pairs[bounds[:-1]]
    by_first, by_second = np.bincount(first), np.bincount(second)
    table = grassberger_logarithms(int(max(by_first.max(), by_second.max())))
    score = np.log(len(first)) + table[counts]
    score -= table[by_first[unique >> ID_BITS]]
    score -= table[by_second[unique & ((1 << ID_BITS) - 1)]]
    return np.bincount(sorted_groups, np.repeat(score, counts), minlength=int(groups.max()) + 1)


def grassberger_logarithms(largest: int) -> FloatArray:
    """G(0) .. G(largest), which stand for the logarithms of counts; close to log n for large n.

    ``G(1) = -gamma - log 2``, ``G(2) = G(1) + 2``, ``G(2n + 1) = G(2n)`` and
    ``G(2n + 2) = G(2n) + 2 / (2n + 1)``; G(0), which no count asks for, is 0
    (arXiv physics/0307138).

    Returns:
        [largest + 1] float64.
    """
    sums = np.concatenate(([0.0], np.cumsum(2.0 / np.arange(1, largest + 1, 2))))
    table = sums[np.arange(largest + 1) // 2] - np.euler_gamma - np.log(2.0)
    table[0] = 0.0
    return np.asarray(table, dtype=np.float64)


def entropy(tokens: NDArray[np.int32]) -> float:
    """Entropy of single tokens in nats, by Grassberger's estimate ``log n - mean G(n_x)``.

    It is the loss of a model that knows how frequent each token is and nothing else, at any bag
    size.

    Args:
        tokens: [n] int32 token ids.
    """
    counts = np.bincount(tokens)
    table = grassberger_logarithms(int(counts.max()))
    return float(np.log(len(tokens)) - (counts * table[counts]).sum() / len(tokens))


@dataclass(frozen=True)
class Measurement:
    """The mutual information at several distances.

    Attributes:
        distances: [n] int64.
        sums: [n, groups] float64, contributions of the documents of each group.
        pairs: [groups] int64, pairs of each group at each distance.
        baseline: the estimate for pairs from unrelated places, in nats; already subtracted.
    """

    distances: NDArray[np.int64]
    sums: FloatArray
    pairs: NDArray[np.int64]
    baseline: float

    @property
    def information(self) -> FloatArray:
        """[n] float64, I(D) in nats."""
        return np.asarray(self.sums.sum(axis=1) / self.pairs.sum(), dtype=np.float64)

    def bootstrap(self, replicates: int, seed: int = 0) -> FloatArray:
        """I(D) for documents drawn anew with replacement.

        Linear: the counts behind each contribution stay those of the whole sample. Counting again
        would find fewer different pairs each time, and so mistake the bias for a spread.

        Returns:
            [replicates, n] float64.
        """
        groups = len(self.pairs)
        weights = np.random.default_rng(seed).multinomial(
            groups, np.full(groups, 1 / groups), size=replicates
        )
        return np.asarray((weights @ self.sums.T) / (weights @ self.pairs)[:, None])


def measure(sample: TokenSample, distances: Iterable[int]) -> Measurement:
    """Estimates I(D) at each distance, from the same positions."""
    first, groups = sample.tokens[sample.positions], sample.groups
    pairs = np.bincount(groups)
    # Half a sample away lies the text of another place.
    unrelated = pair_information(first, np.roll(first, len(first) // 2), groups)
    baseline = float(unrelated.sum() / len(first))
    measured, sums = [], []
    for distance in distances:
        assert 0 < distance <= sample.max_distance
        second = sample.tokens[sample.positions + np.int32(distance)]
        sums.append(pair_information(first, second, groups) - baseline * pairs)
        measured.append(distance)
    return Measurement(np.array(measured, dtype=np.int64), np.array(sums), pairs, baseline)


@dataclass(frozen=True)
class PowerLaw:
    """``constant + amplitude * D ** exponent``, in nats."""

    constant: float
    amplitude: float
    exponent: float

    def __call__(self, distances: NDArray[Any]) -> FloatArray:
        """[n] float64, the law at [n] distances."""
        powers = np.asarray(distances, dtype=np.float64) ** self.exponent
        return np.asarray(self.constant + self.amplitude * powers)


def fit_exponents(distances: Sequence[int] | NDArray[Any], curves: FloatArray) -> FloatArray:
    """Least-squares exponents of ``C0 + a * D^k`` with a > 0, one for each curve.

    For a given k the best C0 and a follow from linear least squares, so that only k is searched:
    on a grid from -0.01 to -10 with steps of 0.1 %.

    Args:
        distances: [n], at least 4 of them.
        curves: [curves, n] float64.

    Returns:
        [curves] float64.
    """
    powers = np.asarray(distances, dtype=np.float64) ** _EXPONENTS[:, None]
    powers -= powers.mean(axis=1, keepdims=True)
    powers /= np.linalg.norm(powers, axis=1, keepdims=True)
    # The residual is smallest where the projection is largest; a negative one means a < 0.
    return np.asarray(_EXPONENTS[np.argmax(curves @ powers.T, axis=1)])


def fit_power_law(distances: Sequence[int] | NDArray[Any], values: FloatArray) -> PowerLaw:
    """Least-squares fit of ``C0 + a * D^k`` with a > 0 to [n] values."""
    exponent = float(fit_exponents(distances, values[None])[0])
    powers = np.asarray(distances, dtype=np.float64) ** exponent
    amplitude, constant = np.polyfit(powers, values, deg=1)
    return PowerLaw(float(constant), float(amplitude), exponent)


@dataclass(frozen=True)
class DecayFit:
    """How the mutual information of a corpus falls with the distance.

    Attributes:
        law: the fitted law.
        exponent_interval: 95 % bootstrap interval of its exponent over documents; None where
            there are fewer than ``MIN_DOCUMENTS``. It holds the chance of which documents were
            read, not the bias of a finite sample.
        standard_errors: [n] float64, of I(D); None likewise.
        quarter_exponent: exponent from a quarter of the sample. What bias is left shows in its
            distance from ``law.exponent``.
        r_squared: share of the variance of I(D) that the law explains.
    """

    law: PowerLaw
    exponent_interval: tuple[float, float] | None
    standard_errors: FloatArray | None
    quarter_exponent: float
    r_squared: float


def fit_decay(
    measurement: Measurement,
    quarter: Measurement,
    documents: int,
    replicates: int = 1000,
    seed: int = 0,
) -> DecayFit:
    """Fits the law and says how certain it is.

    Args:
        measurement: of the whole sample.
        quarter: of ``TokenSample.quarter``.
        documents: documents of the sample.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UsageError: the mutual information does not fall with the distance as a power law.
    """
    distances, values = measurement.distances, measurement.information
    law = fit_power_law(distances, values)
    errors = interval = None
    fall, noise = float(values[0] - values[-1]), 0.0
    if documents >= MIN_DOCUMENTS:
        curves = measurement.bootstrap(replicates, seed)
        errors = curves.std(axis=0)
        noise = float((curves[:, 0] - curves[:, -1]).std())
        low, high = np.percentile(fit_exponents(distances, curves), [2.5, 97.5]).tolist()
        interval = (low, high)
    at_edge = law.exponent in (_EXPONENTS[0], _EXPONENTS[-1])
    if fall <= 3.0 * noise or at_edge:
        raise UsageError(
            f"the mutual information does not fall with the distance as a power law "
            f"({values[0]:.4f} nats at {distances[0]}, {values[-1]:.4f} at {distances[-1]}, "
            f"standard error of the difference {noise:.4f}): "
            "use --tst-target-weighting uniform, or a larger corpus."
        )
    residuals = values - law(distances)
    return DecayFit(
        law=law,
        exponent_interval=interval,
        standard_errors=errors,
        quarter_exponent=fit_power_law(distances, quarter.information).exponent,
        r_squared=float(1.0 - residuals.var() / values.var()),
    )


def distance_ladder(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 .. up to ``largest``: even steps on a logarithmic axis."""
    steps = {1 << i for i in range(31)} | {3 << i for i in range(30)}
    return sorted(step for step in steps if step <= largest)
