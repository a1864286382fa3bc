"""Our tokenization of a .jsonl file beside that of others.

All read the same file with the same tokenizer on the same cores, in turns:

- ours, and with ``--before`` that of another check-out of this project
- ``--megatron-preprocess``: Megatron-LM 0.19's ``tools/preprocess_data.py``
- ``--megatron-main``: ``tools/preprocess_data_fast.py`` in a check-out of Megatron-LM's main, which
  encodes with gigatoken on as many threads as there are cores
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from megatron_tst.corpus.fast_encoder import LLAMA3_PATTERN, QWEN2_PATTERN
from megatron_tst.corpus.tokenizer import END_OF_DOCUMENT, CorpusTokenizer, train_byte_level_bpe

ROOT = Path(__file__).parents[1]
SAMPLE_SECONDS = 0.2
WORDS = {"gpt2": None, "llama3": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN}


@dataclass(frozen=True)
class Measurement:
    """One run of one tool.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: what it and its children computed, which a busy machine changes less.
        peak_bytes: largest memory of it and its children together, shared pages counted once.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Contestant:
    """A tool.

    Attributes:
        name: in the table.
        command: ``@`` stands for the name of the text.
        output: prefix of the corpus that it writes of the whole text.
        python_path: where its imports come from first.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    python_path: Path | None = None


def main() -> None:
    """Measures every number of workers and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--megatron-preprocess", type=Path, help="preprocess_data.py of Megatron-LM 0.19")
    add("--megatron-main", type=Path, help="check-out of Megatron-LM's main")
    add("--before", type=Path, help="check-out of this project to compare with")
    add("--words", choices=WORDS, default="gpt2", help="how the tokenizer cuts text into words")
    add("--megabytes", type=int, default=60, help="size of the text (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[1, 2], help="also the cores that are used")
    add("--rounds", type=int, default=2, help="runs of each tool (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = write_corpus(folder, options.megabytes * 1_000_000, options.words)
        print("| workers | tool | docs/s | MB/s | MB/CPU s | start-up, s | peak MB | ours faster |")
        print("|---|---|---|---|---|---|---|---|")
        for workers in options.workers:
            tools = contestants(options, folder, workers)
            measure(folder, tools, documents, workers, options.rounds)


def contestants(options: argparse.Namespace, folder: Path, workers: int) -> list[Contestant]:
    tools = [our_tool("ours", folder, ROOT, workers)]
    if options.before:
        tools.append(our_tool("before", folder, options.before.resolve(), workers))
    if options.megatron_preprocess:
        script = options.megatron_preprocess.resolve()
        more = ("--workers", str(workers))
        tools.append(megatron_tool("Megatron-LM 0.19", folder, script, more))
    if options.megatron_main:
        root = options.megatron_main.resolve()
        script = root / "tools" / "preprocess_data_fast.py"
        tool = megatron_tool("Megatron-LM main", folder, script, ("--use-gigatoken",))
        tools.append(replace(tool, python_path=root))
    return tools


def python_sources() -> Iterator[str]:
    """Python's own sources and the installed packages, over and over."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files += sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    while True:
        for file in dict.fromkeys(files):
            # Some test files are not in UTF-8.
            text = file.read_bytes().decode(errors="replace").replace("\0", "")
            # Megatron-LM's tools end a document where its text spells the token.
            text = text.replace(END_OF_DOCUMENT, "")
            # They count empty files as documents, ours leaves them out.
            if text:
                yield text


def write_corpus(folder: Path, size: int, words: str) -> int:
    """Writes the text, one line of it on its own, and a tokenizer; returns the documents."""
    texts = []
    for text in python_sources():
        texts.append(text)
        size -= len(text.encode())
        if size <= 0:
            break
    for name, lines in (("text", texts), ("one", texts[:1])):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in lines)
    tokenizer = train_byte_level_bpe(texts[:2000], 8192)
    with_words(tokenizer, words).save_files(folder / "tokenizer")
    return len(texts)


def with_words(tokenizer: CorpusTokenizer, words: str) -> CorpusTokenizer:
    """The tokenizer with the words of another one; the merges stay, which is enough for speed."""
    pattern = WORDS[words]
    if pattern is None:
        return tokenizer
    changed = Tokenizer.from_str(tokenizer.definition)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    changed.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if words == "qwen2":
        changed.normalizer = normalizers.NFC()
    return replace(tokenizer, definition=changed.to_str())


def measure(
    folder: Path, tools: list[Contestant], documents: int, workers: int, rounds: int
) -> None:
    """Prints a row of the table for each tool, and fails if their tokens differ."""
    starts: dict[str, list[Measurement]] = {tool.name: [] for tool in tools}
    wholes: dict[str, list[Measurement]] = {tool.name: [] for tool in tools}
    for _ in range(rounds):
        for tool in tools:
            starts[tool.name].append(run(tool, "one", folder, workers))
            wholes[tool.name].append(run(tool, "text", folder, workers))
    for tool in tools[1:]:
        check_same_tokens(tools[0].output, tool.output)
    megabytes = (folder / "text.jsonl").stat().st_size / 1e6
    ours = 0.0
    for tool in tools:
        start, whole = (median(runs[tool.name]) for runs in (starts, wholes))
        # The start of some takes many times as long as the rest: not of one round each.
        seconds = whole.seconds - start.seconds
        computed = whole.cpu_seconds - start.cpu_seconds
        ours = ours or seconds
        print(
            f"| {workers} | {tool.name} | {documents / seconds:.0f} | {megabytes / seconds:.2f} | "
            f"{megabytes / computed:.2f} | {start.seconds:.1f} | {whole.peak_bytes / 1e6:.0f} | "
            f"{seconds / ours:.2f} |",
            flush=True,
        )


def median(runs: list[Measurement]) -> Measurement:
    """Medians of the times, and the largest memory."""
    seconds = statistics.median(run.seconds for run in runs)
    cpu_seconds = statistics.median(run.cpu_seconds for run in runs)
    return Measurement(seconds, cpu_seconds, max(run.peak_bytes for run in runs))


def megatron_tool(name: str, folder: Path, script: Path, more: tuple[str, ...]) -> Contestant:
    prefix = folder / name.replace(" ", "-")
    command = (
        *(sys.executable, str(script), "--input", str(folder / "@.jsonl")),
        *("--output-prefix", f"{prefix}-@", *more),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"),
        *("--tokenizer-model", str(folder / "tokenizer")),
    )
    return Contestant(name, command, Path(f"{prefix}-text_text_document"))


def our_tool(name: str, folder: Path, root: Path, workers: int) -> Contestant:
    command = (
        *(sys.executable, str(root / "tools" / "preprocess_data.py")),
        *("--input", str(folder / "@.jsonl"), "--output-prefix", str(folder / f"{name}-@")),
        *("--tokenizer", str(folder / "tokenizer"), "--workers", str(workers), "--overwrite"),
    )
    return Contestant(name, command, folder / f"{name}-text", python_path=root)


def run(tool: Contestant, text: str, folder: Path, cores: int) -> Measurement:
    """Runs a tool on the first cores of this process and watches its memory."""
    own = sorted(os.sched_getaffinity(0))[:cores]
    command = [part.replace("@", text) for part in tool.command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if tool.python_path is not None:
        environment["PYTHONPATH"] = str(tool.python_path)
    log = folder / "log"
    started, computed = time.perf_counter(), cpu_seconds_of_children()
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
    seconds = time.perf_counter() - started
    return Measurement(seconds, cpu_seconds_of_children() - computed, peak)


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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


def check_same_tokens(one: Path, other: Path) -> None:
    ours, theirs = (IndexedDataset(str(prefix)) for prefix in (one, other))
    if len(ours) != len(theirs) or not np.array_equal(
        ours.sequence_lengths, theirs.sequence_lengths
    ):
        sys.exit(f"{len(ours)} documents here and {len(theirs)} there, or of other lengths")
    for number in range(len(ours)):
        if not np.array_equal(ours[number], theirs[number]):
            sys.exit(f"document {number} has other tokens")


if __name__ == "__main__":
    main()
