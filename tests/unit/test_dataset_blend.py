"""Blends: every corpus one stream over both phases, its weight held in each of them."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_tst.data.blend import check_blend, samples_by_corpus
from megatron_tst.data.named_corpora import data_path_prefixes
from tests.corpus import write_corpus
from tests.datasets import (
    TRAIN,
    VARIANTS,
    assert_equal_batches,
    build,
    flat_stream,
    make_config,
    samples,
    superposition,
)

LENGTH, BAG_SIZE, SWITCH, SAMPLES = 4, 3, 23, 60
WEIGHTS = [5.0, 1.0, 2.0]
# The second is read more than once, the third has an empty document and some shorter than a bag.
LENGTHS = ([40, 300, 7, 500], [61, 2, 9], [100, 0, 1, 2, 290])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("blend")
    made = []
    for index, lengths in enumerate(LENGTHS):
        prefix = folder / f"corpus{index}"
        made.append((prefix, write_corpus(prefix, lengths)))
    return made


def blended(corpora: list[Any], variant: str = "full", **changes: Any) -> Any:
    prefixes = [str(prefix) for prefix, _ in corpora]
    options = {
        "blend": (prefixes, WEIGHTS),
        "superposition": superposition(BAG_SIZE, variant),
        "switch_sample": SWITCH,
        "sequence_length": LENGTH,
        **changes,
    }
    config = make_config(corpora[0][0], **options)
    return build(config, (SAMPLES, 0, 0))[TRAIN]


def spans_read(blend: Any, places: range) -> dict[int, list[tuple[int, int]]]:
    """First position and number of tokens of the samples in some places, by corpus."""
    found: dict[int, list[tuple[int, int]]] = {index: [] for index in range(len(blend.datasets))}
    for place in places:
        index, local = int(blend.dataset_index[place]), int(blend.dataset_sample_index[place])
        dataset = blend.datasets[index]
        begin, _ = dataset.span(local)
        found[index].append((begin, blend[place]["tokens"].numel()))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_corpus_is_read_from_end_to_end(corpora: list[Any], variant: str) -> None:
    blend = blended(corpora, variant)
    first, second = spans_read(blend, range(SWITCH)), spans_read(blend, range(SWITCH, SAMPLES))
    for index, (_, documents) in enumerate(corpora):
        dataset = blend.datasets[index]
        # Text and order of the stream itself, epoch by epoch.
        flat = flat_stream(dataset, documents)
        assert len(flat) >= max(begin + count for begin, count in second[index])
        # The samples lie side by side, those of phase 2 behind those of phase 1. The last epoch is
        # shuffled as a whole and then cut: only there may a sample be left for a longer run.
        read = sorted(first[index]) + sorted(second[index])
        whole_epochs = len(flat) // sum(map(len, documents)) - 1
        end = whole_epochs * sum(map(len, documents))
        position = 0
        for begin, count in read:
            if begin + count <= end:
                assert begin == position
            position = begin + count
        assert max(b for b, _ in first[index]) < min(b for b, _ in second[index])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bags_come_before_the_switch_and_plain_samples_from_it_on(
    corpora: list[Any], variant: str
) -> None:
    blend = blended(corpora, variant)
    for place in range(SAMPLES):
        item = blend[place]
        has_bags = item["tokens"].dim() == 2 or item["labels"].dim() == 2
        assert has_bags == (place < SWITCH)


def test_weights_hold_in_data_tokens_in_each_phase(corpora: list[Any]) -> None:
    blend = blended(corpora)
    for places, tokens in (
        (range(SWITCH), LENGTH * BAG_SIZE),
        (range(SWITCH, SAMPLES), LENGTH),
    ):
        read = spans_read(blend, places)
        total = sum(count for spans in read.values() for _, count in spans)
        for weight, spans in zip(WEIGHTS, read.values(), strict=True):
            share = weight / sum(WEIGHTS) * total
            assert abs(sum(count for _, count in spans) - share) <= 2 * tokens


def test_a_corpus_is_read_as_if_it_were_alone(corpora: list[Any]) -> None:
    """The text of a corpus in a blend is the text of its own stream."""
    blend = blended(corpora)
    counts = samples_by_corpus(WEIGHTS, SWITCH)
    for index, (prefix, _) in enumerate(corpora):
        dataset = blend.datasets[index]
        config = make_config(
            prefix,
            superposition=superposition(BAG_SIZE),
            switch_sample=counts[index],
            sequence_length=LENGTH,
        )
        alone = build(config, (len(dataset), 0, 0))[TRAIN]
        assert_equal_batches(samples(dataset, len(dataset)), samples(alone, len(dataset)))


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 4), (2, 2), (4, 1)])
def test_data_parallel_ranks_share_the_samples(
    corpora: list[Any], ranks: int, micro_batch_size: int
) -> None:
    blend = blended(corpora)
    seen: Counter[int] = Counter()
    for rank in range(ranks):
        sampler = MegatronPretrainingSampler(SAMPLES, 0, micro_batch_size, rank, ranks)
        seen.update(place for batch in sampler for place in batch)
    assert seen == Counter(range(len(seen)))
    assert len(seen) == SAMPLES
    assert len(blend) >= SAMPLES


@settings(max_examples=50)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    samples_before=st.integers(0, 300),
    samples_after=st.integers(0, 300),
)
def test_counts_follow_the_weights_from_any_place_on(
    weights: list[float], samples_before: int, samples_after: int
) -> None:
    before = np.array(samples_by_corpus(weights, samples_before))
    after = np.array(samples_by_corpus(weights, samples_before + samples_after))
    assert before.sum() == samples_before
    assert (after >= before).all()
    share = np.array(weights) / sum(weights)
    # Of one prefix within a sample for two corpora, and within their number for more.
    assert (np.abs(before - share * samples_before) <= len(weights)).all()


@pytest.mark.parametrize(
    ("paths", "weights", "message"),
    [
        (["a", "b", "a"], [1.0, 1.0, 1.0], "names a twice: .* sum of its weights"),
        (["a", "b"], [1.0, 0.0], r"gives b the weight 0\.0: use a positive number"),
        (["a", "b"], [-1.0, 1.0], r"gives a the weight -1\.0"),
        (["a", "b"], [1.0, float("nan")], "gives b the weight nan"),
        (["a", "b"], [1.0, float("inf")], "gives b the weight inf"),
    ],
)
def test_bad_blends(paths: list[str], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_blend(paths, weights)


def arguments(**named: Any) -> Namespace:
    names = ["data_path", "data_args_path", "per_split_data_args_path"]
    names += [f"{split}_data_path" for split in ("train", "valid", "test")]
    return Namespace(**(dict.fromkeys(names) | named))


def test_one_corpus_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for other in ("./text", str(tmp_path / "text"), "link/text"):
        with pytest.raises(ValueError, match="twice: each corpus is one stream"):
            data_path_prefixes(arguments(data_path=["1", "text", "1", other]))
    elsewhere = ["1", "s3://a/text", "1", "s3://b/text", "2", "text"]
    assert len(data_path_prefixes(arguments(data_path=elsewhere))) == 3


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("2023 2024", "2023"),
        ("2024 text", "2024"),
        ("2023", "2023"),
        ("text 2023", "2023"),
        ("2023 2024 text", "2023"),
        ("0.5 2023 1e3 text", "1e3"),
    ],
)
def test_a_number_that_names_a_corpus_is_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, number: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("2023", "2024", "1e3"):
        (tmp_path / f"{name}.idx").touch()
    listed, by_split = tmp_path / "listed.txt", tmp_path / "splits.json"
    listed.write_text(words)
    by_split.write_text(json.dumps({"train": "text", "valid": words.split(), "test": words}))
    for written in (
        {"data_path": words.split()},
        {"data_args_path": str(listed)},
        {"valid_data_path": words.split()},
        {"per_split_data_args_path": str(by_split)},
    ):
        message = rf"--data-path {words}: {number} is a number .*{number}\.idx.* \./{number} for"
        with pytest.raises(ValueError, match=message):
            data_path_prefixes(arguments(**written))


def test_numbers_that_are_weights_or_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2023.idx").touch()
    for words in (["1", "2023", "2", "./2024"], ["./2023", "text"], ["2023.0", "text"]):
        paths = [word for word in words if word not in ("1", "2", "2023.0")]
        assert data_path_prefixes(arguments(data_path=words)) == paths


def test_splits_come_from_blends_of_their_own(corpora: list[Any], tmp_path: Path) -> None:
    prefixes = [str(prefix) for prefix, _ in corpora]
    config = make_config(
        tmp_path / "text",
        blend=None,
        split=None,
        blend_per_split=[(prefixes[::2], [1.0, 3.0]), (prefixes[1:2], None), None],
        superposition=superposition(BAG_SIZE),
        switch_sample=SWITCH,
        sequence_length=LENGTH,
    )
    train, valid, _ = build(config, (SAMPLES, 5, 0))
    assert [
        dataset.layout.phases[-1].first_sample for dataset in train.datasets
    ] == samples_by_corpus([1.0, 3.0], SWITCH)
    assert valid[0]["tokens"].shape == (LENGTH,)
