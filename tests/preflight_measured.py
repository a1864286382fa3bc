"""What preflight computes, measured on real models, optimizers and passes on the CPU platform."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.training import num_floating_point_operations

from megatron_tst.preflight import rank_simulation
from megatron_tst.preflight.corpus_check import resolve_vocabulary


def measured_optimizer(argv: list[str], world_size: int, rank: int) -> dict[str, int]:
    """Elements that DDP and the optimizer of a rank hold, with real tensors."""
    args, config = _configured(argv, world_size)
    with rank_simulation.as_rank(args, rank) as groups:
        configs = pretrain_cfg_container_from_args(args, config)
        builder = config.get_builder_cls()(config)
        models = builder.build_distributed_models(
            groups, configs.ddp, data_parallel_random_init=False
        )
        optimizer = get_megatron_optimizer(
            configs.optimizer, models, use_gloo_process_groups=False, pg_collection=groups
        )
        buffers = [b for m in models for b in (*m.buffers, *m.expert_parallel_buffers)]
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        shards = [
            shard
            for part in parts
            for group in part.shard_fp32_from_float16_groups
            for shard in group
            if shard is not None
        ]
        return {
            "weights": sum(p.numel() for m in models for p in m.parameters()),
            "buffer": sum(buffer.grad_data.numel() for buffer in buffers),
            "gradient_bytes": sum(b.grad_data.numel() * b.grad_data.itemsize for b in buffers),
            "shard": sum(shard.numel() for shard in shards),
        }


def measured_activations(
    argv: list[str], added: str = "--num-layers", numbers: tuple[int, int] = (2, 3)
) -> dict[str, float]:
    """Bytes that autograd keeps after the forward of one rank, by layer added.

    The difference between three layers and two, so that embedding and output do not matter.
    """
    # The rows that experts compute more on a CPU are not in a GPU's memory, and halves of a layer
    # that are one operation keep less.
    of_upstream = [
        (MLP, "forward"),
        (TransformerLayer, "_forward_attention"),
        (TransformerLayer, "_forward_mlp"),
        (tensor_parallel, "vocab_parallel_cross_entropy"),
    ]
    with ExitStack() as stack:
        for owner, name in of_upstream:
            method = inspect.unwrap(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, method))
        kept = [_saved_bytes([*argv, added, str(layers)]) for layers in numbers]
    return {"bytes": kept[1] - kept[0]}


def _saved_bytes(argv: list[str]) -> int:
    args, config = _configured(argv, 1)
    # As long as the depths of the first model that it saw.
    MTPLossLoggingHelper.tracker.clear()
    with rank_simulation.as_rank(args, 0) as groups:
        model = config.get_builder_cls()(config).build_model(groups).bfloat16()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                # Held, so that no address is used twice.
                storages[storage.data_ptr()] = storage
            return tensor

        tokens = torch.randint(256, (args.micro_batch_size, args.seq_length))
        positions = torch.arange(args.seq_length).expand_as(tokens)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens, positions, None, labels=tokens)
        return sum(storage.nbytes() for storage in storages.values())


def megatron_flops(argv: list[str], world_size: int) -> float:
    """FLOPs of a step as Megatron logs them."""
    args, _ = _configured(argv, world_size)
    return float(num_floating_point_operations(args, args.global_batch_size))


def _configured(argv: list[str], world_size: int) -> tuple[Any, Any]:
    args = rank_simulation.parse(rank_simulation.launch_parser(), argv, world_size)
    rank_simulation.validate(args)
    resolve_vocabulary(args, None)
    config = rank_simulation.build_configuration(args)
    for name, value in rank_simulation.LOCAL_MODULES.items():
        setattr(config.transformer, name, value)
    config.transformer.gradient_accumulation_fusion = False
    config.transformer.use_cpu_initialization = True
    return args, config
