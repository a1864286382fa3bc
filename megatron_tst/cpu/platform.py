"""Switches the CPU platform on where no GPU is visible."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_tst.common.bf16 import bf16_products, describe_bf16
from megatron_tst.common.platform import Platform, platform, run_on
from megatron_tst.cpu.arguments import refuse_gpu_arguments, set_cpu_defaults
from megatron_tst.upstream.symbols import VERSIONS

# Freed blocks stay in the process and large ones live on huge pages: page faults of activations and
# gradients otherwise take a third of a step (measured: 25.6 s against 17.1 s for one script).
_ALLOCATOR_SETTINGS = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=268435456"
)

# NVIDIA, NVIDIA under WSL, AMD.
_GPU_DRIVER_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def is_active() -> bool:
    """Whether :func:`activate` switched the platform on in this process."""
    return not platform().has_gpu


def activate() -> bool:
    """Makes Megatron run on CPU cores if no GPU is visible. Idempotent.

    Returns:
        Whether the platform is on.

    Raises:
        RuntimeError: torch does not find the GPU of a machine that has one; or the installed
            Megatron-Core is not a release that the platform was run against, or lacks a symbol
            that the platform replaces; the message names it.
    """
    if is_active():
        return True
    import torch

    if torch.cuda.is_available():
        return False
    if _has_visible_gpu():
        raise RuntimeError(
            "This machine has a GPU driver, but torch finds no GPU: repair the driver or the torch "
            "installation, or set CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    _require_tested_megatron()
    # Megatron requires it with tensor parallelism, to order the kernels of a GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    from megatron_tst.cpu import collectives, cuda_emulation, data_loader, devices, widened

    widened.install()
    cuda_emulation.install()
    devices.install()
    collectives.install()
    data_loader.install()

    from megatron_tst.cpu import megatron_modules

    megatron_modules.install()
    run_on(Platform(False, refuse_gpu_arguments, set_cpu_defaults, describe))
    return True


def describe() -> dict[str, str]:
    """How the platform computes in this process, for people and records."""
    from megatron_tst.cpu.widened import is_available
    from megatron_tst.ops.native import describe_kernels

    products = describe_bf16()
    if bf16_products() == "widened" and not is_available():
        products = "torch's own, slow (this CPU has no bf16 instructions, and torch is too old)"
    return {"bf16_products": products, "kernels": describe_kernels()}


def restart_with_allocator_settings() -> None:
    """Replaces this process by itself under allocator settings that suit training on a CPU.

    glibc reads them once, at process start. Call this before heavy imports. Does nothing on a
    machine with visible GPUs, where the user already set ``GLIBC_TUNABLES``, or outside Linux.
    """
    if _has_visible_gpu() or "GLIBC_TUNABLES" in os.environ or sys.platform != "linux":
        return
    os.environ["GLIBC_TUNABLES"] = _ALLOCATOR_SETTINGS
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _has_visible_gpu() -> bool:
    """Whether there is a GPU driver and the environment does not hide the GPUs; asks no torch."""
    has_driver = any(Path(device).exists() for device in _GPU_DRIVER_DEVICES)
    return has_driver and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def _require_tested_megatron() -> None:
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise RuntimeError(
            "megatron-core is not installed: run `make setup`, or "
            f"pip install 'megatron-core[training]=={VERSIONS[0]}'."
        ) from None
    if found not in VERSIONS:
        raise RuntimeError(
            f"The CPU platform was not tested with megatron-core {found}: install one of "
            f"{', '.join(VERSIONS)}, or run on a GPU, where it is not needed."
        )
