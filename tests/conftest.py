"""What all tests share: costs, skips, no deadlines, and that ``gpu`` means a CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import skips
from tests.costs import (  # noqa: F401
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)
from tests.zygote import Launcher

# Workers share the cores, and waiting threads spin. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Time is not what these tests are about, and other work shares the cores.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(skips)


def _has_cuda_device() -> bool:
    # Not torch.cuda.is_available(): it costs an import of torch, and the CPU platform replaces it.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _has_cuda_device():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts training runs, and what else needs processes with Megatron imported."""
    owner = Launcher()
    yield owner
    owner.close()


@pytest.fixture(scope="session")
def has_cuda_device() -> bool:
    return _has_cuda_device()
