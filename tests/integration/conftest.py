"""A launcher of real training runs, a small corpus of real text, and readers of what runs leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import SmallRun, tokenize_standard_library
from tests.zygote import Launcher


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    owner = Launcher()
    yield owner
    owner.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenize_standard_library(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def small_run(corpus: Path, tmp_path: Path) -> SmallRun:
    return SmallRun(corpus, tmp_path / "run")
