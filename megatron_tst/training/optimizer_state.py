"""Lets the distributed optimizer load a float32 checkpoint in its default format.

Megatron-Core 0.19 copies the saved weights into the weights of the model. In bf16 those are copies
of them; in float32 they require gradients, and torch refuses: a run could not be continued.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_tst.training.upstream import unwrapped


def load_without_gradients() -> None:
    """Turns gradients off while the optimizer loads its state. Idempotent.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    name = "load_parameter_state_from_dp_reshardable"
    setattr(DistributedOptimizer, name, torch.no_grad()(unwrapped(DistributedOptimizer, name)))
