"""Lets the distributed optimizer load a float32 checkpoint in its default format.

Megatron-Core 0.19 copies the saved weights into the weights of the model. In bf16 those are copies
of them; in float32 they require gradients, and torch refuses: a run could not be continued.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_tst.upstream.patches import wrap


def load_without_gradients() -> None:
    """Turns gradients off while the optimizer loads its state. Idempotent.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    wrap(
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer.load_parameter_state_from_dp_reshardable",
        _without_gradients,
    )


def _without_gradients(load: Callable[..., Any]) -> Callable[..., Any]:
    return torch.no_grad()(load)
