"""The steps of the Dockerfile that decide about versions, and the files around it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.container import changed_packages, failed_imports, main, read_pins

ROOT = Path(__file__).parents[2]
CONTAINER = """\
# a comment
torch==2.14.0a0+4fdf77b940.nv26.08.63802676
numpy==2.1.0
transformer_engine==2.16.0+4220403e
broken @ file:///somewhere
"""


def test_the_container_wins_and_the_rest_is_pinned_as_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    container = tmp_path / "container.txt"
    container.write_text(CONTAINER)
    assert main(["constraints", str(container), str(ROOT / "constraints.txt")]) == 0
    pins = read_pins(capsys.readouterr().out.splitlines())
    tested = read_pins((ROOT / "constraints.txt").read_text().splitlines())
    # Both spellings that pip has for it are one version.
    assert pins["torch"] == "2.14.0a0+4fdf77b940.nv26.8.63802676"
    assert pins["numpy"] == "2.1.0" != tested["numpy"]
    assert pins["transformer-engine"] == "2.16.0+4220403e"
    assert pins["megatron-core"] == tested["megatron-core"]
    assert not [name for name in pins if name.startswith("nvidia-")]


def test_a_changed_or_lost_package_is_named() -> None:
    before = {"torch": "2.13.0a0+nv", "apex": "0.1", "numpy": "2.1.0"}
    assert changed_packages(before, {"torch": "2.14.1", "numpy": "2.1.0", "new": "1"}) == [
        "apex was 0.1 in the container and is gone now",
        "torch was 2.13.0a0+nv in the container and is 2.14.1 now",
    ]


def test_a_module_that_does_not_load_is_named() -> None:
    assert failed_imports(["json", "no_such_module"]) == [
        "import no_such_module: No module named 'no_such_module'"
    ]


def test_what_the_dockerfile_copies_is_not_ignored() -> None:
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = [
        source.rstrip("/").split("/")[0]
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
        if source != "."
    ]
    assert copied
    assert set(copied) <= kept
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.parametrize("tool", ["hadolint", "shellcheck"])
def test_linters_of_make_check_find_faults(tool: str, tmp_path: Path) -> None:
    """The binaries of the development environment work: a faulty file does not pass."""
    # An overlay has none of its own.
    binary = shutil.which(tool, path=f"{Path(sys.executable).parent}:{ROOT / '.venv/bin'}")
    assert binary is not None
    faulty = tmp_path / ("Dockerfile" if tool == "hadolint" else "script.sh")
    faulty.write_text("FROM debian\n" if tool == "hadolint" else "#!/bin/sh\nrm $1\n")
    found = subprocess.run([binary, str(faulty)], capture_output=True, text=True)
    assert found.returncode == 1
    assert ("DL3006" if tool == "hadolint" else "SC2086") in found.stdout
