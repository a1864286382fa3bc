"""Models of Transformer Engine's modules on the meta device: what they consist of and save.

Called through ``tests.preflight_cases``, in whose process the CPU platform is on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.training.checkpointing import _build_sharded_state_dict_metadata

from megatron_tst.checkpoint.hf_import import import_from_huggingface
from megatron_tst.checkpoint.hf_mapping import KeyLayout, stored_shapes, weight_slices
from megatron_tst.checkpoint.hf_shapes import shape_from_arguments
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_index import read_index
from megatron_tst.checkpoint.tracker import RELEASE
from megatron_tst.model.model import superpose_built_models
from megatron_tst.preflight import rank_simulation
from megatron_tst.preflight.corpus_check import resolve_vocabulary
from megatron_tst.preflight.engine import enter_recipes
from megatron_tst.settings.arguments import superposition_config_from_args
from tests.hf_models import save_model

# What a launch has besides the arguments that an import prints.
_RUN = (
    "--transformer-impl transformer_engine --moe-grouped-gemm --seq-length 24 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 20 --lr 1e-3 --data-path none --bf16 "
    "--moe-token-dispatcher-type alltoall"
)


def _configured(argv: list[str], world_size: int) -> tuple[argparse.Namespace, Any]:
    args = rank_simulation.parse(rank_simulation.launch_parser(), argv, world_size)
    rank_simulation.validate(args)
    resolve_vocabulary(args, None)
    return args, rank_simulation.build_configuration(args)


def model_keys(argv: list[str], world_size: int) -> dict[str, Any]:
    """Keys of a model in memory, before and after it was superposed, and its module classes."""
    args, config = _configured(argv, world_size)
    stages = [
        rank_simulation.build_stage(args, config, rank)
        for rank in rank_simulation.stage_ranks(args)
    ]
    chunks: list[Any] = [getattr(c, "module", c) for stage in stages for c in stage.chunks]
    classes = {type(module).__name__ for chunk in chunks for module in chunk.modules()}
    stock = [list(chunk.state_dict()) for chunk in chunks]
    types = [type(chunk).__name__ for chunk in chunks]
    linear = replace(superposition_config_from_args(args), loss_impl="linear")
    superpose_built_models(chunks, linear)
    return {
        "stock": stock,
        "stock_types": types,
        "superposed": [list(chunk.state_dict()) for chunk in chunks],
        "superposed_types": [type(chunk).__name__ for chunk in chunks],
        "classes": sorted(classes),
    }


def saved_keys(argv: list[str], world_size: int) -> dict[str, Any]:
    """Key and global shape of what Megatron saves of a model, and what the weight map expects."""
    args, config = _configured(argv, world_size)
    tensors, objects = _saved(args, config)
    shape = shape_from_arguments(args, args.padded_vocab_size)
    expected = stored_shapes(weight_slices(shape, KeyLayout(fused_norm=False)))
    return {
        "tensors": tensors,
        "objects": objects,
        "expected": {key: list(size) for key, size in expected.items()},
    }


def imported_keys(folder: str, kind: str, layout: list[str]) -> dict[str, Any]:
    """What is in the checkpoint of an imported model, and what Megatron asks it for."""
    source = save_model(Path(folder) / kind, kind)
    result = import_from_huggingface(source, Path(folder) / f"{kind}-megatron")
    checkpoint = Path(folder) / f"{kind}-megatron" / RELEASE
    argv = [word for argument in result.arguments for word in argument]
    tensors, objects = _saved(*_configured([*argv, *_RUN.split(), *layout], 8))
    index = read_index(checkpoint / ".metadata")
    return {
        "asked_tensors": tensors,
        "asked_objects": objects,
        "tensors": {k: list(s) for k, s in TorchDistCheckpoint(checkpoint).shapes().items()},
        "keys": list(index.state_dict_metadata),
    }


def _saved(args: argparse.Namespace, config: Any) -> tuple[dict[str, list[int]], list[str]]:
    """Of all ranks: a rank of every stage, and of each of these the ranks with other experts."""
    tensors: dict[str, list[int]] = {}
    objects: set[str] = set()
    step = args.tensor_model_parallel_size * args.context_parallel_size
    for first in rank_simulation.stage_ranks(args):
        for part in range(args.expert_model_parallel_size):
            rank = first + part * step
            stage = rank_simulation.build_stage(args, config, rank)
            with rank_simulation.as_rank(args, rank) as groups:
                metadata = _build_sharded_state_dict_metadata(args, dp_cp_group=groups.dp_cp)
                chunks: list[Any] = stage.chunks
                for chunk in chunks:
                    for entry in _entries(chunk.sharded_state_dict(metadata=metadata)):
                        if isinstance(entry, ShardedTensor):
                            tensors[entry.key] = list(entry.global_shape)
                        else:
                            objects.add(entry.unique_key)
    return tensors, sorted(objects)


def _entries(state: Any) -> list[Any]:
    """The ShardedTensor and ShardedObject entries of a nested state."""
    if isinstance(state, dict):
        return [entry for value in state.values() for entry in _entries(value)]
    # Gate and up are a factory of two tensors with one key.
    if isinstance(state, ShardedTensorFactory):
        return _entries(state.build())
    if isinstance(state, list):
        return [entry for value in state for entry in _entries(value)]
    return [state]


def recipes(argv: list[str], world_size: int) -> list[str | None]:
    """The recipe of every layer; None in bf16."""
    args, config = _configured(argv, world_size)
    with rank_simulation.as_rank(args, 0):
        return enter_recipes(config.transformer)


def refusal(argv: list[str], capability: list[int]) -> str | None:
    """What Transformer Engine has against the recipe of a launch on such a GPU."""
    args, config = _configured(argv, 64)
    major, minor = capability
    try:
        rank_simulation.assume_machine((major, minor))
        rank_simulation.check_recipes(args, config)
    except RuntimeError as error:
        return str(error)
    finally:
        rank_simulation.assume_machine((10, 0))
    return None


def quantizable(recipe: str, size: list[int]) -> bool:
    """Whether Transformer Engine takes a weight of a size into a product in FP8, by its own rule.

    Tensors on the meta device: no data is asked for.
    """
    from transformer_engine.pytorch import Float8BlockQuantizer, MXFP8Quantizer
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.utils import check_dim_for_fp8_exec

    weight = torch.empty(size, dtype=torch.bfloat16, device="meta")
    if recipe == "tensorwise":
        # The gradient of the input is a product with the transposed weight.
        return check_dim_for_fp8_exec(weight) and check_dim_for_fp8_exec(weight.T)
    quantizer = {"mxfp8": MXFP8Quantizer, "blockwise": Float8BlockQuantizer}[recipe]
    return bool(quantizer(DType.kFloat8E4M3, rowwise=True, columnwise=True).is_quantizable(weight))
