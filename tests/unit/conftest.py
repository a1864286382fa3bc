"""The devices on which the Triton kernels are tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernel_devices import Interpreter, Runner, missing_for_interpreter, run_on_gpu


@pytest.fixture(scope="session")
def _interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def on_device(request: pytest.FixtureRequest, _interpreter: Interpreter) -> Runner:
    """Runs a check of kernels on one device after the other."""
    if request.param == "cuda":
        return run_on_gpu
    if missing := missing_for_interpreter():
        pytest.skip(missing)
    return _interpreter.run
