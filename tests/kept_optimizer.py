"""What the ranks of a run hold of the optimizer, and what a checkpoint of it should have."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MAIN = "tests.kept_optimizer:main"
# Megatron gives them the names that they have within a layer of Transformer Engine.
_SAVED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def main() -> int:
    """Trains as the entry point does, under the conditions in the environment.

    KEEP_STATE: a folder where each rank writes its share of the optimizer after every step.
    UNMENDED_OPTIMIZER: saves as Megatron does.
    """
    from megatron_tst.training import pretrain

    if os.environ.get("UNMENDED_OPTIMIZER"):
        pretrain.mend_saved_optimizer = lambda: None  # type: ignore[attr-defined]
    folder = Path(os.environ["KEEP_STATE"])
    folder.mkdir(parents=True, exist_ok=True)

    def after_step(step: Any) -> None:
        name = f"{step.iteration}-{torch.distributed.get_rank()}.pt"
        torch.save(list(_pieces(step)), folder / name)

    return pretrain.main(after_step)


def _pieces(step: Any) -> Iterator[dict[str, Any]]:
    """Of each parameter that this rank has a part of: where it is saved, and its tensors."""
    from megatron.core import mpu

    names = {id(p): name for chunk in step.model for name, p in chunk.named_parameters()}
    optimizers = step.optimizer.chained_optimizers
    for place, optimizer in enumerate(optimizers):
        prefix = f"chained_{place}." if len(optimizers) > 1 else ""
        prefix += f"optimizer.distributed.dp_group_idx_{optimizer.data_parallel_group_idx}"
        for index, number, dtype, parameter, ranges in _shares(optimizer):
            bucket = optimizer.buffers[index].buckets[number]
            state = optimizer._get_main_param_and_optimizer_states(parameter)
            part, in_bucket = ranges["param"], ranges["gbuf_world_in_bucket"]
            yield {
                "name": names[id(parameter)].replace("module.", ""),
                "shape": tuple(parameter.shape),
                "expert_rank": mpu.get_expert_model_parallel_rank(),
                "part": (part.start, part.end),
                "bucket": f"{prefix}.gbuf_idx_{index}.dtype_{dtype}.bucket_idx_{number}",
                "in_bucket": (in_bucket.start, in_bucket.end),
                "bucket_elements": bucket.numel_unpadded,
                "bucket_padding": bucket.grad_data.numel() - bucket.numel_unpadded,
                "state": {name: value.clone() for name, value in state.items()},
            }


def _shares(optimizer: Any) -> Iterator[tuple[int, int, Any, Any, Any]]:
    for index, bucket_maps in enumerate(optimizer.gbuf_ranges):
        for dtype, buckets in bucket_maps.items():
            for number, bucket in enumerate(buckets):
                for parameter, ranges in bucket["param_map"].items():
                    yield index, number, dtype, parameter, ranges


def kept(folder: Path, step: int) -> list[dict[str, Any]]:
    """What all ranks held after a step."""
    files = folder.glob(f"{step}-*.pt")
    return [piece for file in files for piece in torch.load(file, weights_only=False)]


def by_bucket(pieces: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What a checkpoint in the default format has: buckets without their end, zeros between."""
    saved: dict[str, torch.Tensor] = {}
    for piece in pieces:
        for name, value in piece["state"].items():
            key = f"{piece['bucket']}.{name}"
            whole = saved.setdefault(key, torch.zeros(piece["bucket_elements"]))
            whole[slice(*piece["in_bucket"])] = value
    return saved


def by_parameter(pieces: list[dict[str, Any]], experts: int = 0) -> dict[str, torch.Tensor]:
    """What a fully reshardable checkpoint has: a tensor for all layers and experts of a kind.

    Args:
        pieces: of ranks without tensor or pipeline parallelism.
        experts: that each expert-parallel rank has.
    """
    parts: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    for piece in pieces:
        kind, place = _kind_of(piece, experts)
        for name, value in piece["state"].items():
            # Only what some rank holds may be equal to something.
            whole = torch.full(piece["shape"], torch.nan)
            whole = parts.setdefault((f"optimizer.state.{name}.{kind}", place), whole)
            whole.view(-1)[slice(*piece["part"])] = value
    saved = {}
    for kind in {kind for kind, _ in parts}:
        places = sorted(place for other, place in parts if other == kind)
        sizes = [last + 1 for last in places[-1]]
        stacked = torch.stack([parts[kind, place] for place in places])
        saved[kind] = stacked.view(*sizes, *stacked.shape[1:])
    return saved


def _kind_of(piece: dict[str, Any], experts: int) -> tuple[str, tuple[int, ...]]:
    """The name without layer and expert, and these."""
    name, place = piece["name"], []
    if match := re.search(r"layers\.(\d+)\.", name):
        place.append(int(match.group(1)))
        name = name.replace(match.group(), "layers.")
    if match := re.search(r"local_experts\.(\d+)\.", name):
        place.append(int(match.group(1)) + experts * piece["expert_rank"])
        name = name.replace(match.group(), "experts.")
    for own, saved in _SAVED_NAMES.items():
        name = name.replace(own, saved)
    return name, tuple(place)
