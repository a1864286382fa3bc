"""Mutual information and its decay on sequences whose information is known in closed form."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from megatron_tst.corpus.mutual_information import (
    DecayFit,
    Measurement,
    distance_ladder,
    entropy,
    fit_decay,
    fit_power_law,
    grassberger_logarithms,
    measure,
    pair_information,
)
from megatron_tst.corpus.token_sample import TokenSample, sample_tokens
from tests.corpus import write_corpus, write_documents

ROOT = Path(__file__).resolve().parents[2]
MAX_DISTANCE = 32
LADDER = distance_ladder(MAX_DISTANCE)
EXPONENT = -1.25

Documents = NDArray[np.int32]
Floats = NDArray[np.float64]


def zipf(vocabulary_size: int) -> Floats:
    frequencies = 1.0 / (np.arange(vocabulary_size) + 3.0)
    return np.asarray(frequencies / frequencies.sum())


def draw(frequencies: Floats, shape: Any, generator: np.random.Generator) -> Documents:
    cumulative = np.cumsum(frequencies)
    return np.searchsorted(cumulative, generator.random(shape) * cumulative[-1]).astype(np.int32)


def copied_information(share: float, frequencies: Floats) -> float:
    """I of two tokens that are the same draw with probability ``share``, else independent."""
    same = share + (1 - share) * frequencies
    diagonal = float((frequencies * same * np.log(same / frequencies)).sum())
    return diagonal + (1 - share) * (1 - float((frequencies**2).sum())) * log(1 - share)


def shares_of(information: Floats, frequencies: Floats) -> Floats:
    """Inverts ``copied_information`` by bisection."""
    low, high = np.zeros(len(information)), np.full(len(information), 1 - 1e-9)
    for _ in range(60):
        middle = (low + high) / 2
        values = [copied_information(share, frequencies) for share in middle]
        is_low = np.array(values) < information
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    return low


def copying_documents(
    information: Floats, frequencies: Floats, documents: int, length: int, seed: int
) -> Documents:
    """[documents, length] tokens with exactly this mutual information at distances 1, 2, ...

    A token copies the one D before it with probability p_D and is drawn anew otherwise. Tokens a
    distance d apart are then the same draw with probability q_d = sum_D p_D q_|d - D|, q_0 = 1: the
    equations of Yule and Walker, solved here for the p that give the q of ``information``.
    """
    shares = np.concatenate(([1.0], shares_of(information, frequencies)))
    reach = len(information)
    lags = np.abs(np.subtract.outer(np.arange(reach), np.arange(reach)))
    chances = np.linalg.solve(shares[lags], shares[1:])
    assert chances.min() >= 0
    assert chances.sum() < 1
    generator = np.random.default_rng(seed)
    burn_in = 8 * reach
    tokens = draw(frequencies, (length + burn_in, documents), generator)
    columns, cumulative = np.arange(documents), np.cumsum(chances)
    for position in range(reach, length + burn_in):
        back = np.searchsorted(cumulative, generator.random(documents)) + 1
        copied = tokens[position - np.minimum(back, reach), columns]
        tokens[position] = np.where(back <= reach, copied, tokens[position])
    return np.ascontiguousarray(tokens[burn_in:].T)


def sample_of(documents: Documents) -> TokenSample:
    number, length = documents.shape
    usable = length - MAX_DISTANCE
    starts = np.arange(number, dtype=np.int32)[:, None] * np.int32(length)
    positions = (starts + np.arange(usable, dtype=np.int32)).reshape(-1)
    groups = np.repeat(np.arange(number, dtype=np.int16), usable)
    return TokenSample(documents.reshape(-1), positions, groups, MAX_DISTANCE, number)


def fitted(documents: Documents) -> tuple[Measurement, DecayFit]:
    sample = sample_of(documents)
    measurement = measure(sample, LADDER)
    return measurement, fit_decay(measurement, measure(sample.quarter(), LADDER), sample.documents)


def power_law(constant: float, amplitude: float) -> Floats:
    return np.asarray(constant + amplitude * np.arange(1.0, MAX_DISTANCE + 1) ** EXPONENT)


def plug_in(first: Sequence[int], second: Sequence[int]) -> float:
    count = len(first)
    pairs = Counter(zip(first, second, strict=True))
    firsts, seconds = Counter(first), Counter(second)
    return sum(n / count * log(n * count / (firsts[a] * seconds[b])) for (a, b), n in pairs.items())


def test_law_of_a_small_vocabulary() -> None:
    information = power_law(constant=0.02, amplitude=0.3)
    documents = copying_documents(information, zipf(64), documents=1000, length=512, seed=0)
    measurement, fit = fitted(documents)
    # 480,000 pairs of 4096 possible ones: hardly any bias. Standard errors are 0.0005 to 0.002.
    truth = information[measurement.distances - 1]
    np.testing.assert_allclose(measurement.information, truth, atol=0.005, rtol=0)
    # Over 12 seeds the exponent had a standard deviation of 0.01.
    assert fit.law.exponent == pytest.approx(EXPONENT, abs=0.04)
    assert fit.law.amplitude == pytest.approx(0.3, abs=0.02)
    assert fit.law.constant == pytest.approx(0.02, abs=0.005)
    assert fit.r_squared > 0.999
    assert fit.exponent_interval is not None
    low, high = fit.exponent_interval
    assert low < fit.law.exponent < high
    assert 0.01 < high - low < 0.08


def test_law_of_a_vocabulary_much_larger_than_the_sample_can_cover() -> None:
    information = power_law(constant=0.05, amplitude=1.35)
    documents = copying_documents(information, zipf(20_000), documents=1500, length=512, seed=0)
    measurement, fit = fitted(documents)
    sample = sample_of(documents)
    first = sample.tokens[sample.positions].tolist()
    last = sample.tokens[sample.positions + MAX_DISTANCE].tolist()
    # Of 0.07 nats the plug-in estimate makes 3.
    assert plug_in(first, last) > 2.5
    # Pairs too rare to be seen twice are missed.
    assert 0.4 * information[-1] < measurement.information[-1] < information[-1]
    # Over 4 seeds -1.298 to -1.320. Bias that is left makes the decay look steeper, and less so in
    # a larger sample.
    assert fit.law.exponent == pytest.approx(EXPONENT, abs=0.12)
    assert fit.quarter_exponent < fit.law.exponent < EXPONENT


@pytest.mark.parametrize("vocabulary_size", [50, 5000, 100_000])
def test_independent_tokens_have_none(vocabulary_size: int) -> None:
    documents = draw(zipf(vocabulary_size), (600, 512), np.random.default_rng(1))
    sample = sample_of(documents)
    measurement = measure(sample, LADDER)
    # Over 8 seeds the largest value was 0.0006 (50 tokens) and 0.011 (100,000).
    np.testing.assert_allclose(measurement.information, 0.0, atol=0.02)
    with pytest.raises(ValueError, match=r"does not fall .* --tst-target-weighting uniform"):
        fit_decay(measurement, measure(sample.quarter(), LADDER), sample.documents)


def test_markov_chain() -> None:
    generator = np.random.default_rng(3)
    transition = generator.dirichlet(np.full(6, 0.5), size=6)
    stationary = np.linalg.matrix_power(transition, 200)[0]
    cumulative = np.cumsum(transition, axis=1)
    tokens = np.empty((400, 1000), dtype=np.int32)
    tokens[0] = draw(stationary, 1000, generator)
    for position in range(1, 400):
        jumps = generator.random(1000)[:, None] * cumulative[tokens[position - 1], -1:]
        tokens[position] = (jumps > cumulative[tokens[position - 1]]).sum(axis=1)
    measurement = measure(sample_of(np.ascontiguousarray(tokens.T)), LADDER)
    for distance, information in zip(
        measurement.distances.tolist(), measurement.information, strict=True
    ):
        joint = stationary[:, None] * np.linalg.matrix_power(transition, distance)
        truth = (joint * np.log(joint / np.outer(stationary, stationary))).sum()
        # 368,000 pairs: standard errors up to 0.001.
        assert information == pytest.approx(truth, abs=0.004)


def test_contributions_add_up_to_grassbergers_estimate() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 9, (2, 500)).astype(np.int32)
    second[:250] = first[:250]
    groups = generator.integers(0, 7, 500).astype(np.int16)
    table = grassberger_logarithms(500)
    pairs = Counter(zip(first.tolist(), second.tolist(), strict=True))
    firsts, seconds = Counter(first.tolist()), Counter(second.tolist())
    expected = np.zeros(7)
    for a, b, group in zip(first.tolist(), second.tolist(), groups.tolist(), strict=True):
        score = log(500) + table[pairs[a, b]] - table[firsts[a]] - table[seconds[b]]
        expected[group] += score
    np.testing.assert_allclose(pair_information(first, second, groups), expected, rtol=1e-12)


def test_grassberger_logarithms() -> None:
    table = grassberger_logarithms(1001)
    assert table[1] == pytest.approx(-np.euler_gamma - log(2))
    assert table[2] == pytest.approx(2 - np.euler_gamma - log(2))
    assert table[7] == table[6] == pytest.approx(table[4] + 2 / 5)
    assert table[1000] == pytest.approx(log(1000), abs=1e-6)


@pytest.mark.parametrize(("vocabulary_size", "off"), [(2, 0.001), (300, 0.005), (100_000, 0.05)])
def test_entropy_of_known_frequencies(vocabulary_size: int, off: float) -> None:
    frequencies = zipf(vocabulary_size)
    tokens = draw(frequencies, 300_000, np.random.default_rng(1))
    truth = -(frequencies * np.log(frequencies)).sum()
    # Half of the largest vocabulary is never seen: the plug-in estimate is 0.17 too low there.
    assert entropy(tokens) == pytest.approx(truth, abs=off)


@pytest.mark.parametrize("exponent", [-0.2, -0.7, -1.25, -3.0])
def test_fit_of_an_exact_law(exponent: float) -> None:
    distances = np.array(LADDER)
    law = fit_power_law(distances, 3.63 + 1.35 * distances.astype(float) ** exponent)
    # The grid has steps of 0.09 %.
    assert law.exponent == pytest.approx(exponent, rel=1e-3)
    assert law.amplitude == pytest.approx(1.35, rel=5e-3)
    assert law.constant == pytest.approx(3.63, abs=5e-3)


def test_standard_errors_are_those_of_many_corpora() -> None:
    information = power_law(constant=0.02, amplitude=0.2)
    runs = [
        measure(
            sample_of(
                copying_documents(information, zipf(16), documents=100, length=96, seed=seed)
            ),
            [1, 4, 16],
        )
        for seed in range(40)
    ]
    spread = np.std([run.information for run in runs], axis=0)
    errors = np.mean([run.bootstrap(200).std(axis=0) for run in runs], axis=0)
    # The spread of 40 values is itself known to a ninth; twice that and some room.
    np.testing.assert_allclose(errors / spread, 1.0, atol=0.35)


def test_few_documents_give_no_interval() -> None:
    information = power_law(constant=0.02, amplitude=0.3)
    documents = copying_documents(information, zipf(16), documents=19, length=4000, seed=0)
    _, fit = fitted(documents)
    assert fit.exponent_interval is None
    assert fit.standard_errors is None


def test_every_position_is_sampled_once_and_no_pair_leaves_its_document(tmp_path: Path) -> None:
    # Each token has an id of its own, so that ids tell positions. Lengths around the distance, the
    # stretches of a sample, and none.
    lengths = [0, 9, 10, 11, 31, 0, 0, 32, 33, 500, 64, 1, 12, 0]
    documents = write_corpus(tmp_path / "text", lengths)
    sample = sample_tokens(IndexedDataset(str(tmp_path / "text")), max_distance=10, pairs=10_000)
    first = sample.tokens[sample.positions]
    assert sorted(first.tolist()) == [t for doc in documents for t in doc[:-10].tolist()]
    for distance in (1, 10):
        second = sample.tokens[sample.positions + distance]
        assert (second - first == distance).all()
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    assert sample.documents == len({*document_of[first].tolist()}) == 7
    for group in np.unique(sample.groups):
        assert len({*document_of[first[sample.groups == group]].tolist()}) == 1


def test_pairs_across_documents_on_request(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", [3, 0, 5, 80, 2])
    corpus = IndexedDataset(str(tmp_path / "text"))
    sample = sample_tokens(corpus, max_distance=8, pairs=10_000, across_documents=True)
    first = sample.tokens[sample.positions]
    assert sorted(first.tolist()) == list(range(90 - 8))
    assert (sample.tokens[sample.positions + 8] == first + 8).all()


def test_a_part_of_the_corpus_by_seed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", [100] * 200)
    corpus = IndexedDataset(str(tmp_path / "text"))
    samples = [sample_tokens(corpus, 16, pairs=1000, seed=seed) for seed in (0, 0, 1)]
    texts = [sample.tokens[sample.positions] for sample in samples]
    assert [len(text) for text in texts] == [1000] * 3
    assert (texts[0] == texts[1]).all()
    assert (texts[0] != texts[2]).any()
    # 1000 of 20,000 positions in stretches of 32 come from about 31 places of the whole corpus.
    assert samples[0].documents > 20
    assert texts[0].min() < 5000
    assert texts[0].max() > 15_000


def test_short_documents_and_wrong_ids_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "short", [16] * 50)
    with pytest.raises(ValueError, match=r"more than 16 tokens: .* --across-documents"):
        sample_tokens(IndexedDataset(str(tmp_path / "short")), max_distance=16, pairs=10_000)
    write_documents(tmp_path / "wrong", [np.full(30, -1)])
    with pytest.raises(ValueError, match=r"holds -1, which is no token id"):
        sample_tokens(IndexedDataset(str(tmp_path / "wrong")), max_distance=16, pairs=10_000)


def test_distances() -> None:
    assert distance_ladder(64) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert distance_ladder(20) == [1, 2, 3, 4, 6, 8, 12, 16]


def test_neither_torch_nor_megatron_is_imported() -> None:
    code = "import sys, megatron_tst.corpus.mutual_information; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not {"torch", "megatron"} & set(loaded)
