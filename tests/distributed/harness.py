"""Run test functions on several gloo ranks, in worker processes that outlive one test.

    losses = run_distributed(2, compute_loss, seed)     # [result of rank 0, result of rank 1]

``compute_loss(seed)`` must be a module-level function; it runs with the default process group
initialised. Importing torch and Megatron costs seconds, so the workers are forked from a server
that imported them once, and stay for later calls; what a function leaves behind (model-parallel
state, patches) it must undo itself, except for process groups. A failure or a time-out kills the
workers; the next call gets new ones.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch

_PRELOAD = ["torch.distributed", "megatron.core.tensor_parallel"]
_START_SECONDS = 120.0
_pools: dict[tuple[int, bool], WorkerPool] = {}


class WorkerError(AssertionError):
    """A function failed on a rank, or did not finish in time; the message has the tracebacks."""


def run_distributed(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    cpu_platform: bool = False,
) -> list[Any]:
    """Call ``function(*args)`` on every rank; the results by rank, as unpickled copies.

    Args:
        world_size: number of ranks.
        function: of a module, found by its name.
        *args: of the function.
        timeout: seconds.
        cpu_platform: call it where the CPU platform is on, in workers of their own.

    Raises:
        WorkerError: with the traceback of every rank that failed, or the ranks that hang.
    """
    key = (world_size, cpu_platform)
    if key not in _pools:
        _pools[key] = WorkerPool(world_size)
        if cpu_platform:
            _pools[key].run(_activate_cpu_platform, (), _START_SECONDS)
    try:
        return _pools[key].run(function, args, timeout)
    except BaseException:
        _pools.pop(key).close()
        raise


def _activate_cpu_platform() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_tst import cpu

    assert cpu.activate()


class WorkerPool:
    """Processes that form one gloo world and take calls one after another."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._directory = tempfile.TemporaryDirectory(prefix="gloo-")
        store = Path(self._directory.name) / "store"
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, str(store)), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        try:
            self._collect(_START_SECONDS)
        except BaseException:
            self.close()
            raise

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        """Call the function on every rank and return the results by rank."""
        call = _pack((function, args))
        for connection in self._connections:
            connection.send_bytes(call)
        return self._collect(timeout)

    def close(self) -> None:
        """Kill the workers, whatever they are doing, and remove their store."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._directory.cleanup()

    def _collect(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        ranks = {connection: rank for rank, connection in enumerate(self._connections)}
        results: dict[int, Any] = {}
        failures: list[str] = []
        while ranks:
            ready = wait(ranks, max(0.0, deadline - time.monotonic()))
            if not ready:
                waiting = f"no answer from rank {', '.join(map(str, ranks.values()))}"
                failures.append(f"{waiting} within {timeout:g} s")
                break
            for connection in cast(list[Connection], ready):
                rank = ranks.pop(connection)
                ok, results[rank] = _receive(connection)
                if not ok:
                    failures.append(f"rank {rank}: {results[rank]}")
                    # The others may wait for this rank for ever: a moment is enough.
                    deadline = min(deadline, time.monotonic() + 1.0)
        if failures:
            raise WorkerError("\n".join(failures))
        return [results[rank] for rank in range(len(results))]


def _pack(value: object) -> bytes:
    # Not multiprocessing's pickle, which shares a tensor's memory, nor the plain one, whose tensors
    # need Megatron's import to be read: Megatron replaces a function of torch that they refer to.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)  # from our own process


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        return cast(tuple[bool, Any], _unpack(connection.recv_bytes()))
    except EOFError:
        return False, "the process died"


def _serve(connection: Connection, rank: int, world_size: int, store: str) -> None:
    """Life of a worker: join the world, then answer calls until the other end closes."""
    # What torchrun sets, for code that reads it.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    connection.send_bytes(_pack((True, None)))
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args = _unpack(call)
            answer = _pack((True, function(*args)))
        except BaseException:
            answer = _pack((False, traceback.format_exc()))
        _destroy_subgroups()
        connection.send_bytes(answer)


def _destroy_subgroups() -> None:
    """Ends the groups that a function left; each has a thread that wakes 100 times a second."""
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


@atexit.register
def close_pools() -> None:
    """Ends all workers."""
    while _pools:
        _pools.popitem()[1].close()
