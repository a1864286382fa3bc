"""Upstream's own dataset reads on where a run with superposition was, token by token."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_tst.settings.config import DocumentBoundary
from megatron_tst.training.stock_data import refuse_other_checkpoints, write_cache
from tests.corpus import write_corpus
from tests.datasets import (
    TRAIN,
    VARIANTS,
    Corpus,
    assert_equal_batches,
    build,
    make_config,
    superposition,
)

LENGTH, BAG_SIZE, SWITCH = 4, 3, 5


def datasets(config: Any, num_samples: int, samples_read: int) -> tuple[Any, Any]:
    """The train split as the run reads it, and as plain Megatron does from its cache."""
    cache = Path(config.path_to_cache) / "stock"
    stock_config = write_cache(config, (num_samples, 0, 0), samples_read, cache)
    written = sorted(cache.iterdir())
    stock = build(stock_config, (num_samples, 0, 0), GPTDataset)[TRAIN]
    # It found all that it looked for.
    assert sorted(cache.iterdir()) == written
    return build(config, (num_samples, 0, 0))[TRAIN], stock


@settings(max_examples=25)
@given(
    document_lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    variant=st.sampled_from(VARIANTS),
    boundary=st.sampled_from(["cross", "align"]),
    past_the_switch=st.integers(0, 5),
)
def test_from_the_switch_on_the_samples_are_those_of_the_run(
    document_lengths: list[int], variant: str, boundary: DocumentBoundary, past_the_switch: int
) -> None:
    if boundary == "align" and variant == "output-only":
        boundary = "cross"
    num_samples, done = 40, SWITCH + past_the_switch
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        write_corpus(prefix, [*document_lengths, (LENGTH + 1) * BAG_SIZE])
        config = make_config(
            prefix,
            superposition=superposition(BAG_SIZE, variant, boundary),
            switch_sample=SWITCH,
            sequence_length=LENGTH,
        )
        run, stock = datasets(config, num_samples, done)
        assert len(stock) >= num_samples
        places = range(done, num_samples)
        assert_equal_batches([stock[i] for i in places], [run[i] for i in places])
        for place in range(done):
            with pytest.raises(IndexError):
                stock[place]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    return prefix, write_corpus(prefix, [7, 1, 30, 0, 12, 3, 155])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [None, "2,3"])
@pytest.mark.parametrize("done", [0, 2, SWITCH - 1])
def test_before_the_switch_each_token_is_read_once(
    corpus: Corpus, tmp_path: Path, variant: str, sizes: str | None, done: int
) -> None:
    prefix, documents = corpus
    config = make_config(
        prefix,
        superposition=replace(superposition(BAG_SIZE, variant), bag_sizes=sizes),
        switch_sample=SWITCH,
        sequence_length=LENGTH,
        path_to_cache=str(tmp_path),
    )
    num_samples = 30
    run, stock = datasets(config, num_samples, done)
    times_read = np.zeros(sum(map(len, documents)), dtype=np.int64)
    for dataset, places in ((run, range(done)), (stock, range(done, num_samples))):
        for place in places:
            item = dataset[place]
            np.add.at(times_read, item["tokens"].numpy().ravel(), 1)
    assert times_read.max() == 1
    # What the run would have read by its switch comes first.
    by_the_switch = np.concatenate([run[place]["tokens"].ravel() for place in range(SWITCH)])
    left = sum(run[place]["tokens"].numel() for place in range(done, SWITCH))
    ends = done + left // LENGTH
    first = [run[place]["tokens"].ravel() for place in range(done)]
    then = [stock[place]["tokens"] for place in range(done, min(ends, num_samples))]
    assert set(np.concatenate([*first, *then]).tolist()) == set(by_the_switch.tolist())


def test_a_blend_continues_each_corpus(tmp_path: Path) -> None:
    prefixes = [tmp_path / "one", tmp_path / "two"]
    for prefix, lengths in zip(prefixes, ([40, 300, 7, 500], [61, 2, 90]), strict=True):
        write_corpus(prefix, lengths)
    config = make_config(
        prefixes[0],
        blend=([str(prefix) for prefix in prefixes], [5.0, 2.0]),
        superposition=superposition(BAG_SIZE),
        switch_sample=SWITCH,
        sequence_length=LENGTH,
    )
    run, stock = datasets(config, 40, SWITCH)
    places = range(SWITCH, 40)
    assert_equal_batches([stock[i] for i in places], [run[i] for i in places])


def test_left_over_bags_with_padding_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    config = make_config(
        corpus[0],
        superposition=superposition(BAG_SIZE, document_boundary="align"),
        switch_sample=SWITCH,
        sequence_length=LENGTH,
        path_to_cache=str(tmp_path),
    )
    with pytest.raises(
        ValueError, match=r"3 samples of phase 1 are left, .* checkpoint of the swi"
    ):
        datasets(config, 30, 2)


def test_a_blend_without_weights_is_refused(tmp_path: Path) -> None:
    """Which plain Megatron reads in another way than the run."""
    args = Namespace(
        tst_settings={"bag_size": BAG_SIZE}, data_path=["one", "two"], data_args_path=None
    )
    for name in ("train", "valid", "test"):
        setattr(args, f"{name}_data_path", None)
    args.per_split_data_args_path = None
    with pytest.raises(ValueError, match="--data-path one two has no weights"):
        refuse_other_checkpoints(args, tmp_path)
