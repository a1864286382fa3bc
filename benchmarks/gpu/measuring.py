"""Times on a device, and rows that are on the disk as soon as they are measured."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]
Row = dict[str, Any]
WARM_UP_STEPS = 2


def append(path: Path, row: Row) -> None:
    """Adds a row to a file of JSON lines: a stage that is stopped keeps what it has measured."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """All rows of a file of JSON lines; none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def measure(step: Step, device: str, repetitions: int) -> Row:
    """Median milliseconds of a step, its peak memory beside its inputs, and how it was timed.

    On a GPU the step is captured into a CUDA graph and replayed, so that gaps between launches do
    not count. What cannot be captured, because it waits for the GPU, is timed as it is. A step for
    which the memory does not suffice has no time, and says so.
    """
    if device == "cpu":
        return {"milliseconds": statistics.median(_seconds(step, repetitions)), "timed": "eager"}
    try:
        return _measure_on_gpu(step, repetitions)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"milliseconds": None, "timed": "out of memory"}


def _seconds(step: Step, repetitions: int) -> Iterator[float]:
    for _ in range(repetitions):
        start = time.perf_counter()
        step()
        yield 1e3 * (time.perf_counter() - start)


def _measure_on_gpu(step: Step, repetitions: int) -> Row:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as a capture asks for
        for _ in range(WARM_UP_STEPS):
            step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    graph, timed = torch.cuda.CUDAGraph(), "graph"
    try:
        # Threads of NCCL ask for events meanwhile, which a stricter mode takes for a fault.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        replay: Step = graph.replay
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        replay, timed = step, "eager"
    times = statistics.median(_milliseconds_on_gpu(replay, repetitions))
    return {"milliseconds": times, "peak_megabytes": peak / 1e6, "timed": timed}


def _milliseconds_on_gpu(step: Step, repetitions: int) -> Iterator[float]:
    step()
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end)
