"""What the inspection of a corpus says, against brute force and against the dataset of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from megatron_tst.corpus import lengths as corpus_lengths
from megatron_tst.corpus.inspection import (
    PhaseOne,
    open_corpus,
    read_phase_1,
)
from megatron_tst.corpus.lengths import length_distribution
from megatron_tst.corpus.tokenizer import byte_tokenizer
from megatron_tst.data.bags import IGNORE_INDEX
from megatron_tst.settings.config import DocumentBoundary
from tests.corpus import write_corpus, write_documents
from tests.datasets import DOCUMENT_LENGTHS, VARIANTS, build_train

LENGTH, BAG_SIZE = 4, 3


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text", DOCUMENT_LENGTHS)
    return tmp_path / "text"


@pytest.mark.parametrize("counted_lengths", [1, 40, 1 << 20])
def test_length_distribution(monkeypatch: pytest.MonkeyPatch, counted_lengths: int) -> None:
    # Chunks, and documents above the length up to which lengths are counted.
    monkeypatch.setattr(corpus_lengths, "_CHUNK", 7)
    monkeypatch.setattr(corpus_lengths, "_COUNTED_LENGTHS", counted_lengths)
    lengths = np.random.default_rng(0).geometric(0.03, 1000).astype(np.int32) - 1
    found = length_distribution(lengths)
    assert found.documents == 1000
    assert found.empty == (lengths == 0).sum() > 0
    assert found.tokens == lengths.sum()
    assert found.mean == pytest.approx(lengths.mean())
    for share in (0, 0.01, 0.5, 0.95, 1):
        assert found.quantile(share) == np.quantile(lengths, share, method="inverted_cdf")
    edges = np.array([0, 1, 5, 50, 300])
    documents, tokens = found.binned(edges)
    assert documents.tolist() == np.histogram(lengths, edges)[0].tolist()
    assert tokens.tolist() == np.histogram(lengths, edges, weights=lengths)[0].tolist()


def test_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"document 2 has -5 tokens in the \.idx file: .* Copy"):
        length_distribution(np.array([1, 2, -5], dtype=np.int32))


def test_corpus_without_text_is_refused(tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [np.zeros(0, dtype=np.int64)] * 2)
    with pytest.raises(ValueError, match=r"text\.bin is empty"):
        open_corpus(str(tmp_path / "text"))


def bags(**others: str) -> dict[str, Any]:
    return {"bag_size": BAG_SIZE, **others}


def assert_same_samples(prefix: Path, settings: PhaseOne, dataset: Any, count: int) -> None:
    places = list(range(count))
    for place, sample in zip(places, read_phase_1(str(prefix), settings, places), strict=True):
        item = dataset[place]
        labels = item["labels"]
        if labels.dim() == 1:
            labels = labels.masked_fill(item["loss_mask"] == 0, IGNORE_INDEX)
        length = settings.sequence_length
        torch.testing.assert_close(
            torch.from_numpy(sample.inputs), item["tokens"].reshape(length, -1)
        )
        torch.testing.assert_close(torch.from_numpy(sample.targets), labels.reshape(length, -1))


@pytest.mark.parametrize("boundary", get_args(DocumentBoundary))
@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_are_those_of_training(
    prefix: Path, variant: str, boundary: DocumentBoundary
) -> None:
    settings = PhaseOne(
        LENGTH, bags(variant=variant, document_boundary=boundary), "80, 15, 5", 7, samples=11
    )
    dataset = build_train(
        prefix,
        20,
        BAG_SIZE,
        variant,
        boundary,
        sequence_length=LENGTH,
        split="80,15,5",
        random_seed=7,
        switch_sample=11,
    )
    assert_same_samples(prefix, settings, dataset, count=11)


def test_first_epoch_does_not_depend_on_a_later_switch(prefix: Path) -> None:
    samples_per_epoch = -(-sum(DOCUMENT_LENGTHS) // (LENGTH * BAG_SIZE))
    for switch in (samples_per_epoch, 3 * samples_per_epoch):
        dataset = build_train(prefix, switch, BAG_SIZE, switch_sample=switch)
        assert_same_samples(prefix, PhaseOne(LENGTH, bags()), dataset, samples_per_epoch)


def test_target_of_a_bag_is_the_next_bag(prefix: Path) -> None:
    (sample,) = read_phase_1(str(prefix), PhaseOne(LENGTH, bags()), [2])
    assert (sample.targets[:-1] == sample.inputs[1:]).all()
    text = [*sample.inputs.reshape(-1).tolist(), *sample.targets[-1].tolist()]
    # A token's id is its place in the corpus, so that ids tell documents.
    document_of = np.repeat(np.arange(len(DOCUMENT_LENGTHS)), DOCUMENT_LENGTHS)
    assert sample.documents == list(dict.fromkeys(document_of[text].tolist()))
    assert sample.begin % (LENGTH * BAG_SIZE) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_of_the_tokenizer_does_not_count(tmp_path: Path, variant: str) -> None:
    folder = tmp_path / "tokenizer"
    byte_tokenizer().save_files(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) | {"pad_token": "a"}
    config_file.write_text(json.dumps(config))
    write_documents(tmp_path / "text", [np.tile(np.array([97, 98, 99]), 20)])
    settings = PhaseOne(LENGTH, bags(variant=variant))
    (sample,) = read_phase_1(str(tmp_path / "text"), settings, [0], folder)
    following = np.array([IGNORE_INDEX, 98, 99] * 20)[sample.begin + 1 :]
    expected = {
        "full": following[2:14].reshape(4, 3),
        "input-only": following[2:14:3].reshape(4, 1),
        "output-only": np.stack([following[i : i + 3] for i in range(4)]),
    }
    assert sample.targets.tolist() == expected[variant].tolist()


def test_reading_leaves_no_files(prefix: Path) -> None:
    before = sorted(prefix.parent.iterdir())
    read_phase_1(str(prefix), PhaseOne(LENGTH, bags()), [0])
    assert sorted(prefix.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "place", "message"),
    [
        ({}, 25, "--sample 25 does not exist: an epoch of phase 1 has 25 samples"),
        ({}, -1, "--sample -1 does not exist"),
        ({"split": "50,50,0"}, 24, "an epoch of phase 1 has 11 samples"),
        ({"samples": 7}, 7, "--sample 7 does not exist: phase 1 has 7 samples"),
        ({"sequence_length": 500}, 0, "holds 300 tokens, and one sample of phase 1 needs 1503"),
        ({"sequence_length": 0}, 0, "--sequence-length is 0: use 1 or more"),
        ({"superposition": {"bag_size": 1}}, 0, "--bag-size is 1: use 2 or more"),
        ({"samples": 0}, 0, "--phase-1-samples is 0: use 1 or more"),
        ({"seed": -1}, 0, "--seed is -1: use 0 or more"),
        ({"split": "none"}, 0, "--split 'none' gives training no share"),
        ({"split": "1.2.3"}, 0, "--split '1.2.3' gives training no share"),
        ({"split": "."}, 0, "--split '.' gives training no share"),
        ({"split": "0,50,50"}, 0, "--split '0,50,50' gives training no share"),
    ],
)
def test_what_cannot_be_read_is_refused(
    prefix: Path, settings: dict[str, Any], place: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_phase_1(
            str(prefix),
            PhaseOne(**{"sequence_length": LENGTH, "superposition": bags(), **settings}),
            [place],
        )


def test_folder_without_a_tokenizer_is_refused(prefix: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded as training would") as refusal:
        read_phase_1(str(prefix), PhaseOne(LENGTH, bags()), [0], prefix.parent / "none")
    assert "\n" not in str(refusal.value)
