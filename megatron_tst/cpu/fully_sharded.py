"""Lets Megatron's wrapper of FSDP2 shard over gloo."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.distributed.device_mesh import DeviceMesh


class MeshOfCPUs:
    """In place of ``DeviceMesh`` in Megatron's wrapper, which names the device cuda."""

    @staticmethod
    def from_group(group: Any, device_type: str) -> DeviceMesh:
        """The processes of ``group``, on the CPU."""
        return DeviceMesh.from_group(group, "cpu")


def by_sums(fully_shard: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``fully_shard``: it leaves the average of gradients to NCCL, and gloo can only add."""

    @functools.wraps(fully_shard)
    def shard(module: Any, **kwargs: Any) -> Any:
        sharded = fully_shard(module, **kwargs)
        sharded.set_force_sum_reduction_for_comms(True)
        return sharded

    return shard
