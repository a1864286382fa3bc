"""Norms of the CPU platform."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_tst.cpu.norm import build_norm


def config(**settings: Any) -> TransformerConfig:
    defaults = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    return TransformerConfig(**{**defaults, **settings})


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norm_is_upstreams(normalization: str) -> None:
    settings = config(normalization=normalization)
    ours = build_norm(WrappedTorchNorm, settings, 8, 1e-3)
    upstream = WrappedTorchNorm(settings, 8, 1e-3)
    assert type(ours) is type(upstream)
    assert list(ours.state_dict()) == list(upstream.state_dict())
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 0.01
    assert torch.equal(ours(x), upstream(x))
    assert not any(vars(parameter)["sequence_parallel"] for parameter in ours.parameters())


def test_gradients_are_added_up_under_sequence_parallelism() -> None:
    settings = config(sequence_parallel=True, tensor_model_parallel_size=2)
    norm = build_norm(WrappedTorchNorm, settings, 8)
    assert isinstance(norm, nn.LayerNorm)
    assert all(vars(parameter)["sequence_parallel"] for parameter in norm.parameters())


@pytest.mark.parametrize(
    ("flag", "settings"),
    [
        ("--normalization", {"normalization": "L2Norm"}),
        ("--apply-layernorm-1p", {"layernorm_zero_centered_gamma": True}),
        ("--memory-efficient-layer-norm", {"memory_efficient_layer_norm": True}),
    ],
)
def test_norms_that_torch_does_not_have_are_refused(flag: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=flag):
        build_norm(WrappedTorchNorm, config(**settings), 8)
