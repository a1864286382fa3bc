"""Attention of the CPU platform against softmax attention written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_tst.cpu.attention import CoreAttention, FusedCoreAttention
from megatron_tst.cpu.causal_attention import QUERY_BLOCK, CausalAttention

BATCH, HEADS = 2, 3
LENGTHS = [1, 7, QUERY_BLOCK, QUERY_BLOCK + 1, 300]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def oracle(query: Tensor, key: Tensor, value: Tensor, forbidden: Tensor) -> Tensor:
    """Softmax attention, [b, heads, l, head_dim], for any dtype."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.masked_fill(forbidden, -math.inf).softmax(-1) @ value


def draw(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def with_gradients(
    attention: Attention, inputs: list[Tensor], grad: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = attention(leaves[0], leaves[1], leaves[2])
    return output.detach(), torch.autograd.grad(output, leaves, grad)


def causal_oracle(inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    mask = causal_mask(inputs[0].shape[2])
    exact = [x.double() for x in inputs]
    return with_gradients(lambda q, k, v: oracle(q, k, v, mask), exact, grad.double())


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    result: Tensor = CausalAttention.apply(query, key, value, 1 / math.sqrt(query.shape[-1]))
    return result


def torch_fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_float32_output_and_gradients_match_the_oracle(length: int, head_dim: int) -> None:
    *inputs, grad = draw((BATCH, HEADS, length, head_dim), 4, torch.float32)
    output, grads = with_gradients(fused, inputs, grad)
    expected_output, expected_grads = causal_oracle(inputs, grad)
    # Sums of up to 300 products in float32: measured 2e-7 at most.
    assert relative_error(output, expected_output) < 1e-6
    for actual, expected in zip(grads, expected_grads, strict=True):
        # With one key the gradients of queries and keys are zero.
        assert (actual.double() - expected).norm() <= 1e-6 * expected.norm() + 1e-7
        assert actual.dtype == torch.float32


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_bfloat16_is_nearly_as_close_to_the_oracle_as_torch(length: int, head_dim: int) -> None:
    *inputs, grad = draw((BATCH, HEADS, length, head_dim), 4, torch.bfloat16)
    output, grads = with_gradients(fused, inputs, grad)
    torch_output, torch_grads = with_gradients(torch_fused, inputs, grad)
    mask = causal_mask(length)
    _, unfused_grads = with_gradients(lambda q, k, v: oracle(q, k, v, mask), inputs, grad)
    expected_output, expected_grads = causal_oracle(inputs, grad)
    assert torch.equal(output, torch_output)
    assert relative_error(output, expected_output) < 2**-7
    assert all(actual.dtype == torch.bfloat16 for actual in grads)
    ours, theirs, unfused = (
        [relative_error(*pair) for pair in zip(found, expected_grads, strict=True)]
        for found in (grads, torch_grads, unfused_grads)
    )
    # Scores are rounded to bfloat16, as in upstream's unfused attention; torch keeps float32.
    # Measured: 1.27 times torch's error over all three gradients, 1.8 times for the queries', and
    # 1.11 times the error of the unfused arithmetic.
    assert math.hypot(*ours) < 1.5 * math.hypot(*theirs)
    assert all(our < 2 * their for our, their in zip(ours, theirs, strict=True))
    assert all(our < 1.2 * their for our, their in zip(ours, unfused, strict=True))


def test_derivative_matches_finite_differences() -> None:
    shape = (1, 2, QUERY_BLOCK + 2, 2)
    inputs = [x.requires_grad_() for x in draw(shape, 3, torch.float64)]
    # Fast mode projects onto random directions: the full Jacobian has 520 x 1560 entries.
    assert torch.autograd.gradcheck(fused, inputs, fast_mode=True)


@pytest.mark.parametrize("queries", [1, QUERY_BLOCK + 3])
@pytest.mark.parametrize("first_position", [1, QUERY_BLOCK, 90])
def test_queries_may_be_those_of_a_later_part(first_position: int, queries: int) -> None:
    keys = first_position + queries
    whole = draw((BATCH, HEADS, keys, 16), 3, torch.float64)
    (grad,) = draw((BATCH, HEADS, queries, 16), 1, torch.float64)
    inputs = [whole[0][:, :, first_position:], *whole[1:]]
    mask = causal_mask(keys)[first_position:]
    actual = with_gradients(fused, inputs, grad)
    expected = with_gradients(lambda q, k, v: oracle(q, k, v, mask), inputs, grad)
    torch.testing.assert_close(actual, expected)


def test_inputs_may_be_views_and_stay_as_they_were() -> None:
    length, head_dim = QUERY_BLOCK + 5, 16
    (packed,) = draw((length, BATCH, HEADS, 3 * head_dim), 1, torch.float32)
    before = packed.clone()
    views = [x.permute(1, 2, 0, 3) for x in packed.chunk(3, dim=-1)]
    grad = draw((length, BATCH, HEADS, head_dim), 1, torch.float32)[0].permute(1, 2, 0, 3)
    assert not any(x.is_contiguous() for x in [*views, grad])
    output, grads = with_gradients(fused, views, grad)
    expected = with_gradients(fused, [x.contiguous() for x in views], grad.contiguous())
    torch.testing.assert_close((output, grads), expected)
    assert torch.equal(packed, before)


def config(**settings: Any) -> TransformerConfig:
    defaults = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    return TransformerConfig(**{**defaults, "attention_dropout": 0.0, **settings})


def core_attention(
    mask_type: AttnMaskType = AttnMaskType.causal, **settings: Any
) -> FusedCoreAttention:
    return FusedCoreAttention(config(**settings), 1, mask_type, "self")


def oracle_layer(query: Tensor, key: Tensor, value: Tensor, forbidden: Tensor) -> Tensor:
    """The oracle in Megatron's layout: [l, b, heads or groups, head_dim] to [l, b, h]."""
    group_size = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group_size, dim=2) for x in (key, value))
    heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
    context = oracle(heads_first[0], heads_first[1], heads_first[2], forbidden)
    return context.permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_layer_shares_keys_within_a_group_of_queries(groups: int) -> None:
    length = 9
    (query,) = draw((length, BATCH, 4, 16), 1, torch.float64)
    key, value = draw((length, BATCH, groups, 16), 2, torch.float64)
    (grad,) = draw((length, BATCH, 64), 1, torch.float64)

    def expected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return oracle_layer(query, key, value, causal_mask(length))

    layer = core_attention(num_query_groups=groups)
    actual = with_gradients(lambda q, k, v: layer(q, k, v, None), [query, key, value], grad)
    torch.testing.assert_close(actual, with_gradients(expected, [query, key, value], grad))


@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.padding])
def test_mask_decides_what_is_seen(mask_type: AttnMaskType) -> None:
    """Two documents in one sequence, as --reset-attention-mask separates them."""
    length = 9
    query, key, value = draw((length, BATCH, 4, 16), 3, torch.float64)
    mask = causal_mask(length)
    mask[5:, :5] = True
    actual = core_attention(mask_type)(query, key, value, mask[None, None])
    torch.testing.assert_close(actual, oracle_layer(query, key, value, mask))


def test_mask_type_of_the_call_overrides_the_layer() -> None:
    query, key, value = draw((5, BATCH, 4, 16), 3, torch.float64)
    actual = core_attention()(query, key, value, None, AttnMaskType.no_mask)
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    torch.testing.assert_close(actual, oracle_layer(query, key, value, nothing))


def test_softmax_scale_can_be_chosen() -> None:
    query, key, value = draw((5, BATCH, 4, 16), 3, torch.float64)
    layer = FusedCoreAttention(config(), 1, AttnMaskType.causal, "self", softmax_scale=0.5)
    actual = layer(query, key, value, None)
    # 1 / sqrt(16) = 0.25, so doubled queries under the default scale are the same.
    torch.testing.assert_close(actual, core_attention()(query * 2, key, value, None))


def test_dropout_is_refused_under_context_parallelism() -> None:
    with pytest.raises(ValueError, match="--attention-dropout is"):
        core_attention(context_parallel_size=2, attention_dropout=0.1)


@pytest.mark.parametrize(
    ("flag", "settings"),
    [
        ("--window-size", {"window_size": (8, 0)}),
        ("--softmax-type", {"softmax_type": "off-by-one"}),
        (
            "--apply-query-key-layer-scaling",
            {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
        ),
    ],
)
def test_settings_that_neither_attention_computes_are_refused(
    flag: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{flag} .* --context-parallel-size"):
        CoreAttention(config(context_parallel_size=2, **settings), 1, AttnMaskType.causal, "self")
    with pytest.raises(ValueError, match=f"{flag} .* --multi-latent-attention"):
        CoreAttention(config(**settings), 1, AttnMaskType.causal, "self", k_channels=8)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("bounds", [[0, 9], [0, 1, 6, 9], [0, 3, 3, 9]])
def test_documents_of_a_packed_sequence_do_not_see_each_other(
    bounds: list[int], groups: int
) -> None:
    (query,) = draw((9, 4, 16), 1, torch.float64)
    key, value = draw((9, groups, 16), 2, torch.float64)
    (grad,) = draw((9, 1, 64), 1, torch.float64)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    documents = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    forbidden = causal_mask(9)
    for begin in bounds:
        forbidden[begin:, :begin] = True

    def expected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return oracle_layer(query[:, None], key[:, None], value[:, None], forbidden)

    layer = core_attention(num_query_groups=groups)
    inputs = [query, key, value]
    actual = with_gradients(
        lambda q, k, v: layer(q, k, v, None, packed_seq_params=documents), inputs, grad
    )
    torch.testing.assert_close(actual, with_gradients(expected, inputs, grad))


def test_arguments_that_are_not_computed_are_refused() -> None:
    inputs = draw((5, BATCH, 4, 16), 3, torch.float32)
    with pytest.raises(ValueError, match="attention_bias"):
        core_attention()(*inputs, None, attention_bias=torch.zeros(1))
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="attention_mask"):
        core_attention()(*inputs, causal_mask(5), packed_seq_params=packed)


def test_causal_attention_over_a_cache_of_keys_is_refused() -> None:
    query, key, value = draw((5, BATCH, 4, 16), 3, torch.float32)
    with pytest.raises(ValueError, match="2 queries to 5 keys"):
        core_attention()(query[:2], key, value, None)
