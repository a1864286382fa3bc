"""What Megatron's ``--use-torch-fsdp2`` does not do by itself, in Megatron-Core 0.19.2."""

from __future__ import annotations

import copy
import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.tensor import DTensor

from megatron_tst.common.errors import UsageError
from megatron_tst.settings.fully_sharded import uneven_shards
from megatron_tst.upstream.patches import replace, wrap


def mend_fully_sharded() -> None:
    """Lets checkpoints be saved, and per-token losses scale their gradients. Idempotent.

    A checkpoint finds the parameters of the model among those of the optimizer by the identity of
    what ``DTensor.to_local`` returns, which newer releases of torch make anew at each call. It
    takes the shards of an expert for copies of one. And ``--calculate-per-token-loss`` divides by
    the number of tokens in a function that the wrapper of FSDP2 leaves empty.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    replace("megatron.core.dist_checkpointing.optimizer:to_local_if_dtensor", _local_part)
    replace(
        "megatron.core.distributed.torch_fully_sharded_data_parallel:"
        "TorchFullyShardedDataParallel.scale_gradients",
        _scale_gradients,
    )
    wrap("megatron.core.transformer.moe.experts:SequentialMLP.sharded_state_dict", _without_copies)


def refuse_uneven_shards(models: list[Any], args: Namespace) -> list[Any]:
    """A pre-wrap hook for Megatron's model configurations, which returns the models.

    Args:
        models: built chunks of this rank.
        args: Megatron's, validated.

    Raises:
        UsageError: the run saves, and its shards could not be.
    """
    ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
    for model in models if args.save else []:
        shapes = ((name, parameter.shape) for name, parameter in model.named_parameters())
        message = uneven_shards(shapes, ranks, args.swiglu)
        if message is not None:
            raise UsageError(message)
    return models


def continue_counting(optimizer: Any, saved: dict[str, Any]) -> None:
    """Sets the count of steps, by which Adam corrects its moments, to that of a checkpoint.

    Megatron loads moments and weights in place, and nothing else of the optimizer.

    Args:
        optimizer: Megatron's, possibly of several parts.
        saved: what all ranks share of its state in the checkpoint.
    """
    of_group = next(_values(saved, "step"), None)
    of_parameter = next(_values(saved, "common_step"), None)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            if of_group is not None:
                group["step"] = copy.deepcopy(of_group)
        for state in part.optimizer.state.values():
            if of_parameter is not None:
                state["step"] = copy.deepcopy(of_parameter)


def _values(state: Any, name: str) -> Iterator[Any]:
    """What dictionaries in dictionaries and lists have under a name."""
    if isinstance(state, dict):
        if name in state:
            yield state[name]
        state = list(state.values())
    if isinstance(state, list):
        for part in state:
            yield from _values(part, name)


def _without_copies(upstream: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(upstream)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = upstream(self, *args, **kwargs)
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            for entry in state.values():
                if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                    entry.replica_id = (*entry.replica_id[:2], 0)
        return state

    return sharded_state_dict


def _local_part(tensor: Any) -> Any:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _scale_gradients(self: Any, scaling_factor: Any) -> None:
    # FSDP has taken the mean over the ranks, and Megatron's factor is that of a sum.
    factor = scaling_factor * self.process_group.size()
    for parameter in self.parameters():
        if parameter.grad is not None:
            _local_part(parameter.grad).mul_(factor)
