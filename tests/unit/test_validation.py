"""Every evaluation reads the same samples."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core.datasets.utils import Split
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_tst.data.validation import FixedValidationDataset
from megatron_tst.training.validation_split import evaluations


class Squares(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, idx: int | None) -> Any:
        return {"value": None if idx is None else idx * idx}


@pytest.mark.parametrize("evaluation", [0, 1, 4])
def test_each_evaluation_reads_the_first_samples(evaluation: int) -> None:
    dataset = FixedValidationDataset(Squares(), samples_per_evaluation=4, total_samples=20)
    assert len(dataset) == 20
    read = []
    for rank in range(2):
        sampler = MegatronPretrainingSampler(
            total_samples=len(dataset),
            consumed_samples=evaluation * 4,
            micro_batch_size=1,
            data_parallel_rank=rank,
            data_parallel_size=2,
        )
        batches = iter(torch.utils.data.DataLoader(dataset, batch_sampler=sampler))
        read.append([int(next(batches)["value"]) for _ in range(2)])
    assert read == [[0, 4], [1, 9]]


def test_it_passes_for_a_validation_dataset() -> None:
    dataset = FixedValidationDataset(Squares(), samples_per_evaluation=10, total_samples=20)
    assert dataset.split is Split.valid
    assert dataset[None] == {"value": None}


@pytest.mark.parametrize("samples_per_evaluation", [0, 11])
def test_an_evaluation_longer_than_the_split_is_refused(samples_per_evaluation: int) -> None:
    with pytest.raises(ValueError, match=rf"reads {samples_per_evaluation} samples .* has 10"):
        FixedValidationDataset(Squares(), samples_per_evaluation, total_samples=20)


@pytest.mark.parametrize("interval", [1, 3, 4, 12, 13])
@pytest.mark.parametrize("first", [None, 0, 1, 4, 5, 12, 13])
@pytest.mark.parametrize("done", [0, 4, 7, 12, 14])
def test_evaluations_are_counted_as_megatron_does_them(
    interval: int, first: int | None, done: int
) -> None:
    """As the loop of ``megatron.training.training.train`` decides; and once after training."""
    args = Namespace(
        skip_train=False, eval_interval=interval, start_eval_at_iter=first, iteration=done
    )
    args.train_iters = 12
    evaluated = [s for s in range(1, 15) if s % interval == 0 and (first is None or s >= first)]
    before = sum(step <= done for step in evaluated)
    assert evaluations(args) == (before, sum(step <= max(done, 12) for step in evaluated) + 1)
