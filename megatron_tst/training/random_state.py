"""Keeps the random state of each rank in a checkpoint, beside the one that Megatron keeps.

Megatron-Core 0.19 saves one state for all data-parallel ranks of a pipeline and tensor-parallel
rank, and gives it back to all of them. Expert-parallel ranks have random streams of their own
(``model_parallel_cuda_manual_seed``), from which random routing draws: after a resume all of them
drew what the first one would have drawn. Upstream's own fix is Megatron-LM PR 6858.

The states of all ranks are one more entry of the checkpoint. Megatron alone reads such a checkpoint
as any other, and a checkpoint without the entry, or of another layout, is read as Megatron reads
it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.training import print_rank_0
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_tst.training.checkpoint_choice import checkpoint_to_load
from megatron_tst.upstream.patches import wrap

_STATE = "rng_state"
_STATE_OF_RANK_0 = "tst_rng_state_of_rank_0"
_PREFIX = "tst_"


def keep_random_state_of_each_rank() -> None:
    """Makes Megatron save and load the random state of each rank. Idempotent.

    It wraps ``checkpointing.generate_state_dict``, which makes what is saved, and what is to be
    filled from a checkpoint.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    wrap("megatron.training.checkpointing:generate_state_dict", _with_state_of_each_rank)


def _with_state_of_each_rank(upstream: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(upstream)
    def generate_state_dict(
        args: Namespace, *positional: Any, iteration: int | None = None, **named: Any
    ) -> dict[str, Any]:
        is_loading = iteration is None
        with _loading_what_is_not_saved(args, is_loading):
            state: dict[str, Any] = upstream(args, *positional, iteration=iteration, **named)
        common = state.get(_STATE)
        if not isinstance(common, ShardedObject) or args.non_persistent_ckpt_type == "local":
            return state
        if not _ranks_differ(args):
            return state
        own = _of_this_rank(common)
        if not is_loading:
            state[own.key] = own
        elif _is_in_checkpoint(own, args):
            # Megatron takes what it finds under this name; the other is read and not used.
            state[_STATE], state[_STATE_OF_RANK_0] = own, common
        else:
            print_rank_0(
                f"> {args.load} does not hold the random states of {args.world_size} ranks: those "
                "of expert-parallel ranks start as the first one's, and random routing does not "
                "repeat that of an uninterrupted run"
            )
        return state

    return generate_state_dict


@contextmanager
def _loading_what_is_not_saved(args: Namespace, is_loading: bool) -> Iterator[None]:
    """Keeps ``--no-save-optim`` and ``--no-save-rng``, which are about saving, out of a load.

    Megatron looks for what it did not load, and ends; for the random state with exit code 0.
    """
    saved = args.no_save_optim, args.no_save_rng
    if is_loading:
        args.no_save_optim = args.no_save_rng = None
    try:
        yield
    finally:
        args.no_save_optim, args.no_save_rng = saved


def _ranks_differ(args: Namespace) -> bool:
    """Whether data-parallel ranks have random streams that differ."""
    if args.world_size == args.tensor_model_parallel_size * args.pipeline_model_parallel_size:
        return False
    experts = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return bool(args.expert_model_parallel_size > 1 or experts != args.tensor_model_parallel_size)


def _of_this_rank(common: ShardedObject) -> ShardedObject:
    """The random state of this rank as an entry that no other rank has.

    Args:
        common: what Megatron made of it: the states of one rank, or with
            ``--data-parallel-random-init`` of all ranks of the data-parallel group.
    """
    states = list(common.data)
    if len(states) > 1:
        own = mpu.get_data_parallel_rank()
        # Megatron looks at this place only.
        states = [state if rank == own else None for rank, state in enumerate(states)]
    pipeline, tensor = common.global_shape
    replicas = torch.distributed.get_world_size() // (pipeline * tensor)
    return ShardedObject(
        f"{_PREFIX}{common.key}",
        states,
        (*common.global_shape, replicas),
        (*common.global_offset, common.replica_id),
    )


def _is_in_checkpoint(entry: ShardedObject, args: Namespace) -> bool:
    """Whether the checkpoint to load has an entry, and so those of all other ranks. Collective."""
    found = [False]
    if torch.distributed.get_rank() == 0:
        folder = checkpoint_to_load(args)
        assert folder is not None, "a checkpoint is being loaded"
        metadata = FileSystemReader(folder).read_metadata()
        found = [entry.unique_key in metadata.state_dict_metadata]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]
