"""Compiles ``products.cpp`` on CPUs that have use for it, and calls it."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from megatron_tst.common.bf16 import bf16_products, hardware_flags
from megatron_tst.ops.native.kernels import compiled_library, kernels

_SOURCE = Path(__file__).with_name("products.cpp")
_NAMES = ("logits_of", "add_product", "add_transposed_product")
# Those of products.cpp.
_COLUMNS, _DEPTH, _PANEL = 64, 256, 96
_ALIGNMENT = 64


class Products:
    """Products of bfloat16 operands, added up in float32, on one thread.

    torch has none for a CPU that are not rounded to bfloat16. And these are some 5% faster.

    Args:
        library: what was compiled.
    """

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._functions = {name: getattr(loaded, name) for name in _NAMES}
        for function in self._functions.values():
            function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
            function.restype = None

    def serves(self, *tensors: Tensor) -> bool:
        """Whether operands [.., v] or [.., h] are of the dtype and shapes that these have."""
        return all(
            x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] % 2 == 0 and len(x) > 0
            for x in tensors
        )

    def logits_of(self, states: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """``states @ weight.T`` into ``out``, rounded once: [n, h], [v, h] -> [n, v]."""
        (n, h), v = states.shape, len(weight)
        self._call("logits_of", states, weight, out, _COLUMNS * h // 2, (n, v, h))
        return out

    def add_product_(self, sums: Tensor, left: Tensor, right: Tensor) -> None:
        """In place: float32 ``sums`` [n, h] plus ``left @ right`` of [n, v], [v, h]."""
        (n, v), h = left.shape, right.shape[1]
        self._call("add_product", left, right, sums, _DEPTH * _whole_tiles(h), (n, v, h))

    def add_transposed_product_(self, sums: Tensor, left: Tensor, right: Tensor) -> None:
        """In place: float32 ``sums`` [v, h] plus ``left.T @ right`` of [n, v], [n, h]."""
        (n, v), h = left.shape, right.shape[1]
        room = (n + 1) // 2 * (_whole_tiles(h) + _PANEL)
        self._call("add_transposed_product", left, right, sums, room, (n, v, h))

    def _call(
        self, name: str, left: Tensor, right: Tensor, out: Tensor, room: int, shape: tuple[int, ...]
    ) -> None:
        assert left.is_contiguous()
        assert right.is_contiguous()
        assert out.is_contiguous()
        scratch = torch.empty(4 * room + _ALIGNMENT, dtype=torch.uint8)
        aligned = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        pointers = (left.data_ptr(), right.data_ptr(), out.data_ptr(), aligned)
        self._functions[name](*pointers, *shape)


def _whole_tiles(columns: int) -> int:
    return -(-columns // _COLUMNS) * _COLUMNS


@functools.cache
def products() -> Products | None:
    """The products, or None where torch's serve: with AMX those are many times as fast."""
    flags = hardware_flags()
    if kernels() is None or bf16_products() != "native" or "avx512_bf16" not in flags:
        return None
    library = None if "amx_bf16" in flags else compiled_library(_SOURCE)
    return None if library is None else Products(library)
