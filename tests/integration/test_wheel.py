"""The wheel in a virtual environment of its own: no file of this repository is in reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import SmallRun

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Installed:
    """The wheel, and an empty folder outside of the repository in which ``tst`` is called."""

    wheel: Path
    environment: Path
    folder: Path

    def run(self, command: str, *arguments: object) -> str:
        """What a program of the environment prints."""
        program, *words = command.split()
        hidden = ("PYTHONPATH", "VIRTUAL_ENV")
        variables = {name: value for name, value in os.environ.items() if name not in hidden}
        done = subprocess.run(
            [self.environment / "bin" / program, *words, *map(str, arguments)],
            cwd=self.folder,
            env={**variables, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("wheel")
    # A build leaves files beside its sources, and takes those that an earlier one left.
    sources = base / "sources"
    shutil.copytree(
        ROOT / "megatron_tst",
        sources / "megatron_tst",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in SOURCES:
        shutil.copy(ROOT / name, sources)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build: list[str | Path] = [
        "wheel",
        sources,
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        base,
    ]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = base.glob("*.whl")
    environment = base / "environment"
    venv.create(environment)
    _lend_dependencies(environment)
    python = environment / "bin" / "python"
    install: list[str | Path] = ["--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True)
    (base / "elsewhere").mkdir()
    return Installed(wheel, environment, base / "elsewhere")


def _lend_dependencies(environment: Path) -> None:
    """Puts the packages of this environment behind those of the new one.

    Lines of a ``.pth`` file are paths only: that of this project's editable installation is not
    followed.
    """
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")


def test_wheel_has_every_file_of_the_package(installed: Installed) -> None:
    files = (file for file in (ROOT / "megatron_tst").rglob("*") if file.is_file())
    wanted = {str(file.relative_to(ROOT)) for file in files if file.suffix != ".pyc"}
    assert {"megatron_tst/py.typed", "megatron_tst/ops/native/kernels.cpp"} < wanted
    with zipfile.ZipFile(installed.wheel) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("megatron_tst/")}
    assert held == wanted


def test_commands_work_without_the_repository(installed: Installed) -> None:
    imported = installed.run("python -c", "import megatron_tst; print(megatron_tst.__file__)")
    assert imported.startswith(str(installed.environment))
    assert "\n  preprocess " in installed.run("tst --help")
    planned = installed.run("tst plan --model 270M --tokens 42B --gpu-hours 100")
    assert "\nFlags for python -m megatron_tst.pretrain:\n" in planned

    text = installed.folder / "text.txt"
    text.write_text("It is raining cats and dogs. " * 100)
    made = installed.run("tst preprocess --byte-level --output-prefix text --input", text)
    assert made.startswith("text.bin: 1 documents, 2,901 tokens (uint16)")
    shown = installed.run("tst inspect text --bag-size 4 --sequence-length 8")
    assert "'It is raining" in shown
    assert "bag size 4" in shown

    run = SmallRun(installed.folder / "text", installed.folder / "run").with_(
        tst_bag_size=2, tst_step_ratio=0.5, train_iters=4, split="1,0,0", eval_iters=0
    )
    launch = "python -m torch.distributed.run --standalone --nproc-per-node 2 --no-python"
    tst = installed.environment / "bin" / "tst"
    trained = installed.run(launch, tst, "pretrain", *run.argv)
    assert "iteration        4/       4" in trained
