"""The router of a mixture of experts: balancing losses, and what is counted for them."""

from __future__ import annotations

from typing import Any

import torch

from scripts.host_faults.ranks import on_ranks


def _router(**settings: Any) -> Any:
    """A router of 4 experts over 8 channels, top 2, in float32."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_moe_experts=4,
        moe_router_topk=2,
        use_cpu_initialization=True,
        **settings,
    )
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    return router


def _gradients_of_two_batches(second_tokens: int) -> tuple[float, float]:
    """Balancing gradient of 64 tokens and then others, and the one that their counts give."""
    router = _router(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=1.0)
    torch.manual_seed(1)
    first, second = torch.randn(64, 1, 8), torch.randn(second_tokens, 1, 8)
    router(first)
    probabilities, routing = router(second)
    (probabilities.sum() * 0).backward()
    got = router.weight.grad.clone()
    router.weight.grad = None
    with torch.no_grad():
        chosen = router(first)[1].sum(0) + routing.sum(0)
    shares = chosen / chosen.sum()
    scores = torch.softmax(router.gating(second).view(-1, 4), dim=-1)
    (4 * (shares * scores.mean(0)).sum()).backward()
    return got.norm().item(), router.weight.grad.norm().item()


def _both_gradients() -> list[tuple[float, float]]:
    return [_gradients_of_two_batches(tokens) for tokens in (64, 16)]


def global_loss_of_unequal_batches() -> str:
    """Issue 7213: global_aux_loss takes all micro-batches for as long as the current one."""
    (equal, equal_expected), (short, short_expected) = on_ranks(1, _both_gradients)[0]
    assert abs(equal / equal_expected - 1) < 1e-3, "wrong with equal micro-batches too"
    assert abs(short / short_expected - 1) > 0.1, "mended"
    return (
        f"gradient over the expected one: {equal / equal_expected:.3f} where both micro-batches "
        f"have 64 tokens, {short / short_expected:.3f} where the second has 16"
    )


def _count_with_padding() -> str:
    router = _router(
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
        moe_router_load_balancing_type="none",
    )
    padding = torch.tensor([[False]] * 4 + [[True]] * 2)
    try:
        router(torch.randn(6, 1, 8), padding_mask=padding)
    except RuntimeError as error:
        return str(error)
    return ""


def expert_bias_with_padding() -> str:
    """PR 6114: the padding mask does not fit the counts for the bias of the experts."""
    message = on_ranks(1, _count_with_padding)[0]
    assert message, "mended"
    return f"RuntimeError: {message}"


def _local_count() -> tuple[float, float]:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_tokens_per_expert_and_token_count

    routing = torch.tensor([[1, 0], [1, 0], [0, 1]]).bool()
    group = parallel_state.get_tensor_model_parallel_group()
    _, local, total = get_tokens_per_expert_and_token_count(
        routing, group, topk=1, with_padding_mask=True
    )
    return float(local), float(total)


def local_count_with_padding() -> str:
    """Issue 7452, finding 10: with a padding mask the local count becomes the global one."""
    local, total = on_ranks(2, _local_count, tensor_model_parallel_size=2)[0]
    assert local == total, "mended"
    return f"3 tokens on each of 2 ranks: local count {local:g}, of all ranks {total:g}"


def layers_of_a_hybrid_model() -> str:
    """PR 6748: the logged balancing loss is divided by the wrong number of layers."""
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

    # What training_log passes for the pattern *E*E*E: its 3 layers of experts, and the arguments.
    counted = [
        MoEMetricsTracker._count_moe_layers(3, frequency, None) for frequency in (1, 2, [0, 1] * 2)
    ]
    assert counted == [3, 2, 2], f"mended: {counted}"
    return f"3 layers of experts with --moe-layer-freq 1, 2 and [0,1]*2 are counted as {counted}"
