"""Preprocessing as a user meets it: killed and started again, on much text, and on a cluster."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess
from megatron_tst.corpus.tokenizer import train_byte_level_bpe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "data" / "tokenize_web_text.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}

# Saves its state often, and prints its largest memory and that of its largest worker.
SCRIPT = """
import resource, sys
from pathlib import Path
from megatron_tst.corpus import preprocessing

if __name__ == "__main__":
    preprocessing.CHECKPOINT_SECONDS = 0.1
    corpus, prefix, workers = sys.argv[1:]
    preprocessing.preprocess(preprocessing.PreprocessConfig(
        (Path(corpus),), Path(prefix), byte_level=True, workers=int(workers)))
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(resource.getrusage(who).ru_maxrss)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def write_lines(path: Path, texts: Iterable[str]) -> Path:
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def start(script: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(script: Path, *arguments: object) -> str:
    output, errors = (process := start(script, *arguments)).communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, script: Path, is_packed: bool
) -> None:
    texts = [f"{i} größe\n" * 2000 for i in range(2000)]
    corpus = write_lines(tmp_path / "a.jsonl", texts)
    if is_packed:
        packed = gzip.compress(corpus.read_bytes(), 1)
        corpus = corpus.with_suffix(".jsonl.gz")
        corpus.write_bytes(packed)
    progress = tmp_path / "out.partial" / "progress.json"
    state = ""
    for workers in (1, 2):
        process = start(script, corpus, tmp_path / "out", workers)
        while not progress.exists() or progress.read_text() == state:
            assert process.poll() is None
            sleep(0.01)
        process.kill()
        # The workers hold the output pipes open: this returns when they have ended too.
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL
        assert list(tmp_path.glob("out.*")) == [tmp_path / "out.partial"]
        state = progress.read_text()
        assert json.loads(state)["tokens"] > 0
    finish(script, corpus, tmp_path / "out", 1)
    assert not (tmp_path / "out.partial").exists()
    expected = "".join(f"{text}\0" for text in texts).encode()
    written = np.fromfile(tmp_path / "out.bin", np.uint16)
    assert np.array_equal(written, np.frombuffer(expected, np.uint8))
    lengths = [len(document) for document in IndexedDataset(str(tmp_path / "out"))]
    assert lengths == [len(text.encode()) + 1 for text in texts]


def test_memory_does_not_grow_with_the_input(tmp_path: Path, script: Path) -> None:
    peaks = []
    for megabytes in (4, 28):
        text = "größe " * 100
        corpus = write_lines(tmp_path / f"{megabytes}.jsonl", [text] * (megabytes * 1000))
        output = finish(script, corpus, tmp_path / str(megabytes), 1)
        peaks.append([int(line) for line in output.split()])
    # In kB. The larger input has 24 MB more text in 24,000 more documents; 8 MB is more than the
    # peaks of equal runs differ by.
    for small, large in zip(*peaks, strict=True):
        assert large - small < 8000


def web_text(folder: Path) -> tuple[Path, Path]:
    """Three compressed files and a tokenizer for them."""
    folder.mkdir()
    for number in range(3):
        words = random.Random(number).choices(["It's", "größe", "東京", "the\n", "🎉", ""], k=4000)
        texts = [" ".join(words[i : i + 40]) for i in range(0, 4000, 40)]
        lines = write_lines(folder / f"{number}.jsonl", texts)
        packed = zstandard.ZstdCompressor().compress(lines.read_bytes())
        (folder / f"{number}.jsonl.zst").write_bytes(packed)
    tokenizer = folder / "tokenizer"
    train_byte_level_bpe(texts, 300).save_files(tokenizer)
    return folder, tokenizer


def files_of(prefix: Path) -> list[bytes]:
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".bin", ".idx")]


def reference(folder: Path, tokenizer: Path, prefix: Path) -> list[bytes]:
    """One run over the files in the order of two tasks: every second file, then the others."""
    files = tuple(folder / f"{number}.jsonl.zst" for number in (0, 2, 1))
    preprocess(PreprocessConfig(files, prefix, tokenizer=tokenizer))
    return files_of(prefix)


def test_datatrove_pipeline_gives_the_bytes_of_one_run(tmp_path: Path) -> None:
    folder, tokenizer = web_text(tmp_path / "in")
    prefix = tmp_path / "out" / "corpus"
    arguments = ["dclm", "--input", folder, "--output-prefix", prefix, "--tokenizer", tokenizer]
    finish(EXAMPLE, *arguments, "--tasks", 2)
    assert files_of(prefix) == reference(folder, tokenizer, tmp_path / "reference")


STAND_INS = {
    # Keeps the job script, and answers as Slurm does.
    "sbatch": 'for last; do :; done; cp "$last" "$JOBS/$(ls "$JOBS" | wc -l).sh"; echo job 7',
    "srun": 'while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done; "$@"',
    "scontrol": "echo localhost",
}


def test_slurm_pipeline_gives_the_bytes_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for Slurm's three commands, and runs the jobs that are submitted."""
    folder, tokenizer = web_text(tmp_path / "in")
    (commands := tmp_path / "commands").mkdir()
    (jobs := tmp_path / "jobs").mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "JOBS": str(jobs),
        "TST_INPUT": str(folder),
        "TST_OUTPUT_PREFIX": str(tmp_path / "corpus"),
        "TST_TOKENIZER": str(tokenizer),
        "TST_PARTITION": "cpu",
        "SLURM_NODELIST": "localhost",
    }
    for name, value in environment.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    finish(EXAMPLE, "dclm", "--slurm", "--tasks", 2, "--account", "me", "--time", "01:00:00")
    submitted = [file.read_text() for file in sorted(jobs.iterdir())]
    tokenize, merge = (
        next(script for script in submitted if f"{name}/executor.pik" in script)
        for name in ("parts", "merge")
    )
    for line in ("partition=cpu", "account=me", "time=01:00:00", "array=0-1", "mem-per-cpu=4G"):
        assert f"#SBATCH --{line}\n" in tokenize
    for script, rank in ((tokenize, 1), (tokenize, 0), (merge, 0)):
        job = ENVIRONMENT | {"SLURM_ARRAY_TASK_ID": str(rank)}
        subprocess.run(["bash", "-c", script], env=job, check=True, capture_output=True)
    assert files_of(tmp_path / "corpus") == reference(folder, tokenizer, tmp_path / "reference")
