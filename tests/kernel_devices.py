"""Where the Triton kernels are tested: in an interpreter on the CPU, and on a GPU if there is one.

Triton decides when it is imported, for the whole process, whether kernels are interpreted. So the
interpreter gets a process of its own, and no other test ever runs interpreted. What a test checks
is a function of its module that takes the device first; it runs there, and its failure comes back.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
from packaging.version import Version

# Calls ``check(device, *args)``.
Runner = Callable[..., None]


class Interpreter:
    """A process where ``TRITON_INTERPRET=1``, started by the first check."""

    def __init__(self) -> None:
        # Spawned, not forked: this process may have imported Triton.
        self._executor = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_enter_interpreter
        )

    def run(self, check: Callable[..., None], *args: Any) -> None:
        self._executor.submit(check, "cpu", *args).result(120)

    def close(self) -> None:
        self._executor.shutdown()


def missing_for_interpreter() -> str | None:
    """What the interpreter of kernels needs and this machine has not."""
    if find_spec("triton") is None:
        return "needs Triton"
    # The interpreter of 3.6 makes integers of arrays with one element, which numpy 2.4 refuses.
    is_old = Version(version("triton")) < Version("3.7")
    if is_old and Version(numpy.__version__) >= Version("2.4"):
        return "needs Triton 3.7 or numpy below 2.4 to interpret kernels"
    return None


def run_interpreted_on_ranks(ranks: int, function: Callable[[], Any], folder: Path) -> list[Any]:
    """What a function returns on each of some gloo ranks, in processes that interpret kernels."""
    with ProcessPoolExecutor(
        ranks, mp_context=multiprocessing.get_context("spawn"), initializer=_enter_interpreter
    ) as executor:
        # Each rank waits for the others, so that none of the processes gets two.
        running = [
            executor.submit(_as_rank, rank, ranks, folder / "store", function)
            for rank in range(ranks)
        ]
        return [rank.result(120) for rank in running]


def _as_rank(rank: int, ranks: int, store: Path, function: Callable[[], Any]) -> Any:
    import torch

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )
    try:
        return function()
    finally:
        torch.distributed.destroy_process_group()


def run_on_gpu(check: Callable[..., None], *args: Any) -> None:
    check("cuda", *args)


def _enter_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)
