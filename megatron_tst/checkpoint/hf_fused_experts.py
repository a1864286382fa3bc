"""The experts of a layer in one tensor, as transformers 5 holds them in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from math import prod

from megatron_tst.checkpoint.hf_shapes import ModelShape
from megatron_tst.checkpoint.safetensors_reader import StoredWeight
from megatron_tst.common.errors import UsageError

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def split_fused_experts(
    weights: Mapping[str, StoredWeight], shape: ModelShape
) -> dict[str, StoredWeight]:
    """The weights with a name for each expert: places in the same files, nothing is read.

    Args:
        weights: by name. ``mlp.experts.gate_up_proj`` is [E, 2f, h], the gate first, and
            ``mlp.experts.down_proj`` [E, h, f], in every class of transformers that is imported.
        shape: sizes of the model.

    Raises:
        UsageError: a fused weight is of another shape, or an expert is there twice.
    """
    separate: dict[str, StoredWeight] = {}
    for name, weight in weights.items():
        prefix, _, last = name.rpartition(".")
        is_fused = prefix.endswith(".mlp.experts") and last in _PARTS
        parts = _experts(prefix, last, weight, shape) if is_fused else [(name, weight)]
        for part, place in parts:
            if part in separate or (is_fused and part in weights):
                raise UsageError(
                    f"{part} in {weight.file} is also a part of {prefix}.*_proj, which holds all "
                    "experts: the folder mixes two models, copy it again."
                )
            separate[part] = place
    return separate


def _experts(
    prefix: str, last: str, weight: StoredWeight, shape: ModelShape
) -> Iterator[tuple[str, StoredWeight]]:
    parts = _PARTS[last]
    is_down = last == "down_proj"
    size = (shape.hidden, shape.ffn) if is_down else (shape.ffn, shape.hidden)
    expected = (shape.experts, len(parts) * size[0], size[1])
    if weight.size != expected:
        raise UsageError(
            f"{prefix}.{last} in {weight.file} has shape {list(weight.size)}, and config.json "
            f"gives {list(expected)}: the folder mixes two models."
        )
    for expert in range(shape.experts):
        for half, part in enumerate(parts):
            elements = (expert * len(parts) + half) * prod(size)
            yield (
                f"{prefix}.{expert}.{part}.weight",
                dataclasses.replace(
                    weight, offset=weight.offset + elements * weight.dtype.itemsize, size=size
                ),
            )
