"""What Megatron's ``--use-torch-fsdp2`` does not do by itself."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing import optimizer as of_checkpoints
from torch.distributed.tensor import DTensor

from megatron_tst.training.upstream import unwrapped


def find_sharded_parameters() -> None:
    """Lets a checkpoint find the parameters of the model among those of the optimizer. Idempotent.

    Megatron-Core 0.19.2 compares the identity of what ``DTensor.to_local`` returns, which newer
    releases of torch make anew at each call, and no checkpoint could be saved.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    name = "to_local_if_dtensor"
    unwrapped(of_checkpoints, name)
    setattr(of_checkpoints, name, _local_part)


def _local_part(tensor: Any) -> Any:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
