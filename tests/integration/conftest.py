"""A launcher of real training runs, a small corpus of real text, and readers of what runs leave."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.synthetic_checkpoint import save_tokenizer
from tests import shipped_script
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


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker that needs it makes for all: no test writes into it."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    root = factory.getbasetemp().parent if is_worker else factory.getbasetemp()
    folder = root / name
    with (root / f"{name}.lock").open("a") as lock:
        # Closing the file, or the end of this process, lets the next one in.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "corpus", tokenize_standard_library) / "text"


@pytest.fixture
def small_run(corpus: Path, tmp_path: Path) -> SmallRun:
    return SmallRun(corpus, tmp_path / "run")


@pytest.fixture(scope="session")
def one_node_run(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> SmallRun:
    """The run of tests.shipped_script, not interrupted."""

    def make(folder: Path) -> None:
        shipped_script.run_on_one_node(launcher, SmallRun(corpus, folder))

    return SmallRun(corpus, made_once(tmp_path_factory, "one-node", make))


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

    def make(root: Path) -> None:
        main = "tests.llama_checkpoints:main"
        launcher.run([str(root), *VARIANTS], root / "log.txt", main=main)
        launcher.run([str(root), *PARALLEL_VARIANTS], root / "log2.txt", world_size=2, main=main)
        renamed = shutil.copytree(root / "gqa-untied-moe-ep2", root / "transformer-engine")
        rename_as_transformer_engine(renamed / f"iter_{ITERATION:07d}")

    return made_once(tmp_path_factory, "checkpoints", make)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of ``checkpoints``."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder of each kind of tests.hf_models."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in KINDS}
