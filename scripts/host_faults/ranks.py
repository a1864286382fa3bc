"""Runs a function of megatron-core on gloo ranks of one machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def on_ranks(world_size: int, function: Callable[[], Any], **model_parallel: int) -> list[Any]:
    """Calls a module-level function on every rank; the results by rank.

    Args:
        world_size: number of ranks.
        function: called with Megatron's groups initialised, on the project's CPU platform.
        **model_parallel: arguments of ``initialize_model_parallel``.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, folder, function, model_parallel)
        spawn(_serve, arguments, nprocs=world_size)
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _serve(
    rank: int,
    world_size: int,
    folder: str,
    function: Callable[[], Any],
    model_parallel: dict[str, int],
) -> None:
    from megatron_tst import cpu

    cpu.activate()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(**model_parallel)
    random.model_parallel_cuda_manual_seed(0)
    torch.manual_seed(0)
    torch.save(function(), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
