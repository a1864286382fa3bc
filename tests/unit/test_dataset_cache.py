"""The cache of the phase-aware dataset, and what the dataset refuses."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.corpus import write_corpus
from tests.datasets import (
    DOCUMENT_LENGTHS,
    Corpus,
    assert_equal_batches,
    build,
    build_train,
    flat_stream,
    make_config,
    samples,
    superposition,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    return prefix, write_corpus(prefix, DOCUMENT_LENGTHS)


def test_a_cache_hit_gives_the_same_samples(corpus: Corpus, tmp_path: Path) -> None:
    options: dict[str, Any] = {"switch_sample": 10, "path_to_cache": str(tmp_path / "cache")}
    built = build_train(corpus[0], 40, **options)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 3
    found = build_train(corpus[0], 40, defer_npy_index_mmap=True, **options)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert_equal_batches(samples(built, 40), samples(found, 40))


@pytest.mark.parametrize(
    "change",
    [
        {"bag_size": 2},
        {"switch_sample": 11},
        {"variant": "output-only"},
        {"num_samples": 41},
        {"random_seed": 1},
        {"sequence_length": 5},
        {"split": "60,40,0"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_order_depends_on_names_the_cache(corpus: Corpus, change: dict[str, Any]) -> None:
    options: dict[str, Any] = {"num_samples": 40, "switch_sample": 10}
    dataset = build_train(corpus[0], **options)
    other = build_train(corpus[0], **(options | change))
    assert dataset.unique_description_hash != other.unique_description_hash


# The second one has as many documents and tokens.
@pytest.mark.parametrize("lengths", [[*DOCUMENT_LENGTHS, 9], DOCUMENT_LENGTHS[::-1]])
def test_a_corpus_rewritten_in_place_is_not_read_in_the_old_order(
    tmp_path: Path, lengths: list[int]
) -> None:
    prefix = tmp_path / "text"
    write_corpus(prefix, DOCUMENT_LENGTHS)
    for bag_size in (1, 3):
        build_train(prefix, 20, bag_size, switch_sample=2)
    documents = write_corpus(prefix, lengths)
    flat_stream(build_train(prefix, 20, switch_sample=2), documents)
    plain, fresh = (
        build_train(prefix, 20, bag_size=1, path_to_cache=str(tmp_path / cache))
        for cache in ("cache", "another")
    )
    assert_equal_batches(samples(plain, 20), samples(fresh, 20))


@pytest.fixture
def second_rank() -> Iterator[None]:
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("second_rank")
def test_only_rank_0_builds_the_cache(corpus: Corpus, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"--data-cache-path .*cache: rank 1 .* share"):
        build_train(corpus[0], 20, switch_sample=2, path_to_cache=cache)
    assert not os.path.exists(cache)


def test_only_the_builder_reads_all_lengths(tmp_path: Path) -> None:
    prefix = tmp_path / "text"
    write_corpus(prefix, [2] * 20_000)
    build_train(prefix, 20, switch_sample=2)
    with prefix.with_suffix(".idx").open("r+b") as index:
        # Between two of the blocks by which the cache knows the index.
        index.seek(34 + 4 * 1250)
        index.write(struct.pack("<i", -7))
    # Whoever looked at the lengths of all documents would find the damage.
    assert build_train(prefix, 20, switch_sample=2).indices is None
    for bag_size in (1, 3):
        with pytest.raises(ValueError, match=r"text\.idx: document 1250 has -7 tokens.* split the"):
            build_train(prefix, 21, bag_size, switch_sample=2)


def test_a_split_without_text_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", [12, 0, 0])
    config = make_config(tmp_path / "text", split="34,33,33")
    with pytest.raises(ValueError, match=r"its valid split holds no tokens\..* --split 34,33"):
        build(config, (2, 1, 1))


def per_split_blend(prefix: Path) -> dict[str, Any]:
    return {
        "blend": None,
        "blend_per_split": [([str(prefix)], None), None, None],
        "split": None,
    }


def test_fast_cache_load_finds_a_built_cache(corpus: Corpus, tmp_path: Path) -> None:
    options = per_split_blend(corpus[0]) | {
        "switch_sample": 4,
        "path_to_cache": str(tmp_path / "cache"),
    }
    with pytest.raises(ValueError, match=r"--data-cache-path .* --dataloader-fast-cache-load"):
        build_train(corpus[0], 20, fast_cache_load=True, **options)
    built = build_train(corpus[0], 20, **options)
    found = build_train(corpus[0], 20, fast_cache_load=True, **options)
    assert_equal_batches(samples(built, 20), samples(found, 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reset_position_ids": True}, "--reset-position-ids does not work"),
        ({"reset_attention_mask": True}, "--reset-attention-mask does not work"),
        ({"inter_document_masking": True}, "--dataloader-inter-document-masking does not work"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel does not work"),
        ({"blend": None}, "A data set without corpora does not work"),
        ({"add_extra_token_to_sequence": False}, "add_extra_token_to_sequence is False"),
        ({"switch_sample": None}, "phases is .* without bags: pass"),
        ({"blend": (["a", "b"], None)}, "a b: --tst-bag-size 3 needs the weight of each"),
        ({"blend": (["a", "a"], [0.5, 0.5])}, "names a twice"),
        (
            {
                "blend": None,
                "split": None,
                "blend_per_split": [(["a", "b"], None), (["c"], None), None],
            },
            "--train-data-path",
        ),
    ],
)
def test_refused_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = {"switch_sample": 4} | changes
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path / "text", superposition=superposition(3), **options)
    make_config(tmp_path / "text", **options)  # nothing is refused without superposition


def test_a_run_of_unknown_length_is_refused(
    corpus: Corpus,
) -> None:
    config = make_config(corpus[0], superposition=superposition(3), switch_sample=4)
    with pytest.raises(ValueError, match=r"asked for None samples.*--train-iters"):
        build(config, (None, 0, 0))


def test_a_corpus_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", [10])
    with pytest.raises(ValueError, match=r"--data-path .*text.* 10 tokens.* needs 15 "):
        build_train(tmp_path / "text", 20, switch_sample=4)


def test_a_missing_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.idx is missing"):
        build_train(tmp_path / "text", 20, switch_sample=4)
