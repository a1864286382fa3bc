"""Triton kernels of the bag embedding against the oracle, on each device they run on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tst.ops.embedding import bag_embedding
from megatron_tst.ops.reference import bag_embedding_reference
from tests.kernel_devices import Runner

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Half a unit in the last place relative to the exact mean or sum, with float32 noise beside it.
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 1e-5},
    torch.float16: {"rtol": 2.0**-11, "atol": 1e-5},
}


def tolerance(device: str, dtype: torch.dtype) -> dict[str, Any]:
    # Triton's interpreter cuts float32 off to bfloat16 where hardware rounds: a whole unit.
    truncates = device == "cpu" and dtype == torch.bfloat16
    return {**TOLERANCE[dtype], "rtol": 2.0**-7} if truncates else TOLERANCE[dtype]


def case(
    device: str, dtype: torch.dtype, n: int, s: int, v: int, h: int, holes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and gradient of row strides above h, and bags [n, s] with repeats, -100 in holes."""
    torch.manual_seed(0)
    weight, grad = torch.randn(v, h + 3), torch.randn(n, h + 3)
    bags = torch.randint(0, v, (n, s))
    bags[0] = bags[0, 0]
    if holes:
        bags[torch.rand(n, s) < 0.3] = -100
        bags[1] = -100
    return (weight.to(dtype)[:, :h].to(device), bags.to(device), grad.to(dtype)[:, :h].to(device))


def arguments(bags: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows, absent places and divisors, as the embedding passes them."""
    absent = bags == -100
    if not bool(absent.any()):
        return bags, None, None
    return bags, absent, (~absent).sum(-1).clamp(min=1).float()


def check_oracle(device: str, dtype: torch.dtype, *sizes: Any) -> None:
    from megatron_tst.ops.kernels.bag_embedding import bag_mean, bag_mean_backward

    weight, bags, grad = case(device, dtype, *sizes)
    exact_weight = weight.double().requires_grad_()
    exact = bag_embedding_reference(exact_weight, bags.unsqueeze(0), ignore_index=-100)[0]
    exact.backward(grad.double())
    assert exact_weight.grad is not None
    mean = bag_mean(weight, *arguments(bags))
    gradient = bag_mean_backward(grad, *arguments(bags), num_rows=len(weight))
    assert mean.dtype == gradient.dtype == dtype
    torch.testing.assert_close(mean.double(), exact.detach(), **tolerance(device, dtype))
    torch.testing.assert_close(gradient.double(), exact_weight.grad, **tolerance(device, dtype))
    unseen = torch.ones(len(weight), dtype=torch.bool).index_fill(0, bags[bags >= 0].cpu(), False)
    assert not gradient[unseen.to(device)].any()


# One column; less than a warp's; more than one block, in each dtype.
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("n", "s", "v", "h"), [(2, 1, 3, 1), (7, 6, 20, 70), (3, 16, 9, 1030)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle(
    on_device: Runner, dtype: torch.dtype, n: int, s: int, v: int, h: int, holes: bool
) -> None:
    on_device(check_oracle, dtype, n, s, v, h, holes)


def check_what_is_moved(device: str) -> None:
    """Counts elements, as the interpreter reads and writes them."""
    if device != "cpu":
        return
    from triton.runtime.interpreter import interpreter_builder

    from megatron_tst.ops.kernels.bag_embedding import bag_mean, bag_mean_backward

    moved: list[int] = []

    def recording(access: Any, mask_index: int) -> Any:
        def record(pointers: Any, *args: Any) -> Any:
            mask = args[mask_index].data.astype(bool)
            moved.extend(pointers.data[mask].tolist())
            return access(pointers, *args)

        return record

    def within(tensor: Tensor) -> int:
        start, size = tensor.data_ptr(), tensor.numel() * tensor.itemsize
        return sum(start <= address < start + size for address in moved)

    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
    interpreter_builder.create_masked_load = recording(load, 0)
    interpreter_builder.create_masked_store = recording(store, 1)
    try:
        weight = torch.randn(16, 40)
        rows = torch.randint(0, 16, (12, 8))
        absent = torch.arange(96).view(12, 8) % 8 != 3  # seven tokens of eight are elsewhere
        bag_mean(weight, rows, absent)
        assert within(weight) == 12 * 40
        rows = torch.tensor([[2, 9], [9, 2], [2, 2]])
        gradient = bag_mean_backward(torch.randn(3, 40), rows, None, None, num_rows=1000)
        assert within(gradient) == 2 * 40
        bag_mean_backward(torch.randn(3, 40), rows, None, None, 1000, add_to=gradient)
        assert within(gradient) == (2 + 2 * 2) * 40
    finally:
        interpreter_builder.create_masked_load = load
        interpreter_builder.create_masked_store = store


def test_reads_what_is_held_and_writes_rows_that_occur(on_device: Runner) -> None:
    on_device(check_what_is_moved)


def check_sums(device: str, dtype: torch.dtype, holes: bool) -> None:
    """Into a sum in float32: what the gradient by itself adds, without its rounding."""
    from megatron_tst.ops.kernels.bag_embedding import bag_mean_backward

    _, bags, grad = case(device, dtype, 7, 6, 20, 70, holes)
    total = torch.randn(20, 70, device=device)
    dense = bag_mean_backward(grad, *arguments(bags), num_rows=20)
    exact = bag_mean_backward(grad.float(), *arguments(bags), num_rows=20)
    expected = total + exact
    assert bag_mean_backward(grad, *arguments(bags), num_rows=20, add_to=total) is total
    assert torch.equal(total, expected)
    assert dtype == torch.float32 or not torch.equal(exact, dense.float())
    narrow = torch.ones(20, 70, dtype=torch.bfloat16, device=device)
    bag_mean_backward(grad, *arguments(bags), num_rows=20, add_to=narrow)
    torch.testing.assert_close(narrow, (1 + exact).bfloat16(), rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_can_be_added_to_a_sum(
    on_device: Runner, dtype: torch.dtype, holes: bool
) -> None:
    on_device(check_sums, dtype, holes)


def check_bits_of_torch(device: str, s: int, holes: bool) -> None:
    from megatron_tst.ops.kernels.bag_embedding import bag_mean, bag_mean_backward

    weight, bags, grad = case(device, torch.float32, 9, s, 20, 40, holes)
    # The torch path has a fixed order on the CPU alone.
    leaf = weight.cpu().requires_grad_()
    expected = bag_embedding(leaf, bags.cpu().unsqueeze(0), ignore_index=-100 if holes else None)
    expected.backward(grad.cpu().unsqueeze(0))
    assert leaf.grad is not None
    assert torch.equal(bag_mean(weight, *arguments(bags)).cpu(), expected.detach()[0])
    gradient = bag_mean_backward(grad, *arguments(bags), num_rows=len(weight)).cpu()
    if holes or s.bit_count() == 1:
        assert torch.equal(gradient, leaf.grad)
    else:  # the sum is divided, where torch sums what it has divided
        torch.testing.assert_close(gradient, leaf.grad, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("s", [2, 6, 16])
def test_has_the_bits_of_the_torch_path_in_float32(on_device: Runner, s: int, holes: bool) -> None:
    on_device(check_bits_of_torch, s, holes)


def check_pieces(device: str, piece: int, holes: bool) -> None:
    from megatron_tst.ops.kernels import bag_embedding as kernels

    whole_piece, kernels._PIECE = kernels._PIECE, piece
    try:
        torch.manual_seed(0)
        n, s, v, h = 2 * piece, 3, 12, 5
        # Rows that occur from not at all up to piece after piece, from any place of a piece on.
        bags = torch.randn(n, s).mul(v / 8).add(v / 2).long().clamp(0, v - 1).to(device)
        if holes:
            bags[torch.rand(n, s) < 0.2] = -100
        grad = torch.randn(n, h, device=device)
        exact_weight = torch.zeros(v, h, dtype=torch.float64, device=device, requires_grad=True)
        exact = bag_embedding_reference(exact_weight, bags.unsqueeze(0), ignore_index=-100)[0]
        exact.backward(grad.double())
        assert exact_weight.grad is not None
        gradients = [
            kernels.bag_mean_backward(grad, *arguments(bags), num_rows=v) for _ in range(2)
        ]
        torch.testing.assert_close(gradients[0].double(), exact_weight.grad, rtol=1e-5, atol=1e-5)
        assert torch.equal(*gradients)
    finally:
        kernels._PIECE = whole_piece


@pytest.mark.parametrize(("piece", "holes"), [(1, False), (4, False), (4, True), (16, True)])
def test_frequent_tokens_are_summed_in_pieces(on_device: Runner, piece: int, holes: bool) -> None:
    on_device(check_pieces, piece, holes)


def check_one_token(device: str, n: int, s: int) -> None:
    from megatron_tst.ops.kernels.bag_embedding import bag_mean_backward

    rows = torch.full((n, s), 2, device=device)
    grad = torch.ones((), device=device).expand(n, 8)  # as the gradient of a sum comes
    gradient = bag_mean_backward(grad, rows, None, None, num_rows=4)
    expected = torch.zeros(4, 8)
    expected[2] = n
    assert torch.equal(gradient.cpu(), expected)


def test_one_token_everywhere(on_device: Runner) -> None:
    on_device(check_one_token, 100, 4)


@pytest.mark.gpu
def test_one_token_a_hundred_thousand_times() -> None:
    check_one_token("cuda", 8192, 16)


def check_foreign_rows(device: str) -> None:
    from megatron_tst.ops.kernels.bag_embedding import bag_mean, bag_mean_backward

    weight, far = torch.ones(4, 3, device=device), 2**40
    rows = torch.tensor([[0, far], [-1, 3], [far, 1]], device=device)
    absent = torch.tensor([[False, True], [True, False], [False, False]], device=device)
    mean = bag_mean(weight, rows, absent).cpu()
    assert torch.equal(mean[:2], torch.full((2, 3), 0.5))
    assert mean[2].isnan().all()
    gradient = bag_mean_backward(torch.ones(3, 3, device=device), rows, absent, None, num_rows=4)
    assert gradient[:, 0].tolist() == [0.5, 0.5, 0.0, 0.5]


def test_rows_outside_of_the_weight_are_never_read(on_device: Runner) -> None:
    on_device(check_foreign_rows)


def check_refusals(device: str) -> None:
    from megatron_tst.ops.kernels.bag_embedding import bag_mean, bag_mean_backward

    weight, rows = torch.zeros(4, 3), torch.zeros(2, 5).long()
    with pytest.raises(ValueError, match=r"weight is torch\.float64.*use the torch"):
        bag_mean(weight.double(), rows)
    with pytest.raises(ValueError, match=r"grad is torch\.float64.*use the torch"):
        bag_mean_backward(torch.zeros(2, 3).double(), rows, None, None, 4)
    with pytest.raises(ValueError, match="column stride of 1"):
        bag_mean(torch.zeros(3, 4).t(), rows)
    with pytest.raises(ValueError, match=r"grad \(3, 4\) does not fit rows \(2, 5\)"):
        bag_mean_backward(torch.zeros(3, 4), rows, None, None, 4)
    for add_to in (weight[:3], torch.zeros(3, 4).t()):
        with pytest.raises(ValueError, match=r"does not fit: pass a contiguous \(4, 3\)"):
            bag_mean_backward(torch.zeros(2, 3), rows, None, None, 4, add_to=add_to)
    for unfit in ((rows[0],), (rows[:, :0],), (rows, rows[:1] > 0), (rows, None, torch.ones(5))):
        with pytest.raises(ValueError, match="do not fit"):
            bag_mean(weight, *unfit)
    assert bag_mean(weight, rows[:0]).shape == (0, 3)
    nothing = bag_mean_backward(weight[:0], rows[:0], None, None, 4)
    assert torch.equal(nothing, torch.zeros(4, 3))


def test_what_does_not_fit_is_refused(on_device: Runner) -> None:
    on_device(check_refusals)
