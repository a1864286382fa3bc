"""The harness itself: results by rank, failures with their traceback, hangs killed, then reuse."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.harness import WorkerError, run_distributed


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(torch.distributed.get_rank() + offset)
    torch.distributed.all_reduce(total)
    return os.getpid(), int(total)


def fail_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("the reason")
    torch.distributed.barrier()


def hang_on_rank_0() -> None:
    if torch.distributed.get_rank() == 0:
        time.sleep(60)


def die_on_rank_0() -> None:
    if torch.distributed.get_rank() == 0:
        os._exit(3)


def test_workers_communicate_and_are_reused() -> None:
    first, second = run_distributed(2, sum_of_ranks, 10), run_distributed(2, sum_of_ranks, 0)
    assert [total for _, total in first] == [21, 21]
    assert [total for _, total in second] == [1, 1]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]


@pytest.mark.parametrize(
    ("function", "timeout", "message"),
    [
        (fail_on_rank_1, 60, r"rank 1: Trace(.|\n)*in fail_on_rank_1(.|\n)*the reason"),
        (hang_on_rank_0, 2, "no answer from rank 0.* within 2 s"),
        (die_on_rank_0, 60, "rank 0: the process died"),
    ],
)
def test_failure_is_reported_and_the_next_call_works(
    function: Callable[..., Any], timeout: float, message: str
) -> None:
    pids = [pid for pid, _ in run_distributed(2, sum_of_ranks, 0)]
    with pytest.raises(WorkerError, match=message):
        run_distributed(2, function, timeout=timeout)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert [total for _, total in run_distributed(2, sum_of_ranks, 0)] == [1, 1]
