"""Kernels in C++ for one CPU core, compiled where they run; torch's operators serve without them.

Needs torch only.
"""

from megatron_tst.ops.native.kernels import Kernels, compiled_kernels, describe_kernels, kernels
from megatron_tst.ops.native.products import Products, products

__all__ = ["Kernels", "Products", "compiled_kernels", "describe_kernels", "kernels", "products"]
