"""Optimizer kernels for the CPU in place of Transformer Engine's and apex's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Adam):
    """Adam that updates all parameters in one call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "fused": True})


class FusedAdamW(torch.optim.AdamW):
    """AdamW that updates all parameters in one call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "fused": True})


def l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Euclidean norm over all tensors, [1] float32; the second result is upstream's, unused."""
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    norms = torch._foreach_norm(tensors, 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def scale(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], factor: float
) -> None:
    """Writes the first list, multiplied by ``factor``, into the second, casting to its dtypes."""
    source, target = tensor_lists
    if source is target:
        torch._foreach_mul_(target, factor)
        return
    # Scaled before the cast, so that a bfloat16 destination is rounded once.
    torch._foreach_copy_(target, source if factor == 1.0 else torch._foreach_mul(source, factor))
