"""The build of Transformer Engine, with a stand-in for the interpreter: nothing is compiled."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINS = "torch==2.0\ntransformer_engine_torch==3.0\nrich==1.0\n"
HEADERS = (
    "cudnn/include/cudnn.h",
    "nccl/include/nccl.h",
    "cu13/include/cuda_runtime.h",
    "cu13/include/crt/host_config.h",
)


class Tree:
    """What the build reads, and an environment whose interpreter answers from files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        (folder / "constraints.txt").write_text(PINS)
        self.answers = {"sysconfig": folder, "torch": "13.0", "nvidia": folder / "nvidia"}
        for header in ("Python.h", *(f"nvidia/{name}" for name in HEADERS)):
            (folder / header).parent.mkdir(parents=True, exist_ok=True)
            (folder / header).touch()
        self.python = folder / ".venv/bin/python"
        self.python.parent.mkdir(parents=True)
        self.write_python()

    def write_python(self) -> None:
        cases = "".join(
            f'"-c import {name}"*) echo {text} ;;\n' for name, text in self.answers.items()
        )
        self.python.write_text(
            "#!/bin/bash\n"
            f'[[ $2 == pip ]] && echo "$@" >>{self.folder}/calls\n'
            f'case "$1 $2" in {cases} "-m pip") [[ "$*" != *--target* ]] || '
            "{ echo 'pip is asked to build'; exit ${BUILD_STATUS:-0}; } ;; esac\n"
        )
        self.python.chmod(0o755)

    def build(self, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", str(self.folder / "scripts/setup_te.sh")],
            env={"PATH": "/usr/bin:/bin", "CXX": "true"} | variables,
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> int:
        log = self.folder / "calls"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree")


def test_second_build_is_none_until_a_pin_that_matters_changes(tree: Tree) -> None:
    done = tree.build()
    assert done.returncode == 0, done.stderr
    assert "minutes" in done.stdout
    calls = tree.calls
    assert calls == 3
    pins = tree.folder / "constraints.txt"
    pins.write_text(PINS.replace("rich==1.0", "rich==1.1"))
    again = tree.build()
    assert (again.returncode, again.stdout, tree.calls) == (0, "", calls)
    pins.write_text(PINS.replace("torch==2.0", "torch==2.1"))
    assert tree.build().returncode == 0
    assert tree.calls == 2 * calls


def test_failed_build_shows_its_end_and_is_tried_again(tree: Tree) -> None:
    failed = tree.build(BUILD_STATUS="1")
    assert failed.returncode == 1
    assert "pip is asked to build" in failed.stderr
    assert "the build has failed; all of its output is in .venv/build-te.log" in failed.stderr
    calls = tree.calls
    assert tree.build().returncode == 0
    assert tree.calls > calls


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (".venv/bin/python", ".venv is missing: run 'make setup'"),
        ("Python.h", "the headers of .* are missing"),
        ("nvidia/cudnn/include/cudnn.h", "nvidia/cudnn/include/cudnn.h is missing"),
        ("nvidia/nccl/include/nccl.h", "nvidia/nccl/include/nccl.h is missing"),
    ],
)
def test_what_is_missing_is_named(tree: Tree, missing: str, words: str) -> None:
    (tree.folder / missing).unlink()
    done = tree.build()
    assert done.returncode == 1
    assert re.search(words, done.stderr), done.stderr


def test_the_pinned_version_is_built_and_no_other(tree: Tree) -> None:
    assert tree.build().returncode == 0
    assert "transformer_engine_torch==3.0" in (tree.folder / "calls").read_text()
    (tree.folder / "constraints.txt").write_text("torch==2.0\n")
    done = tree.build()
    assert done.returncode == 1
    assert "constraints.txt has no transformer_engine_torch==VERSION" in done.stderr


def test_missing_compiler_is_named(tree: Tree) -> None:
    done = tree.build(CXX="absent-compiler")
    assert done.returncode == 1
    assert "no C++ compiler ('absent-compiler'): install g++" in done.stderr


def test_torch_of_another_cuda_is_refused(tree: Tree) -> None:
    tree.answers["torch"] = "12.8"
    tree.write_python()
    done = tree.build()
    assert done.returncode == 1
    assert "torch in .venv is built for CUDA 12.8" in done.stderr
