"""Ends the workers with the tests that need them: idle ranks would slow down all others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.harness import close_pools


@pytest.fixture(scope="package", autouse=True)
def _workers() -> Iterator[None]:
    yield
    close_pools()
