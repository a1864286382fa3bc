"""A launcher of real training runs, a small corpus of real text, and readers of what runs leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.synthetic_checkpoint import save_tokenizer
from tests.hf_models import KINDS, save_model
from tests.llama_checkpoints import (
    ITERATION,
    PARALLEL_VARIANTS,
    VARIANTS,
    VOCABULARY,
    rename_as_transformer_engine,
)
from tests.runs import Check, SmallRun, tokenize_standard_library
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


@pytest.fixture
def check(launcher: Launcher, tmp_path: Path) -> Check:
    """Gives what the checks before training say about each run, all in one process."""

    def messages(runs: Sequence[SmallRun]) -> list[str | None]:
        cases, results = tmp_path / "cases.json", tmp_path / "messages.json"
        cases.write_text(json.dumps([run.argv for run in runs]))
        launcher.run([str(cases), str(results)], tmp_path / "check.txt", main="tests.refusals:main")
        found: list[str | None] = json.loads(results.read_text())
        return found

    return messages


@pytest.fixture(scope="session")
def checkpoints(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``--save`` for each variant of tests.llama_checkpoints, and its logits."""
    root = tmp_path_factory.mktemp("checkpoints")
    main = "tests.llama_checkpoints:main"
    launcher.run([str(root), *VARIANTS], root / "log.txt", main=main)
    launcher.run([str(root), *PARALLEL_VARIANTS], root / "log2.txt", world_size=2, main=main)
    renamed = shutil.copytree(root / "gqa-untied-moe-ep2", root / "transformer-engine")
    rename_as_transformer_engine(renamed / f"iter_{ITERATION:07d}")
    return root


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of ``checkpoints``."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder of each kind of tests.hf_models."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in KINDS}
