"""Layers of Megatron as two fused operations on the CPU platform, in processes of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tst.ops.native import describe_kernels, kernels
from megatron_tst.ops.native.kernels import SWITCH
from tests import fused_layer_checks, plain_layer_checks
from tests.zygote import Launcher

pytestmark = pytest.mark.skipif(kernels() is None, reason=describe_kernels())

CHECKS = sorted(name for name in vars(fused_layer_checks) if name.startswith("check_"))
PLAIN_CHECKS = sorted(name for name in vars(plain_layer_checks) if name.startswith("check_"))
WITHOUT_KERNELS = "check_without_kernels"


@pytest.fixture(scope="module")
def platform() -> Iterator[Launcher]:
    """Starts processes where the platform is on, whatever GPUs the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        owner = Launcher()
        yield owner
        owner.close()


@pytest.mark.parametrize("check", CHECKS)
def test_fused_layer(platform: Launcher, tmp_path: Path, check: str) -> None:
    # Read at the first use of a kernel, by the process itself.
    environment = {SWITCH: "torch"} if check == WITHOUT_KERNELS else {}
    platform.run(
        [check], tmp_path / "log", main="tests.fused_layer_checks:main", environment=environment
    )


@pytest.mark.parametrize("check", PLAIN_CHECKS)
def test_layer_of_plain_modules(platform: Launcher, tmp_path: Path, check: str) -> None:
    platform.run([check], tmp_path / "log", main="tests.plain_layer_checks:main")
