"""Lets the distributed optimizer load a float32 checkpoint in its default format.

Megatron-Core 0.19 copies the saved weights into the weights of the model. In bf16 those are copies
of them; in float32 they require gradients, and torch refuses: a run could not be continued.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def load_without_gradients() -> None:
    """Turns gradients off while the optimizer loads its state. Idempotent.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    name = "load_parameter_state_from_dp_reshardable"
    if not hasattr(DistributedOptimizer, name):
        raise RuntimeError(
            f"megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.{name} does not exist "
            f"in megatron-core {version('megatron-core')}: install the version pinned in "
            "pyproject.toml."
        )
    upstream = getattr(DistributedOptimizer, name)
    upstream = getattr(upstream, "__wrapped__", upstream)
    setattr(DistributedOptimizer, name, torch.no_grad()(upstream))
