"""Products of bf16 operands on a CPU that has no instructions for them.

Each is computed on float32 copies, summed in float32 and rounded once, which is what the native
instructions mean; only the order of the sums differs. torch's own kernels for such CPUs take 10 to
50 times as long.

The kernels of torch's dispatcher are replaced, so that every path takes the new ones: modules of
Megatron and of users, gradients that autograd derives, and attention.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_tst.common.bf16 import bf16_products

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "addbmm", "addr")
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
# Results of a matrix product that are held in float32 at a time: 64 MB.
_MOST_WIDE_ELEMENTS = 1 << 24


def install() -> None:
    """Replaces torch's kernels in this process, unless the CPU computes bf16 itself. Idempotent."""
    if bf16_products() == "widened" and is_available():
        _library()


def is_available() -> bool:
    """Whether this torch can hand out the kernels that are replaced; 2.14 can, 2.6 cannot."""
    return hasattr(torch.library, "get_kernel")


@functools.cache
def _library() -> torch.library.Library:
    # The replacements live as long as this object.
    library = torch.library.Library("aten", "IMPL")
    for name in (*_PRODUCTS, *_ATTENTION):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            _replace(library, getattr(packet, overload))
        in_place = getattr(torch.ops.aten, f"{name}_", None)
        if in_place is not None:
            _replace(library, in_place.default)
    return library


def _replace(library: torch.library.Library, operator: Any) -> None:
    qualified = operator.name()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"):
        # Made of others, or of another kind of number.
        return
    narrow = torch.library.get_kernel(qualified, "CPU")
    wide = _widened_mm if operator is torch.ops.aten.mm.default else _widened
    is_attention = any(name in qualified for name in _ATTENTION)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        # Masks and statistics of attention have dtypes of their own. Operands of a product that
        # differ are for torch to refuse.
        deciding = tensors[:1] if is_attention else tensors
        if all(x.dtype == torch.bfloat16 for x in deciding):
            return wide(operator, args, kwargs)
        return narrow.call_boxed(keyset, *args, **kwargs)

    library.impl(qualified.removeprefix("aten::"), kernel, "CPU", with_keyset=True)


def _widened(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls an operator, or the one that returns its result, on float32 copies."""
    target = kwargs.get("out")
    if operator.name().endswith("_"):
        target = args[0]
    if target is None:
        return _narrowed(operator(*map(_wide, args), **_wide_values(kwargs)), operator)
    base = operator.name().removeprefix("aten::").partition(".")[0].removesuffix("_")
    rest = {name: value for name, value in kwargs.items() if name != "out"}
    result = getattr(torch.ops.aten, base).default(*args, **rest)
    if "out" in kwargs and target.shape != result.shape:
        # As torch does, which also warns where the tensor has elements.
        target.resize_(result.shape)
    return target.copy_(result)


def _widened_mm(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """[n, k], [k, m] -> [n, m], some rows at a time: logits of a whole batch are large."""
    first, second = args
    rows = max(_MOST_WIDE_ELEMENTS // max(second.shape[1], 1), 1)
    if len(first) <= rows:
        result: Tensor = operator(first.float(), second.float()).bfloat16()
        return result
    wide = second.float()
    result = first.new_empty(len(first), second.shape[1])
    for start in range(0, len(first), rows):
        part = slice(start, start + rows)
        result[part] = operator(first[part].float(), wide)
    return result


def _wide(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if is_narrow else value


def _wide_values(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _wide(value) for name, value in values.items()}


def _narrowed(result: Any, operator: Any) -> Any:
    """Results in bf16, but for the statistics of attention, which are float32 anyway."""
    if isinstance(result, Tensor):
        return result.bfloat16()
    if operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
        context, log_sum_exp = result
        return context.bfloat16(), log_sum_exp
    return tuple(part.bfloat16() for part in result)
