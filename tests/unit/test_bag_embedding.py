"""Bag embedding on one rank: values, gradients, bits, memory and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tst.ops.embedding import bag_embedding
from megatron_tst.ops.native_embedding import NativeBagMean
from megatron_tst.ops.reference import bag_embedding_reference
from megatron_tst.ops.torch_embedding import (
    BagMean,
    SparseBagMean,
    sum_by_offset,
    sum_into_rows,
)

# Half a unit in the last place relative to the exact mean or sum, with float32 noise beside it.
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 1e-5},
    torch.float16: {"rtol": 2.0**-11, "atol": 1e-5},
}


def case(
    bag_size: int, dtype: torch.dtype, vocabulary: int = 50, hidden: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, hidden).to(dtype).requires_grad_()
    bags = torch.randint(0, vocabulary, (3, 7, bag_size))
    bags[0] = bags[0, :, :1]  # bags of one repeated token
    return weight, bags, torch.randn(3, 7, hidden).to(dtype)


# Wide rows are summed in several chunks; with more tokens than rows all rows are written in order.
SIZES = [(50, 24), (70, 4096), (1000, 4096)]


@pytest.mark.parametrize(("vocabulary", "hidden"), SIZES)
@pytest.mark.parametrize("bag_size", [1, 2, 6, 16])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_equals_the_reference(
    dtype: torch.dtype, bag_size: int, vocabulary: int, hidden: int
) -> None:
    weight, bags, grad = case(bag_size, dtype, vocabulary, hidden)
    output = bag_embedding(weight, bags)
    assert output.dtype == dtype
    exact_weight = weight.detach().double().requires_grad_()
    exact = bag_embedding_reference(exact_weight, bags)
    torch.testing.assert_close(output.double(), exact, **TOLERANCE[dtype])
    if bag_size > 1:  # at 1 the gradient is the host's, which accumulates in the weight's dtype
        output.backward(grad)
        exact.backward(grad.double())
        assert weight.grad is not None
        assert weight.grad.dtype == dtype
        assert exact_weight.grad is not None
        torch.testing.assert_close(weight.grad.double(), exact_weight.grad, **TOLERANCE[dtype])


@pytest.mark.parametrize(("vocabulary", "hidden"), SIZES)
@pytest.mark.parametrize("bag_size", [2, 6, 16])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_places_without_a_token_do_not_count(
    dtype: torch.dtype, bag_size: int, vocabulary: int, hidden: int
) -> None:
    weight, bags, grad = case(bag_size, dtype, vocabulary, hidden)
    present = torch.randint(1, bag_size + 1, bags.shape[:-1])
    present[0, 0], present[1, 0] = bag_size, 0
    bags[torch.arange(bag_size) >= present.unsqueeze(-1)] = -100
    output = bag_embedding(weight, bags, ignore_index=-100)
    exact_weight = weight.detach().double().requires_grad_()
    exact = bag_embedding_reference(exact_weight, bags, ignore_index=-100)
    torch.testing.assert_close(output.double(), exact, **TOLERANCE[dtype])
    assert not output[1, 0].any()
    output.backward(grad)
    exact.backward(grad.double())
    assert weight.grad is not None
    assert exact_weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, **TOLERANCE[dtype])


@pytest.mark.parametrize("bag_size", [6, 8])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_full_bags_have_the_bits_of_bags_that_are_always_full(
    dtype: torch.dtype, bag_size: int
) -> None:
    """At a power of two the latter are averaged by a sparse product."""
    weight, bags, grad = case(bag_size, dtype, vocabulary=70, hidden=4096)
    results = [bag_embedding(weight, bags, ignore_index=index) for index in (None, -100)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(result, weight, grad)[0] for result in results))


@pytest.mark.parametrize("without", ["none", "some", "a bag", "all"])
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
def test_a_sparse_product_has_the_bits_of_a_sum(dtype: torch.dtype, without: str) -> None:
    """Also where another tensor-parallel rank has the rows."""
    weight, bags, grad = case(4, dtype)
    outside = None if without == "none" else torch.full_like(bags, without == "all").bool()
    if outside is not None and without == "some":
        outside = bags % 3 == 0
    elif outside is not None:
        outside[1, 2] = True
    results = [
        SparseBagMean.apply(weight, bags, outside, None),
        BagMean.apply(weight, bags, outside, None),
    ]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(result, weight, grad)[0] for result in results))


@pytest.mark.parametrize("bag_size", [2, 6])
@pytest.mark.parametrize("without", ["none", "some", "sizes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_for_a_cpu_have_the_bits_of_a_sum(
    dtype: torch.dtype, without: str, bag_size: int
) -> None:
    weight, bags, grad = case(bag_size, dtype)
    outside = None if without == "none" else bags % 3 == 0
    sizes = None
    if outside is not None and without == "sizes":
        sizes = (~outside).sum(-1, keepdim=True).clamp_(min=1)
    results = [mean.apply(weight, bags, outside, sizes) for mean in (NativeBagMean, BagMean)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(result, weight, grad)[0] for result in results))


def test_a_batch_without_any_token_has_no_gradient() -> None:
    weight, bags, grad = case(4, torch.bfloat16)
    output = bag_embedding(weight, torch.full_like(bags, -100), ignore_index=-100)
    assert not output.any()
    assert not torch.autograd.grad(output, weight, grad)[0].any()


@pytest.mark.parametrize("with_gaps", [False, True])
def test_the_gradient_of_a_gpu_is_that_of_a_cpu(with_gaps: bool) -> None:
    """The same sum in two orders."""
    _, bags, share = case(6, torch.float32)
    bags, share = bags.flatten(0, 1), share.flatten(0, 1)
    outside = bags % 3 == 0 if with_gaps else None
    on_cpu = sum_into_rows(share, bags, outside, 50, torch.float32)
    torch.testing.assert_close(sum_by_offset(share, bags, outside, 50), on_cpu)


@pytest.mark.parametrize("bag_size", [3, 4])
def test_gradcheck(bag_size: int) -> None:
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    bags = torch.tensor([[[0, 0, 1, 1], [4, 2, 0, 0]], [[3, 3, 3, 3], [1, 2, 4, 6]]])
    bags = bags[..., :bag_size]
    assert torch.autograd.gradcheck(lambda w: bag_embedding(w, bags), weight)


def test_a_repeated_token_counts_as_often_as_it_occurs() -> None:
    weight = torch.tensor([[1.0], [10.0]], requires_grad=True)
    output = bag_embedding(weight, torch.tensor([[[0, 1, 1, 1]]]))
    output.sum().backward()
    assert output.item() == (1 + 3 * 10) / 4
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0.25], [0.75]]


@pytest.mark.parametrize("bag_size", [2, 3])
def test_bfloat16_gradients_are_accumulated_in_float32(bag_size: int) -> None:
    # Additions of 1/2 stop at 128 in bfloat16, where 128 + 1/2 rounds to 128.
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    bag_embedding(weight, torch.zeros(1, 256, bag_size, dtype=torch.int64)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[256.0], [0.0]]


@pytest.mark.parametrize("bag_size", [3, 4])
def test_gradient_has_the_same_bits_each_time_on_several_threads(bag_size: int) -> None:
    weight, _, _ = case(bag_size, torch.float32, vocabulary=8, hidden=64)
    bags, grad = torch.randint(0, 8, (4, 512, bag_size)), torch.randn(4, 512, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = [
            torch.autograd.grad(bag_embedding(weight, bags), weight, grad)[0] for _ in range(5)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_sequence_parallel_layout_without_a_group() -> None:
    weight, bags, _ = case(4, torch.float32)
    expected = bag_embedding(weight, bags).transpose(0, 1)
    output = bag_embedding(weight, bags, sequence_parallel=True)
    assert output.is_contiguous()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("bag_size", [3, 4])
def test_bags_need_not_be_contiguous(bag_size: int) -> None:
    weight, bags, grad = case(bag_size, torch.float32)
    strided = bags.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    results = [
        torch.autograd.grad(bag_embedding(weight, ids), weight, grad)[0] for ids in (bags, strided)
    ]
    assert torch.equal(*results)


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@contextmanager
def largest_tensor() -> Iterator[_LargestTensor]:
    with _LargestTensor() as mode:
        yield mode


def test_no_tensor_grows_with_the_bag_size() -> None:
    vocabulary, hidden, positions = 8, 32, 64
    for bag_size in (2, 16):
        weight = torch.randn(vocabulary, hidden, requires_grad=True)
        bags = torch.randint(0, vocabulary, (1, positions, bag_size))
        with largest_tensor() as seen:
            bag_embedding(weight, bags).sum().backward()
        # The ids themselves, [b, l, s], are smaller than the output at both bag sizes.
        assert seen.elements == positions * hidden
        with largest_tensor() as reference:
            bag_embedding_reference(weight, bags)
        assert reference.elements == positions * hidden * bag_size  # the probe sees such a tensor


@pytest.mark.parametrize("bag_size", [1, 3])
@pytest.mark.parametrize("foreign", [-1, 50])
def test_id_outside_the_vocabulary_is_refused(foreign: int, bag_size: int) -> None:
    weight, bags, _ = case(bag_size, torch.float32)
    bags[1, 2, 0] = foreign
    with pytest.raises(ValueError, match=rf"token_bags holds ids .*{foreign}.*vocabulary of 50"):
        bag_embedding(weight, bags)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 0), (2, 2, 2, 2)])
def test_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"token_bags has shape .*\[b, l, s\]"):
        bag_embedding(torch.zeros(5, 2), torch.zeros(shape, dtype=torch.int64))


def test_an_ignore_index_that_was_not_given_is_named() -> None:
    weight, bags, _ = case(4, torch.float32)
    bags[0, 0, 0] = -100
    for given in (None, -1):
        with pytest.raises(ValueError, match=f"pass ignore_index=-100, and not {given}"):
            bag_embedding(weight, bags, ignore_index=given)
    with pytest.raises(ValueError, match=r"ignore_index is 7.*negative"):
        bag_embedding(weight, bags, ignore_index=7)


def test_ids_may_be_any_integers_but_nothing_else() -> None:
    weight, bags, _ = case(4, torch.float32)
    assert torch.equal(bag_embedding(weight, bags.to(torch.uint8)), bag_embedding(weight, bags))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=f"token_bags has dtype {dtype}"):
            bag_embedding(weight, bags.to(dtype))


@pytest.mark.parametrize("bag_size", [1, 3, 4])
def test_autocast_leaves_the_embedding_its_dtype(bag_size: int) -> None:
    """As it does torch's."""
    weight, bags, _ = case(bag_size, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bag_embedding(weight, bags)
    assert torch.equal(found, bag_embedding(weight, bags))
