"""The devices on which the Triton kernels are tested."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.kernel_devices import Interpreter, Runner, run_on_gpu


@pytest.fixture(scope="session")
def _interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def on_device(request: pytest.FixtureRequest, _interpreter: Interpreter) -> Runner:
    """Runs a check of kernels on one device after the other."""
    if find_spec("triton") is None:
        pytest.skip("needs Triton")
    return _interpreter.run if request.param == "interpreter" else run_on_gpu
