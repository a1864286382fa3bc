"""Norms of the CPU platform."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_tst.cpu.norm import RMSNorm, RMSNormFunction, build_norm


def config(**settings: Any) -> TransformerConfig:
    defaults = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    return TransformerConfig(**{**defaults, **settings})


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norm_is_upstreams(normalization: str) -> None:
    settings = config(normalization=normalization)
    ours = build_norm(WrappedTorchNorm, settings, 8, 1e-3)
    upstream = WrappedTorchNorm(settings, 8, 1e-3)
    assert isinstance(ours, type(upstream))
    assert list(ours.state_dict()) == list(upstream.state_dict())
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 0.01
    assert torch.equal(ours(x), upstream(x))
    assert not any(vars(parameter)["sequence_parallel"] for parameter in ours.parameters())


# The row, the reductions and the result are rounded; those in half precision once, at the end.
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 1e-5},
    torch.float16: {"rtol": 2.0**-11, "atol": 1e-5},
}


def gradients(
    norm: nn.RMSNorm, x: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    norm.weight = nn.Parameter(weight)
    x = x.detach().requires_grad_()
    output = norm(x)
    return output.detach(), *torch.autograd.grad(output, (x, norm.weight), grad)


@pytest.mark.parametrize("shape", [(5, 3, 24), (2, 1, 1000), (7, 8)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("is_compiled", [False, True])
def test_rms_norm(
    monkeypatch: pytest.MonkeyPatch,
    is_compiled: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    if not is_compiled:
        monkeypatch.setattr("megatron_tst.cpu.norm.kernels", lambda: None)
    generator = torch.Generator().manual_seed(0)
    hidden = shape[-1]
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(hidden, generator=generator).to(weight_dtype)
    output, *found = gradients(RMSNorm(hidden, eps=1e-5), x, weight, grad)
    expected_output = torch.rms_norm(x, (hidden,), weight, 1e-5)
    if is_compiled:
        # The kernels add up a row in another order.
        torch.testing.assert_close(output, expected_output, **TOLERANCE[dtype])
    else:
        assert torch.equal(output, expected_output)
    exact_norm = nn.RMSNorm(hidden, eps=1e-5)
    _, *exact = gradients(exact_norm, x.double(), weight.double(), grad.double())
    for gradient, of, expected in zip(found, (x, weight), exact, strict=True):
        assert gradient.dtype == of.dtype
        torch.testing.assert_close(gradient.double(), expected, **TOLERANCE[of.dtype])


def test_rms_norm_of_tensors_that_are_not_contiguous() -> None:
    x, grad = torch.randn(2, 4, 3, 16).transpose(1, 2).unbind()
    weight = torch.rand(16)
    norm = RMSNorm(16, eps=1e-5)
    strided = gradients(norm, x, weight, grad)
    copied = gradients(norm, x.contiguous(), weight, grad.contiguous())
    assert all(torch.equal(*pair) for pair in zip(strided, copied, strict=True))
    assert norm(x).is_contiguous()


def test_rms_norm_of_queries_that_are_a_part_of_a_tensor() -> None:
    x, grad = torch.randn(2, 5, 2, 3, 24)[..., 8:].unbind()
    weight = torch.rand(16)
    norm = RMSNorm(16, eps=1e-5)
    output, grad_x, grad_weight = gradients(norm, x, weight, grad)
    rows = gradients(norm, x.flatten(0, 2), weight, grad.flatten(0, 2))
    assert torch.equal(output.flatten(0, 2), rows[0])
    assert torch.equal(grad_x.flatten(0, 2), rows[1])
    assert torch.equal(grad_weight, rows[2])


def test_bits_of_a_row_do_not_depend_on_the_number_of_rows() -> None:
    """A micro-batch of another size, or a slice of the positions, changes no bit."""
    x, grad = torch.randn(2, 64, 1024).unbind()
    weight = torch.rand(1024)
    norm = RMSNorm(1024, eps=1e-5)
    _, whole, _ = gradients(norm, x, weight, grad)
    for rows in (1, 3, 7, 61):
        assert torch.equal(gradients(norm, x[:rows], weight, grad[:rows])[1], whole[:rows])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_have_the_same_gradient(reentrant: bool) -> None:
    norm = RMSNorm(16, eps=1e-5)
    x = torch.randn(4, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    norm(inputs[0]).square().sum().backward()
    checkpoint(norm, inputs[1], use_reentrant=reentrant).square().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_gradcheck_of_rms_norm() -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *of: RMSNormFunction.apply(*of, 1e-5), (x, weight))


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
