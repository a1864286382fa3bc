"""Widened products of bf16, where the CPU platform is on and oneDNN is held to AVX2.

Run by ``tests/unit/test_cpu_widened.py``, each in a process of its own.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tst.cpu import widened
from tests.cpu_layers import BATCH, LENGTH, VOCABULARY, build_model, initialise

Function = Callable[..., Tensor]


def main() -> None:
    """Runs the check that the command line names."""
    torch.manual_seed(0)
    globals()[sys.argv[1]]()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def rounded_once(function: Function, *operands: Tensor) -> Tensor:
    return function(*(x.float() for x in operands)).bfloat16()


def assert_rounded_once(name: str, function: Function, *operands: Tensor) -> None:
    found = function(*operands)
    expected = rounded_once(function, *operands)
    assert found.dtype == torch.bfloat16, name
    assert found.shape == expected.shape, name
    assert torch.equal(found, expected), name
    # Neither operand is bf16 at any other place: rounded twice, some element would differ.
    assert not found.isnan().any(), name


A, B, C = (7, 40), (40, 9), (7, 9)
BATCHED = (3, 7, 40), (3, 40, 9), (3, 7, 9)

PRODUCTS: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "mm": (torch.mm, (A, B)),
    "mm, transposed": (lambda a, b: torch.mm(b.t(), a.t()), (A, B)),
    "mm, strided": (lambda a, b: torch.mm(a[::2, ::2], b[::2]), (A, B)),
    "mm, no rows": (lambda a, b: torch.mm(a[:0], b), (A, B)),
    "mm, no columns": (lambda a, b: torch.mm(a, b[:, :0]), (A, B)),
    "mm, no sum": (lambda a, b: torch.mm(a[:, :0], b[:0]), (A, B)),
    "matmul of vectors": (lambda a, b: a[0] @ b, (A, B)),
    "matmul, broadcast": (lambda a, b: a @ b, (BATCHED[0], B)),
    "addmm": (torch.addmm, (C, A, B)),
    "addmm, factors": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=3), (C, A, B)),
    "addmm, broadcast": (lambda c, a, b: torch.addmm(c[0], a, b), (C, A, B)),
    "bmm": (torch.bmm, BATCHED[:2]),
    "bmm, transposed": (
        lambda a, b: torch.bmm(a.transpose(1, 2).contiguous().transpose(1, 2), b),
        BATCHED[:2],
    ),
    "baddbmm": (lambda a, b, c: torch.baddbmm(c, a, b, beta=2, alpha=0.3), BATCHED),
    "addbmm": (lambda a, b, c: torch.addbmm(c[0], a, b), BATCHED),
    "mv": (torch.mv, (A, (40,))),
    "addmv": (lambda a, x, y: torch.addmv(y, a, x, beta=0.25, alpha=2), (A, (40,), (7,))),
    "dot": (torch.dot, ((40,), (40,))),
    "vdot": (torch.vdot, ((40,), (40,))),
    "inner": (torch.inner, (A, (9, 40))),
    "addr": (lambda c, x, y: torch.addr(c, x, y, alpha=0.7), (C, (7,), (9,))),
    "linear": (torch.nn.functional.linear, (A, (9, 40))),
    "linear, bias": (torch.nn.functional.linear, (A, (9, 40), (9,))),
    "linear, 3 dimensions": (torch.nn.functional.linear, (BATCHED[0], (9, 40), (9,))),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), BATCHED[:2]),
    "einsum, summed": (lambda a, b: torch.einsum("bij,bjk->ik", a, b), BATCHED[:2]),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=1), (A, B)),
    "attention": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
        ((2, 3, 33, 16),) * 3,
    ),
    "attention, masked": (
        lambda q, k, v: scaled_dot_product_attention(
            q, k, v, torch.ones(33, 33, dtype=torch.bool).tril(5), scale=0.3
        ),
        ((2, 3, 33, 16),) * 3,
    ),
}


def check_products_are_rounded_once() -> None:
    for name, (function, shapes) in PRODUCTS.items():
        assert_rounded_once(name, function, *(draw(*shape) for shape in shapes))


def check_results_of_uninitialised_memory() -> None:
    """``mv`` is ``addmv_`` of memory as it was, times zero."""
    a, x = draw(64, 40), draw(40)
    for _ in range(20):
        garbage = torch.full((64,), torch.nan).bfloat16()
        del garbage
        assert torch.equal(torch.mv(a, x), rounded_once(torch.mv, a, x))
    c = torch.full((64, 9), torch.nan).bfloat16()
    b = draw(40, 9)
    assert torch.equal(torch.addmm(c, a, b, beta=0), rounded_once(torch.mm, a, b))


def check_sums_are_float32() -> None:
    """One and many small numbers, each less than half a unit in the last place of a bf16 one."""
    row = torch.full((1, 4097), 2.0**-10).bfloat16()
    row[0, 0] = 1
    ones = torch.ones_like(row)
    for found in (row @ ones.t(), torch.dot(row[0], ones[0]), torch.mv(row, ones[0])):
        assert found.item() == 5.0


def check_results_to_write_into() -> None:
    cases: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
        "mm": (torch.mm, (draw(*A), draw(*B))),
        "addmm": (torch.addmm, (draw(*C), draw(*A), draw(*B))),
        "bmm": (torch.bmm, (draw(*BATCHED[0]), draw(*BATCHED[1]))),
        "baddbmm": (torch.baddbmm, tuple(draw(*BATCHED[i]) for i in (2, 0, 1))),
        "addbmm": (torch.addbmm, (draw(*C), draw(*BATCHED[0]), draw(*BATCHED[1]))),
        "mv": (torch.mv, (draw(*A), draw(40))),
        "addmv": (torch.addmv, (draw(7), draw(*A), draw(40))),
        "addr": (torch.addr, (draw(*C), draw(7), draw(9))),
        "dot": (torch.dot, (draw(40), draw(40))),
    }
    for name, (function, operands) in cases.items():
        expected = rounded_once(function, *operands)
        filled = torch.full_like(expected, torch.nan)
        strided = torch.full((*expected.shape, 2), torch.nan).bfloat16()[..., 0]
        for out in (torch.empty(0).bfloat16(), filled, strided):
            address, strides = out.data_ptr(), out.stride()
            returned: Any = function(*operands, out=out)
            assert returned is out, name
            assert torch.equal(out, expected), name
            if out is not filled and out is not strided:
                continue
            assert (out.data_ptr(), out.stride()) == (address, strides), name
    # Another shape: torch resizes, and does not broadcast.
    a, b = draw(*A), draw(*B)
    for shape in ((2,), (2, 7, 9), (9, 7)):
        out = torch.zeros(shape).bfloat16()
        torch.mm(a, b, out=out)
        assert torch.equal(out, rounded_once(torch.mm, a, b))


def check_in_place_variants() -> None:
    for name, shapes in {
        "addmm_": (C, A, B),
        "baddbmm_": (BATCHED[2], BATCHED[0], BATCHED[1]),
        "addbmm_": (C, BATCHED[0], BATCHED[1]),
        "addmv_": ((7,), A, (40,)),
        "addr_": (C, (7,), (9,)),
    }.items():
        target, *operands = (draw(*shape) for shape in shapes)
        function = getattr(torch, name.removesuffix("_"))
        expected = rounded_once(function, target, *operands)
        for x in (target.clone(), target.clone().unsqueeze(-1).repeat_interleave(2, -1)[..., 0]):
            assert getattr(x, name)(*operands) is x, name
            assert torch.equal(x, expected), name


def check_what_torch_refuses_is_refused() -> None:
    a, b = draw(*A), draw(*B)
    refused: list[Callable[[], Any]] = [
        lambda: torch.mm(a, b.float()),
        lambda: torch.addmm(torch.zeros(C), a, b),
        lambda: torch.dot(a[0], b[:, 0].float()),
        lambda: torch.mm(a, b, out=torch.empty(0)),
        lambda: torch.mm(a, a),
        lambda: draw(1, 9).addmm_(a, b),
    ]
    for function in refused:
        try:
            function()
        except RuntimeError:
            continue
        raise AssertionError("accepted")
    # One that torch promotes.
    assert torch.addr(torch.zeros(C), draw(7), draw(9)).dtype == torch.float32


def check_other_dtypes_are_untouched() -> None:
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(A, dtype=dtype), torch.randn(B, dtype=dtype)
        assert (a @ b).dtype == dtype
        exact = (a.double() @ b.double()).to(dtype)
        torch.testing.assert_close(a @ b, exact, rtol=1e-5, atol=1e-5)
        out = torch.empty(0, dtype=dtype)
        assert torch.equal(torch.mm(a, b, out=out), a @ b)
        assert out.addmm_(a, b) is out
    integers = torch.arange(6).view(2, 3)
    assert (integers @ integers.t()).tolist() == [[5, 14], [14, 50]]


def check_gradients_of_products() -> None:
    shapes = {
        "matmul": (BATCHED[0], BATCHED[1]),
        "linear": (BATCHED[0], (9, 40), (9,)),
        "mv": (A, (40,)),
    }
    for name, of in shapes.items():
        function = getattr(torch, name, None) or getattr(torch.nn.functional, name)
        operands = [draw(*shape).requires_grad_() for shape in of]
        wide = [x.detach().float().requires_grad_() for x in operands]
        output, expected = function(*operands), function(*wide)
        grad = draw(*output.shape)
        found = torch.autograd.grad(output, operands, grad)
        exact = torch.autograd.grad(expected, wide, grad.float())
        # But for the bias, whose gradient is a sum.
        for mine, other in list(zip(found, exact, strict=True))[:2]:
            assert torch.equal(mine, other.bfloat16()), name


def check_gradients_of_attention() -> None:
    query, key, value = (draw(2, 3, 33, 16).requires_grad_() for _ in range(3))
    context = scaled_dot_product_attention(query, key, value, is_causal=True)
    grad = draw(2, 3, 33, 16)
    found = torch.autograd.grad(context, (query, key, value), grad)
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    wide = [x.detach().float() for x in (query, key, value)]
    _, log_sum_exp = operator(*wide, 0.0, True)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    # The context, of which the gradient needs the values, is bf16.
    expected = backward(grad.float(), *wide, context.detach().float(), log_sum_exp, 0.0, True)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other.bfloat16())
    leaves = [x.double().requires_grad_() for x in wide]
    scores = leaves[0] @ leaves[1].transpose(-1, -2) / 4
    hidden = torch.ones(33, 33, dtype=torch.bool).triu(1)
    exact = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ leaves[2]
    for mine, other in zip(found, torch.autograd.grad(exact, leaves, grad.double()), strict=True):
        # Two roundings, of half a unit in the last of 8 digits.
        assert float((mine.double() - other).norm() / other.norm()) < 4e-3


def check_chunks_of_rows_change_nothing() -> None:
    a, b = draw(96, 200), draw(200, 48)
    whole = a @ b
    assert torch.equal(whole, rounded_once(torch.mm, a, b))
    module: Any = widened
    for rows in (1, 7, 16, 48, 95, 96):
        module._MOST_WIDE_ELEMENTS = rows * 48
        found = a @ b
        assert found.dtype == torch.bfloat16
        # The order of the sums of a row is up to torch: a neighbour, rarely.
        torch.testing.assert_close(found, whole, rtol=2.0**-7, atol=1e-4)
        assert int((found != whole).sum()) <= whole.numel() // 500, rows
        expected = torch.cat([part @ b.float() for part in a.float().split(rows)]).bfloat16()
        assert torch.equal(found, expected), rows
    # A single row that is wider than allowed.
    module._MOST_WIDE_ELEMENTS = 5
    torch.testing.assert_close(a @ b, whole, rtol=2.0**-7, atol=1e-4)
    assert (a @ b[:, :0]).shape == (96, 0)


# Named here again: one that is missing there must be missed.
NAMES = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "addbmm", "addr")
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


class Products(TorchDispatchMode):
    """Counts products of bf16 operands, and notes all operators that have some."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.operators: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = (*args, *kwargs.values())
        if any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in operands):
            name = func.name().removeprefix("aten::").partition(".")[0]
            self.operators.add(name)
            self.count += name.removesuffix("_") in (*NAMES, *ATTENTION)
        return func(*args, **kwargs)


class Spy:
    """Installs the replacements anew, with a record of their calls and of those of torch's own."""

    def __init__(self) -> None:
        self.widened = 0
        self._depth = 0
        self.of_torch: list[tuple[str, set[torch.dtype]]] = []
        module: Any = widened
        module._widened = self._counted(module._widened)
        module._widened_mm = self._counted(module._widened_mm)
        get_kernel: Any = torch.library.get_kernel
        module.torch.library.get_kernel = lambda name, key: self._noted(name, get_kernel(name, key))
        module._library.cache_clear()
        gc.collect()
        # torch's own are back.
        torch.mm(draw(2, 2), draw(2, 2))
        assert self.widened == 0
        widened.install()
        torch.library.get_kernel = get_kernel

    def _counted(self, function: Any) -> Any:
        def counted(*args: Any) -> Any:
            # A product that is written into a tensor calls the one that returns its result.
            self.widened += self._depth == 0
            self._depth += 1
            try:
                return function(*args)
            finally:
                self._depth -= 1

        return counted

    def _noted(self, name: str, kernel: Any) -> Any:
        spy = self

        class Noted:
            def call_boxed(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
                operands = (*args, *kwargs.values())
                spy.of_torch.append((name, {x.dtype for x in operands if torch.is_tensor(x)}))
                return kernel.call_boxed(keyset, *args, **kwargs)

        return Noted()


def _train_a_step(**settings: Any) -> None:
    initialise()
    spy = Spy()
    model = build_model(torch.bfloat16, **settings)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    products = Products()
    with products:
        loss = model(tokens, positions, None, labels=tokens).float().mean()
        loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    # Two layers of 4 projections, and the logits: forward and two gradients each; and attention.
    assert products.count > 27
    assert spy.widened == products.count
    narrow = [name for name, dtypes in spy.of_torch if torch.bfloat16 in dtypes]
    assert narrow == []
    # The spy sees what reaches torch's own kernels.
    assert any(torch.float32 in dtypes for _, dtypes in spy.of_torch)
    others = ("linear", "matmul", "conv", "gemm", "grouped", "mkldnn", "attention")
    missed = {
        operator
        for operator in products.operators
        if any(word in operator for word in others) and operator not in ATTENTION
    }
    assert missed == set()


def check_a_step_of_a_dense_model() -> None:
    _train_a_step()


def check_a_step_of_a_dense_model_by_megatrons_modules() -> None:
    """Attention of torch and linear layers with a bias, instead of the fused halves."""
    _train_a_step(add_bias_linear=True, normalization="LayerNorm")


def check_a_step_of_a_mixture_of_experts() -> None:
    _train_a_step(
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=104,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
    )


def check_second_installation_changes_nothing() -> None:
    before = torch._C._dispatch_dump("aten::mm")
    library = widened._library()
    widened.install()
    assert widened._library() is library
    assert torch._C._dispatch_dump("aten::mm") == before
