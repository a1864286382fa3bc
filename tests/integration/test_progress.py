"""What commands say of their progress where there is no terminal."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tst.common.progress import INTERVAL_VARIABLE
from tests.tiny_llama import save_tiny_llama
from tests.zygote import ROOT


def run_to_files(folder: Path, seconds: float, *command: object) -> tuple[str, list[str]]:
    """Standard output and the lines of standard error of a tool, both written to files."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), INTERVAL_VARIABLE: str(seconds)}
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        arguments = [sys.executable, *map(str, command)]
        subprocess.run(arguments, cwd=ROOT, env=environment, stdout=out, stderr=err, check=True)
    return (folder / "out").read_text(), (folder / "err").read_text().splitlines()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def test_preprocessing(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = (json.dumps({"text": str(draw.random()) * 20}) for _ in range(20_000))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    command = ["tools/preprocess_data.py", "--input", tmp_path / "text.jsonl", "--byte-level"]
    command += ["--workers", "1", "--overwrite", "--output-prefix"]
    output, errors = run_to_files(tmp_path, 0.02, *command, tmp_path / "a")
    assert errors
    for line in errors:
        assert line.startswith("tokenizing: ")
    assert any(" MB of 7." in line and "%)" in line and "tokens/s" in line for line in errors)
    assert any(line.endswith(" left") for line in errors)
    # Results stay alone on standard output.
    assert len(output.splitlines()) == 1
    assert output.startswith(f"{tmp_path / 'a.bin'}: 20,000 documents, ")


def test_evaluation(tmp_path: Path, model: Path) -> None:
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 400)
    command = ["tools/evaluate.py", "--model", model, "--text", tmp_path / "text.txt"]
    options = ["--batch-size", "1", "--device", "cpu", "--output", tmp_path / "result.json"]
    output, errors = run_to_files(tmp_path, 0.02, *command, *options)
    lines = [line for line in errors if line.startswith(f"{model}, text: ")]
    assert any(" windows (" in line and line.endswith(" left") for line in lines)
    assert output.startswith("| task | metric |")


def test_an_import(tmp_path: Path, model: Path) -> None:
    command = ["tools/convert_hf_to_megatron.py", "--model", model, "--output", tmp_path / "new"]
    output, errors = run_to_files(tmp_path, 0.0005, *command)
    assert any(line.startswith("Importing: ") and " parts (" in line for line in errors)
    assert output.startswith(f"# {model}: ")


def test_a_bad_interval_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "tools/preprocess_data.py", "--input", ".", "--byte-level"]
    done = subprocess.run(
        [*command, "--output-prefix", str(tmp_path / "a")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), INTERVAL_VARIABLE: "often"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr == f"error: {INTERVAL_VARIABLE} is 'often': use a number of seconds above 0.\n"
    )
