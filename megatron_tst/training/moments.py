"""Gives an optimizer that has done no step yet the state that its first step would start from.

With fp16 the first steps are skipped until the loss scale fits, and the optimizer makes its moments
in the first that is not. Megatron would save a checkpoint without them, and could not load it.
"""

from __future__ import annotations

from typing import Any

import torch


def fill_moments(optimizer: Any) -> None:
    """Makes the moments of an optimizer that has none, zero as they start. Idempotent, local.

    Left alone are optimizers whose state is more than moments: torch's own counts the steps of each
    parameter, and a precision-aware one may keep the main weights.

    Args:
        optimizer: Megatron's, possibly of several parts.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None or len(inner.state) > 0 or isinstance(inner, torch.optim.Adam):
            continue
        if part.config.optimizer == "adam" and not part.config.use_precision_aware_optimizer:
            part.init_state_fn(inner, part.config)
