"""Whether Triton kernels can run on a device, and what they accept; needs no Triton itself."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from megatron_tst.common.errors import UsageError

Implementation = Literal["auto", "torch", "triton"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device.

    They can on CUDA. On the CPU only Triton's interpreter runs them, far too slowly for anything
    but tests: ``TRITON_INTERPRET=1`` must be set before Triton is imported, and applies to the
    whole process.
    """
    if find_spec("triton") is None:
        return False
    return device.type == "cuda" or (device.type == "cpu" and is_interpreted())


def uses_triton(implementation: Implementation, tensor: Tensor) -> bool:
    """Whether an operation on this tensor takes its kernel.

    Args:
        implementation: ``auto`` takes it on CUDA, where Triton is installed and for the dtypes that
            it has; ``torch`` never; ``triton`` always.
        tensor: what it reads.

    Raises:
        ValueError: ``triton`` where it cannot run.
    """
    if implementation == "auto":
        return tensor.is_cuda and tensor.dtype in _DTYPES and available(tensor.device)
    if implementation == "triton" and not available(tensor.device):
        raise UsageError(
            f"implementation is 'triton', and tensors are on {tensor.device.type}: Triton kernels "
            "need a GPU and Triton installed. Use 'auto' or 'torch'."
        )
    return implementation == "triton"


def is_interpreted() -> bool:
    """Whether this process interprets kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require_rows(name: str, tensor: Tensor) -> None:
    """Refuse what the kernels cannot read or write.

    Raises:
        ValueError: not two-dimensional, columns not next to each other, or a dtype other than
            float32, bfloat16 and float16.
    """
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"{name} is {tensor.dtype}: the Triton kernels compute in float32 and take float32, "
            "bfloat16 or float16; use the torch implementation."
        )
    if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: "
            "pass two dimensions with a column stride of 1."
        )


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less; 1 for 0."""
    return 1 << max(0, number - 1).bit_length()
