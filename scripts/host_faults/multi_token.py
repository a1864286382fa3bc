"""Multi-token prediction of megatron-core."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scripts.host_faults.ranks import on_ranks


def packed_targets_of_mtp() -> str:
    """PR 6205: the targets of multi-token prediction are shifted at unpadded boundaries."""
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    # Two documents of 3 tokens, each padded to 4: 1 2 3 0 and 5 6 7 0.
    packed = SimpleNamespace(
        cu_seqlens_q=torch.tensor([0, 3, 6]), cu_seqlens_q_padded=torch.tensor([0, 4, 8])
    )
    text = torch.tensor([[1, 2, 3, 0, 5, 6, 7, 0]])
    rolled = roll_tensor(text, shifts=-1, dims=-1, packed_seq_params=packed)[0].tolist()[0]
    right = [2, 3, 0, 0, 6, 7, 0, 0]
    assert rolled != right, "mended"
    return f"next tokens {rolled} in place of {right}"


def _position_weights(mask: list[int], per_token: bool, cp_group: Any = None) -> list[float]:
    """What the loss of each position of depth 1 counts in the loss of a rank."""
    from megatron.core.transformer.multi_token_prediction import (
        MTPLossAutoScaler,
        process_mtp_loss,
    )

    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    depth = torch.zeros(len(mask), 1, 1, requires_grad=True)
    hidden = process_mtp_loss(
        hidden_states=torch.cat((torch.zeros_like(depth), depth)),
        labels=torch.zeros(1, len(mask), dtype=torch.long),
        loss_mask=torch.tensor([mask]).float(),
        output_layer=lambda states, **_: (states, None),
        output_weight=None,
        runtime_gather_output=None,
        is_training=False,
        compute_language_model_loss=lambda labels, logits: logits.squeeze(-1).transpose(0, 1),
        config=SimpleNamespace(
            mtp_num_layers=1,
            mtp_detach_heads=False,
            mtp_loss_scaling_factor=1.0,
            calculate_per_token_loss=per_token,
        ),
        cp_group=cp_group,
    )
    hidden.sum().backward()
    assert depth.grad is not None
    return [float(weight) for weight in depth.grad.flatten()]


def mtp_counts_of_a_rank() -> str:
    """Issue 7452, finding 3: a loss per token is divided by the targets of each rank by itself."""
    masks = [[1, 1, 1, 1], [1, 1, 0, 0]]
    total = sum(map(sum, masks))
    weights = [max(_position_weights(mask, per_token=True)) / total for mask in masks]
    assert weights[0] != weights[1], "mended"
    return f"targets of two ranks count {weights[0]:.3f} and {weights[1]:.3f}, not 0.250 each"


def _weights_of_a_part() -> list[float]:
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    return _position_weights([1, 1, 1, 1], per_token=False, cp_group=group)


def mtp_counts_under_context_parallelism() -> str:
    """PR 7498: the loss of a part of a sequence is divided by the targets of that part."""
    found = on_ranks(2, _weights_of_a_part, context_parallel_size=2)
    first, second = (max(weights) / 2 for weights in found)
    assert first != second, "mended"
    return f"targets of the two halves count {first:.3f} and {second:.3f}, not {1 / 7:.3f} each"


def _tied_last_stage() -> str | None:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        mtp_num_layers=1,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
    )
    spec = get_gpt_layer_local_spec()
    is_last = parallel_state.is_pipeline_last_stage()
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=32,
        max_sequence_length=8,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        pre_process=not is_last,
        post_process=is_last,
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )
    try:
        model.sharded_state_dict()
    except AssertionError as error:
        return type(error).__name__
    return None


def mtp_and_tied_embeddings() -> str:
    """PR 7577: the last of several stages has an output layer of its own that nobody reads."""
    first, last = on_ranks(2, _tied_last_stage, pipeline_model_parallel_size=2)
    assert first is None, "wrong on the first stage too"
    assert last is not None, "mended"
    return f"the state to save of the last stage: {last}"


def _deferred_gradient() -> float:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    config = ModelParallelConfig()
    # Set behind the checks of the configuration, which want a pipeline and kernels of apex.
    config.defer_embedding_wgrad_compute, config.wgrad_deferral_limit = True, 0
    inputs: list[Tensor] = []
    gradients: list[Tensor] = []
    layer = ColumnParallelLinear(
        3,
        5,
        config=config,
        init_method=torch.nn.init.normal_,
        bias=False,
        embedding_activation_buffer=inputs,
        grad_output_buffer=gradients,
    )
    # The kernel of apex would add up what is deferred here.
    layer.gradient_accumulation_fusion = True
    layer.weight.main_grad = torch.zeros(5, 3)
    states, targets = torch.randn(2, 4, 1, 3), torch.randn(2, 4, 1, 5)
    # The depth comes first, as in process_mtp_loss, and then the model itself.
    states.requires_grad_()
    ahead, own = ((layer(s)[0] * t).sum() for s, t in zip(states, targets, strict=True))
    (ahead + own).backward()
    first, second = zip(inputs, gradients, strict=True)
    got = sum(g.flatten(0, 1).T @ i.flatten(0, 1) for i, g in (first, second))
    right = torch.einsum("nlbo,nlbi->oi", targets, states.detach())
    return float((got - right).norm() / right.norm())


def mtp_and_deferred_gradients() -> str:
    """--defer-embedding-wgrad-compute pairs inputs in order with gradients in reverse order."""
    (deviation,) = on_ranks(1, _deferred_gradient)
    assert deviation > 0.1, "mended"
    return f"gradient of the output layer off by {deviation:.0%}"
