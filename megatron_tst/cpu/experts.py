"""Experts on a CPU: their numbers of tokens are rounded up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Fewer rows are not worth a shape of their own.
_LEAST_BLOCK = 64


def pad_rows(forward: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Any]:
    """Wraps ``MLP.forward``: an expert computes some rows of zeros more, and drops them.

    oneDNN compiles a half-precision matrix product for every shape, which takes milliseconds, and
    keeps it, which takes memory. An expert has another number of tokens in every step. In single
    precision nothing is compiled.
    """

    @functools.wraps(forward)
    def padded(
        self: Any, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # Only tokens that were routed come with a scale.
        is_half = hidden_states.dtype in (torch.bfloat16, torch.float16)
        rows = len(hidden_states)
        missing = -rows % _block(rows) if per_token_scale is not None and is_half else 0
        if per_token_scale is None or not missing:
            return forward(self, hidden_states, per_token_scale, **kwargs)
        output, bias = forward(
            self,
            F.pad(hidden_states, (0, 0, 0, missing)),
            F.pad(per_token_scale, (0, missing)),
            **kwargs,
        )
        return output[:rows], bias

    return padded


def _block(rows: int) -> int:
    """Rows are rounded up to a multiple of this power of two: at most a sixteenth is added to many,
    and there are at most sixteen shapes between a number and its double."""
    return max(_LEAST_BLOCK, 1 << max(rows.bit_length() - 5, 0))
