"""What to train and evaluate in on this machine: bf16, or fp32 where bf16 buys nothing.

Needs no torch.
"""

from __future__ import annotations

from typing import Literal

from megatron_tst.common.bf16 import bf16_products, describe_bf16

Precision = Literal["bf16", "fp32"]


def faster_precision(on_gpu: bool) -> Precision:
    """bf16 on GPUs and on CPUs that multiply it themselves, fp32 on all others.

    Args:
        on_gpu: whether a GPU computes the products.
    """
    return "bf16" if on_gpu or bf16_products() == "native" else "fp32"


def describe_precision(on_gpu: bool) -> str:
    """The choice and its reason, for people: ``bf16, there being a GPU``."""
    why = "there being a GPU" if on_gpu else f"products of bf16 being {describe_bf16()}"
    return f"{faster_precision(on_gpu)}, {why}"
