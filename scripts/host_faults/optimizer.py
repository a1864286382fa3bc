"""The optimizer of megatron-core and its schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from scripts.host_faults.ranks import on_ranks


def _counted_offsets() -> int:
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=4,
        tensor_model_parallel_size=2,
        softmax_type="learnable",
        use_cpu_initialization=True,
    )
    attention = DotProductAttention(
        config,
        1,
        AttnMaskType.causal,
        "self",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    offsets = attention.softmax_offset
    group = parallel_state.get_tensor_model_parallel_group()
    return offsets.numel() if param_is_not_tensor_parallel_duplicate(offsets, group) else 0


def attention_sinks_in_clipping() -> str:
    """Issue 7452, finding 8: the norm for clipping leaves out the sinks of other TP ranks."""
    counted = on_ranks(2, _counted_offsets, tensor_model_parallel_size=2)
    assert sum(counted) < 4, "mended"
    return f"4 heads on 2 ranks, counted in the norm by rank: {counted}"


def weight_decay_after_resume() -> str:
    """PR 7468: the first step after a resume has the weight decay of the command line."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    def schedule(weight_decay: float) -> tuple[OptimizerParamScheduler, dict[str, float]]:
        group = {"lr": 0.0, "weight_decay": 0.0, "wd_mult": 1.0, "lr_mult": 1.0}
        scheduler = OptimizerParamScheduler(
            SimpleNamespace(param_groups=[group]),
            0.0,
            1.0,
            0.0,
            0,
            10,
            "linear",
            weight_decay,
            weight_decay,
            10,
            "constant",
        )
        return scheduler, group

    saved, _ = schedule(0.1)
    resumed, group = schedule(0.5)
    resumed.load_state_dict(saved.state_dict())
    decay = group["weight_decay"]
    assert decay == 0.5, f"mended: {decay}"
    return (
        f"saved with 0.1, started with 0.5 and the checkpoint's schedule: {decay} in the first step"
    )


def _norm_gradient() -> list[float]:
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=2,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        normalization="RMSNorm",
        use_cpu_initialization=True,
    )
    model: Any = torch.nn.Module()
    model.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    model.out_norm = WrappedTorchNorm(config, 2)
    rank = parallel_state.get_tensor_model_parallel_rank()
    model.out_norm.weight.main_grad = torch.full((2,), float(rank + 1))
    finalize_model_grads.__globals__["_allreduce_non_tensor_model_parallel_grads"](
        [model], config, parallel_state.get_tensor_model_parallel_group()
    )
    return model.out_norm.weight.main_grad.tolist()


def gated_delta_net_norm() -> str:
    """Issue 7452, finding 11: parts of the gradient of out_norm are not summed over TP."""
    gradients = on_ranks(2, _norm_gradient, tensor_model_parallel_size=2)
    assert gradients[0] != gradients[1], "mended"
    return f"without sequence parallelism, parts of two ranks after the reduction: {gradients}"
