"""Gives the functions of ``torch.cuda`` that Megatron calls a CPU meaning.

One device exists, its streams and events are ordered by program order, its random generator is the
default CPU generator. Functions that Megatron does not call are left alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import torch


class _Stream:
    """A stream on a device that executes in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0
        self.device = torch.device("cpu")

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event


class _Event:
    """A point in program order, with the wall clock as its time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_at = 0.0

    def record(self, stream: object | None = None) -> None:
        self._recorded_at = time.perf_counter()

    def wait(self, stream: object | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds between two recorded events."""
        return (end._recorded_at - self._recorded_at) * 1e3


_CURRENT_STREAM = _Stream()


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[object]:
    yield stream


def _device_properties(device: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="CPU",
        major=0,
        minor=0,
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=torch.get_num_threads(),
    )


def _resident_bytes(device: object = None) -> int:
    return int(psutil.Process().memory_info().rss)


def _memory_stats(device: object = None) -> dict[str, int]:
    resident = _resident_bytes()
    keys = ("reserved_bytes.all", "allocated_bytes.all")
    stats = {f"{key}.{kind}": resident for key in keys for kind in ("current", "peak")}
    return {**stats, "allocation.all.current": 0, "num_alloc_retries": 0}


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.default_generator.set_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _returning(value: object) -> Callable[..., object]:
    return lambda *args, **kwargs: value


def _call_now(function: Callable[[], object], **kwargs: object) -> None:
    function()


def _no_compile(model: Any = None, **kwargs: Any) -> Any:
    return model if model is not None else lambda function: function


_RANDOM = {
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": _manual_seed,
    "manual_seed_all": _manual_seed,
}

_CUDA = {
    **_RANDOM,
    "is_available": _returning(True),
    "is_initialized": _returning(True),
    "is_bf16_supported": _returning(True),
    "device_count": _returning(1),
    "current_device": _returning(0),
    "set_device": _returning(None),
    "synchronize": _returning(None),
    "empty_cache": _returning(None),
    "init": _returning(None),
    "_lazy_init": _returning(None),
    "_lazy_call": _call_now,
    "Stream": _Stream,
    "Event": _Event,
    "current_stream": _returning(_CURRENT_STREAM),
    "default_stream": _returning(_CURRENT_STREAM),
    "set_stream": _returning(None),
    "is_current_stream_capturing": _returning(False),
    "stream": _stream_context,
    "device": _stream_context,
    "get_device_properties": _device_properties,
    "get_device_capability": _returning((0, 0)),
    "get_device_name": _returning("CPU"),
    "memory_stats": _memory_stats,
    "memory_allocated": _resident_bytes,
    "memory_reserved": _resident_bytes,
    "max_memory_allocated": _resident_bytes,
    "max_memory_reserved": _resident_bytes,
    "device_memory_used": _resident_bytes,
    "reset_peak_memory_stats": _returning(None),
}


def install() -> None:
    """Replaces the functions listed above in ``torch.cuda``."""
    for name, replacement in _CUDA.items():
        setattr(torch.cuda, name, replacement)
    for name, replacement in _RANDOM.items():
        setattr(torch.cuda.random, name, replacement)
    torch.cuda.default_generators = (torch.default_generator,)
    # Megatron calls the C entry point where it exists, which would initialise a driver.
    if hasattr(torch._C, "_cuda_setRNGState"):
        torch._C._cuda_setRNGState = _set_rng_state
    # Megatron decorates its fusions with torch.compile when it is imported; compiling them for
    # every shape takes longer than a small run.
    torch.compile = _no_compile
    # The DataLoader asks these before it pins memory for an accelerator.
    torch.accelerator.is_available = _returning(False)  # type: ignore[assignment]
    torch.accelerator.current_device_index = _returning(0)  # type: ignore[assignment]
