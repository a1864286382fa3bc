"""Our tokenization of a .jsonl file against Megatron-LM's own ``tools/preprocess_data.py``.

Both read the same file with the same tokenizer on the same cores, in turns. Usage:
``python benchmarks/preprocess.py --megatron-preprocess Megatron-LM/tools/preprocess_data.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tst.data.tokenizer import train_byte_level_bpe

ROOT = Path(__file__).parents[1]
BAR = 2.0
SAMPLE_SECONDS = 1.0


@dataclass(frozen=True)
class Measurement:
    """One run of one tool.

    Attributes:
        seconds: from its start to its end.
        peak_bytes: largest memory of it and its children together, shared pages counted once.
    """

    seconds: float
    peak_bytes: int


def main() -> None:
    """Measures every number of workers and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--megatron-preprocess", type=Path, required=True, help="Megatron-LM's preprocess_data.py")
    add("--megabytes", type=int, default=60, help="size of the text (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[1, 2], help="also the cores that are used")
    add("--rounds", type=int, default=2, help="runs of each tool (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = write_corpus(folder, options.megabytes * 1_000_000)
        print("| workers | tool | docs/s | MB/s | start-up, s | peak memory, MB | ratio |")
        print("|---|---|---|---|---|---|---|")
        for workers in options.workers:
            measure(folder, options.megatron_preprocess, documents, workers, options.rounds)


def standard_library() -> Iterator[str]:
    """Python's own sources, over and over."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    while True:
        for file in files:
            if "site-packages" not in file.parts:
                # Some test files are not in UTF-8.
                text = file.read_bytes().decode(errors="replace").replace("\0", "")
                # Megatron-LM's tool counts empty files as documents, ours leaves them out.
                if text:
                    yield text


def write_corpus(folder: Path, size: int) -> int:
    """Writes the text, one line of it on its own, and a tokenizer; returns the documents."""
    texts = []
    for text in standard_library():
        texts.append(text)
        size -= len(text.encode())
        if size <= 0:
            break
    for name, lines in (("text", texts), ("one", texts[:1])):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in lines)
    train_byte_level_bpe(texts[:2000], 8192).save_files(folder / "tokenizer")
    return len(texts)


def measure(folder: Path, upstream: Path, documents: int, workers: int, rounds: int) -> None:
    """Prints two rows of the table, and fails if the tokens differ."""
    commands = {"Megatron-LM": megatron_command(folder, upstream, workers)}
    commands["ours"] = our_command(folder, workers)
    seconds: dict[str, list[float]] = {tool: [] for tool in commands}
    starts: dict[str, list[float]] = {tool: [] for tool in commands}
    peaks = dict.fromkeys(commands, 0)
    for _ in range(rounds):
        for tool, command in commands.items():
            start = run([part.replace("@", "one") for part in command], folder, workers)
            whole = run([part.replace("@", "text") for part in command], folder, workers)
            starts[tool].append(start.seconds)
            seconds[tool].append(whole.seconds - start.seconds)
            peaks[tool] = max(peaks[tool], whole.peak_bytes)
    check_same_tokens(folder)
    megabytes = (folder / "text.jsonl").stat().st_size / 1e6
    medians = {tool: statistics.median(values) for tool, values in seconds.items()}
    for tool, median in medians.items():
        print(
            f"| {workers} | {tool} | {documents / median:.0f} | {megabytes / median:.2f} | "
            f"{statistics.median(starts[tool]):.1f} | {peaks[tool] / 1e6:.0f} | "
            f"{medians['Megatron-LM'] / median:.2f} |",
            flush=True,
        )
    if medians["Megatron-LM"] < BAR * medians["ours"]:
        print(f"below the bar of {BAR}", file=sys.stderr)


def megatron_command(folder: Path, script: Path, workers: int) -> list[str]:
    return [
        *(sys.executable, str(script.resolve()), "--input", str(folder / "@.jsonl")),
        *("--output-prefix", str(folder / "theirs-@"), "--workers", str(workers)),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"),
        *("--tokenizer-model", str(folder / "tokenizer")),
    ]


def our_command(folder: Path, workers: int) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "tools" / "preprocess_data.py")),
        *("--input", str(folder / "@.jsonl"), "--output-prefix", str(folder / "ours-@")),
        *("--tokenizer", str(folder / "tokenizer"), "--workers", str(workers), "--overwrite"),
    ]


def run(command: list[str], folder: Path, cores: int) -> Measurement:
    """Runs a command on the first cores of this process and watches its memory."""
    own = sorted(os.sched_getaffinity(0))[:cores]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    log = folder / "log"
    started = time.perf_counter()
    peak = 0
    with log.open("w") as output:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, own)), *command],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.returncode is None:
            peak = max(peak, memory_of_tree(process.pid))
            with suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-4000:]}")
    return Measurement(time.perf_counter() - started, peak)


def memory_of_tree(pid: int) -> int:
    """Memory of a process and its children, pages that they share counted once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        # It ended between two looks.
        return 0
    return total


def check_same_tokens(folder: Path) -> None:
    ours, theirs = (
        IndexedDataset(str(folder / name)) for name in ("ours-text", "theirs-text_text_document")
    )
    if len(ours) != len(theirs) or not np.array_equal(
        ours.sequence_lengths, theirs.sequence_lengths
    ):
        sys.exit(f"{len(ours)} documents here and {len(theirs)} there, or of other lengths")
    for number in range(len(ours)):
        if not np.array_equal(ours[number], theirs[number]):
            sys.exit(f"document {number} has other tokens")


if __name__ == "__main__":
    main()
