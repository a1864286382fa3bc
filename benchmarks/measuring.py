"""Time by turns, peak memory in a process of its own, and the time to copy files."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_tst.common import atomic_files

Contestant = Callable[[], object]
_COPIED_AT_A_TIME = 1 << 24
# M_MMAP_THRESHOLD of malloc.h.
_MMAP_THRESHOLD = -3


def seconds_by_turns(
    contestants: Mapping[str, Contestant],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median time of each contestant; they take turns, so that a busy machine slows all of them.

    Args:
        contestants: by name.
        rounds: runs of each.
        clock: ``time.process_time`` leaves out the time in which others have the core.
    """
    result: dict[str, float] = _in_a_process(_measure_turns, contestants, rounds, clock)
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


def _measure_turns(
    contestants: Mapping[str, Contestant], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            start = clock()
            contestant()
            times[name].append(clock() - start)
    return {name: statistics.median(of_one) for name, of_one in times.items()}


def _measure_peak(contestant: Contestant) -> int:
    # What is held, not what the allocator keeps of what was freed: by default glibc raises the size
    # from which memory goes back at once, and how much stays then differs from run to run.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 65536)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    contestant()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process that has no memory of anything before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def process_peak_bytes() -> int:
    """The most memory that this process has held."""
    return _status("VmHWM")


def check_space(folder: Path, needed: int) -> bool:
    """Whether a folder has so many bytes free; says so if not."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        print(f"error: {folder} needs {needed:,} bytes free and has {free:,}", file=sys.stderr)
    return free >= needed


def copy_seconds(folder: Path) -> float:
    """The time to read all files of a folder from the disk and to write them there again.

    Afterwards none of them is in the cache of the system, as far as it lets itself be told.
    """
    files = [file for file in folder.rglob("*") if file.is_file()]
    _forget(files)
    with removed_afterwards(folder.with_name("copied")) as copied:
        copied.mkdir()
        start = time.perf_counter()
        for number, file in enumerate(files):
            with file.open("rb") as source, (copied / str(number)).open("wb") as target:
                shutil.copyfileobj(source, target, _COPIED_AT_A_TIME)
                target.flush()
                os.fsync(target.fileno())
        seconds = time.perf_counter() - start
    _forget(files)
    return seconds


def _forget(files: list[Path]) -> None:
    os.sync()
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def removed_afterwards(folder: Path) -> Iterator[Path]:
    """A folder that is removed at the end, whoever made it."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path | None, results: Any) -> None:
    """Writes results, if asked to; the file appears when it is complete."""
    if path is not None:
        atomic_files.write_json(path, results)
