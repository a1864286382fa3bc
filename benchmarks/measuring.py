"""Time by turns, and peak memory in a process of its own."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_tst.common import atomic_files

Contestant = Callable[[], object]


def seconds_by_turns(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, float]:
    """Median time of each contestant; they take turns, so that a busy machine slows all of them."""
    result: dict[str, float] = _in_a_process(_measure_turns, contestants, rounds)
    return result


def peak_bytes(contestant: Contestant) -> int:
    """Memory that a contestant takes at most, on top of what there was before."""
    result: int = _in_a_process(_measure_peak, contestant)
    return result


def _in_a_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Measures in a fork of this process, which so keeps none of the memory of the contestants."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(measure(*arguments)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _measure_turns(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(of_one) for name, of_one in times.items()}


def _measure_peak(contestant: Contestant) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    contestant()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def write_json(path: Path | None, results: Any) -> None:
    """Writes results, if asked to; the file appears when it is complete."""
    if path is not None:
        atomic_files.write_json(path, results)
