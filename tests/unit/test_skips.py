"""A skip that pyproject.toml does not allow is a failure, and skips are counted by reason."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = """
[tool.pytest.ini_options]
allowed_skips = ["needs a CUDA device"]
allowed_skips_outside_ci = ["needs Chromium"]
"""
TESTS = """
import pytest

@pytest.mark.parametrize("case", range(3))
def test_gpu(case): pytest.skip("needs a CUDA device")

@pytest.mark.skipif(True, reason="needs Chromium: install it")
def test_browser(): pass

@pytest.mark.xfail(reason="a fault that is known")
def test_fault(): assert False
"""
UNKNOWN = "import pytest\ndef test_it(): pytest.skip('on Mondays')"
MODULE = "import pytest\npytest.importorskip('no_such_package', reason='no such package')"
ALWAYS = {"on Mondays", "no such package"}


def run(folder: Path, in_ci: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.skips", *options],
        cwd=folder,
        env={**os.environ, "CI": in_ci, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("in_ci", "failures"), [("", ALWAYS), ("true", {*ALWAYS, "needs Chromium: install it"})]
)
def test_skips(tmp_path: Path, in_ci: str, failures: set[str]) -> None:
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    for name, text in (("test_a", TESTS), ("test_b", UNKNOWN), ("test_c", MODULE)):
        (tmp_path / f"{name}.py").write_text(text)
    done = run(tmp_path, in_ci, "-n", "1", "--continue-on-collection-errors")
    assert done.returncode == 1, done.stdout
    assert set(re.findall(r"^skipped, because: (.*)$", done.stdout, re.M)) == failures
    assert "      3  needs a CUDA device\n" in done.stdout
    assert ("      1  needs Chromium: install it\n" in done.stdout) == (not in_ci)


def test_allowed_skips_and_expected_failures_leave_a_run_green(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    (tmp_path / "test_a.py").write_text(TESTS)
    done = run(tmp_path, "")
    assert done.returncode == 0, done.stdout
