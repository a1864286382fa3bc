"""Lets torchtitan 0.3.0 train without a GPU, for trials: it asks the device for what a CPU has not.

To be called before anything else of torchtitan is imported.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def activate() -> None:
    """Makes the CPU, over gloo, torchtitan's device."""
    from torchtitan.tools import utils

    device: Any = torch.cpu
    utils.device_type, utils.device_module = "cpu", device
    # What its log of memory reads.
    device.get_device_name = lambda *_: "CPU"
    device.get_device_properties = lambda *_: SimpleNamespace(total_memory=1)
    device.memory_stats = lambda *_: {}
    for name in ("reset_peak_memory_stats", "empty_cache"):
        setattr(device, name, lambda *_: None)
    from torchtitan.distributed import utils as of_ranks

    # Gloo's barrier takes no device.
    of_ranks.set_pg_timeouts = lambda *_, **__: None


def reduce_over_gloo(model: nn.Module) -> None:
    """Has FSDP scale gradients by itself, which it leaves to NCCL."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
