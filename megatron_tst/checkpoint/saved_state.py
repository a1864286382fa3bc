"""What a checkpoint has of each weight: itself, its master and its moments, by their names."""

from __future__ import annotations

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_tst.checkpoint.saved_values import count_far_weights, count_other_weights
from megatron_tst.checkpoint.stored_shards import StoredShard, shards_by_key
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint

MASTER_NAMES = ("param", "fp32_param")
"""What the formats of Megatron's optimizers call a master weight."""
FIRST_MOMENT, SECOND_MOMENT = "exp_avg", "exp_avg_sq"

_OF_A_WEIGHT = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+?)\.(.+)")
_OF_A_BUCKET = re.compile(
    r"((?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\..*\.bucket_idx_\d+)\.(\w+)"
)
_OF_AN_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")


@dataclass
class SavedWeight:
    """A weight, of all layers and experts, and what the optimizer has of it.

    Attributes:
        key: of the weight; it may have no shards.
        shards: of the weight.
        state: shards of each tensor of the optimizer by its name, such as ``exp_avg``.
    """

    key: str
    shards: list[StoredShard]
    state: dict[str, list[StoredShard]] = field(default_factory=dict)

    @property
    def masters(self) -> list[StoredShard]:
        """Of the master weight; empty without one."""
        return master_shards(self.state)

    @cached_property
    def by_box(self) -> Mapping[Any, StoredShard]:
        """Shards of the weight by their place."""
        return {shard.box: shard for shard in self.shards}


@dataclass
class SavedState:
    """The tensors of a checkpoint.

    Attributes:
        source: the checkpoint.
        shards: of all tensors by key.
        weights: by key.
        buckets: of the default format of the distributed optimizer, which has a row of numbers for
            many weights: shards by the name of the bucket and of the tensor.
    """

    source: TorchDistCheckpoint
    shards: dict[str, list[StoredShard]]
    weights: dict[str, SavedWeight]
    buckets: dict[str, dict[str, list[StoredShard]]]


def read_saved_state(folder: Path) -> SavedState:
    """Sorts the tensors of a checkpoint; reads none of them.

    Args:
        folder: of the iteration.

    Raises:
        UsageError: the index cannot be read.
    """
    source = TorchDistCheckpoint(folder)
    weights: dict[str, SavedWeight] = {}
    buckets: dict[str, dict[str, list[StoredShard]]] = defaultdict(dict)
    by_key = shards_by_key(folder, source.index)
    for key, shards in by_key.items():
        if match := _OF_A_WEIGHT.fullmatch(key):
            state, of = match.groups()
            weights.setdefault(of, SavedWeight(of, [])).state[state] = shards
        elif match := _OF_A_BUCKET.fullmatch(key):
            bucket, state = match.groups()
            buckets[bucket][state] = shards
        elif _OF_AN_OPTIMIZER.match(key):
            weights.setdefault(key, SavedWeight(key, [])).state[key] = shards
        else:
            weights.setdefault(key, SavedWeight(key, [])).shards = shards
    return SavedState(source, by_key, weights, dict(buckets))


def master_shards(state: Mapping[str, list[StoredShard]]) -> list[StoredShard]:
    """Master weights among the tensors of an optimizer.

    Integers are none: they are what a weight lacks of its master (TE's FusedAdam has them).
    """
    for name in MASTER_NAMES:
        shards = state.get(name, [])
        if shards and shards[0].dtype.is_floating_point:
            return shards
    return []


def arguments_that_round(args: Namespace) -> list[str]:
    """Arguments of a run with which a weight may be another number than the nearest to its master.

    A checkpoint has quantized weights in the dtype of the model.
    """
    names = ("fp8_param_gather", "fp4_param_gather", "qk_clip")
    flags = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name, False)]
    # Validation makes dtypes of the names.
    if str(getattr(args, "main_params_dtype", "fp32")) not in ("fp32", "torch.float32"):
        flags.append("--main-params-dtype")
    return flags


def comparison_of_masters(args: Namespace) -> Callable[[Tensor, Tensor], tuple[int, int]]:
    """Counts wrong masters, and zeros among them, given masters and weights."""
    return count_far_weights if arguments_that_round(args) else count_other_weights
