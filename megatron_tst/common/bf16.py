"""Whether this CPU multiplies bf16 matrices itself. Needs no torch."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Literal

# As Linux names them: x86 with AVX-512 or AMX, ARM with or without SVE.
_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
# Values of ONEDNN_MAX_CPU_ISA under which oneDNN has no bf16 product of the hardware's. It ignores
# values that it does not know.
_WITHOUT_BF16 = frozenset(
    {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
)

BF16Products = Literal["native", "widened"]
"""How products of bf16 operands are computed: by the hardware's instructions, or widened to fp32,
summed in fp32 and rounded once."""


def bf16_products() -> BF16Products:
    """How the CPU platform computes products of bf16 operands in this process.

    Without instructions for it torch multiplies bf16 matrices 10 to 50 times as slowly as fp32
    ones. ``ONEDNN_MAX_CPU_ISA`` limits what counts as there, as it limits oneDNN.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    if limit.upper() in _WITHOUT_BF16:
        return "widened"
    return "native" if hardware_flags() else "widened"


def describe_bf16() -> str:
    """The choice and its reason, for people: ``widened to fp32 (no avx512_bf16, ...)``."""
    flags = sorted(hardware_flags())
    if bf16_products() == "native":
        return f"native ({', '.join(flags)})"
    why = "ONEDNN_MAX_CPU_ISA forbids it" if flags else "this CPU has no bf16 instructions"
    return f"widened to fp32 ({why})"


@functools.cache
def hardware_flags() -> frozenset[str]:
    """bf16 instructions of this CPU, by the kernel's names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    # The same for every core; "flags" on x86, "Features" on ARM.
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return _FLAGS & set(flags.split())
