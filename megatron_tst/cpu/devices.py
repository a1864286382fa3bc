"""Lets tensors and modules that are asked onto a CUDA device stay on the CPU.

Only the functions that take a device are wrapped, so that no other operator pays for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
)
_NEW_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
_CPU = torch.device("cpu")


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function with a ``device`` keyword so that a CUDA device means the CPU."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapper


def _to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``.to``, whose device is a keyword or the first positional argument."""

    @functools.wraps(to)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        elif "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return to(self, *args, **kwargs)

    return wrapper


def _stay(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def _type_name(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``Tensor.type``: Megatron's optimizer compares the names of CUDA tensor types."""

    @functools.wraps(tensor_type)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    return wrapper


def install() -> None:
    """Wraps the functions and methods of torch that take a device."""
    # ``with torch.device("meta")`` knows the factories by identity, from its first use on.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _NEW_METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    torch.Tensor.to = _to_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    torch.nn.Module.to = _to_cpu(torch.nn.Module.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = _stay  # type: ignore[method-assign]
    torch.nn.Module.cuda = _stay  # type: ignore[method-assign]
    torch.Tensor.pin_memory = _stay  # type: ignore[method-assign]
    # Memory is freed in program order.
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]
    torch.Tensor.type = _type_name(torch.Tensor.type)  # type: ignore[method-assign]
