"""The index of a large corpus, and access to samples, against Megatron's own GPTDataset.

    OMP_NUM_THREADS=1 python benchmarks/dataset.py [--documents 2500000 5000000] [--megabytes 200]

The index: corpora with document lengths as those of web text and a .bin that is all hole, so that
billions of tokens cost no disk. Both datasets read the corpus once, at 4096 positions; ours has a
phase 1 of 16 tokens a position for a quarter of the steps. Every build and every opening is a
process of its own, whose peak memory counts from its start and includes mapped files.

Access: random samples of a corpus that is in memory, the contestants in turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.tokenizers import MegatronTokenizer
from numpy.typing import NDArray

from megatron_tst import SuperpositionConfig
from megatron_tst.corpus.indexed_writer import IndexHeader
from megatron_tst.data.dataset import SuperpositionGPTDataset
from megatron_tst.data.dataset_config import SuperpositionGPTDatasetConfig
from megatron_tst.settings.phases import lay_out

POSITIONS = 4096
BAG_SIZE = 16
STEP_RATIO = 0.25
MEAN_LENGTH = 1000
VOCABULARY_SIZE = 50_000
DTYPE = np.dtype(np.uint16)
TARGET_DOCUMENTS = 2_000_000_000
"""Two trillion tokens."""
BAR = 1.0


@dataclass(frozen=True)
class Cost:
    """Of building or opening a dataset.

    Attributes:
        seconds: until the first sample is there.
        cpu_seconds: processor time of that, which other work on the machine changes less.
        peak_bytes: largest memory on top of what the process had before.
        sample_seconds: median time of a random sample that was read before.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    sample_seconds: float


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    sizes = [2_500_000, 5_000_000, 10_000_000]
    add("--documents", type=int, nargs="*", default=sizes, help="of each corpus of the first table")
    add("--megabytes", type=int, default=200, help="text of the samples (default: %(default)s)")
    add("--accesses", type=int, default=300, help="samples a round (default: %(default)s)")
    add("--rounds", type=int, default=20, help="rounds of access (default: %(default)s)")
    options = parser.parse_args()
    # Of Megatron, about libraries that play no part here.
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        if options.documents:
            compare_indices(Path(name), sorted(options.documents))
        if options.megabytes:
            compare_access(Path(name), options.megabytes, options.rounds, options.accesses)


def compare_indices(folder: Path, sizes: list[int]) -> None:
    print("| documents | index | build, s | CPU, s | CPU, us a document | memory, MB | ", end="")
    print(
        "disk, MB | open, s | memory, MB | sample, us |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for documents in sizes:
        prefix = folder / str(documents)
        tokens = write_corpus(prefix, document_lengths(documents), with_text=False)
        for name, config in (
            ("Megatron", plain_config(prefix, POSITIONS)),
            ("ours", superposed_config(prefix, tokens)),
        ):
            samples = samples_of(config, tokens)
            built, opened = (in_a_process(open_dataset, config, samples) for _ in range(2))
            disk = sum(file.stat().st_size for file in Path(config.path_to_cache).iterdir())
            print_index(documents, name, built, disk, opened)
            if documents == sizes[-1]:
                extrapolate(documents, name, built, disk, opened)
            for file in Path(config.path_to_cache).iterdir():
                file.unlink()
        for suffix in (".bin", ".idx"):
            prefix.with_suffix(suffix).unlink()


def print_index(documents: int, name: str, built: Cost, disk: float, opened: Cost) -> None:
    print(
        f"| {documents:,} | {name} | {built.seconds:.2f} | {built.cpu_seconds:.2f} | "
        f"{1e6 * built.cpu_seconds / documents:.3f} | "
        f"{built.peak_bytes / 1e6:.0f} | {disk / 1e6:.0f} | {opened.seconds:.3f} | "
        f"{opened.peak_bytes / 1e6:.0f} | {1e6 * opened.sample_seconds:.0f} |",
        flush=True,
    )


def extrapolate(documents: int, name: str, built: Cost, disk: int, opened: Cost) -> None:
    """Scales all but the time of a sample with the number of documents."""
    factor = TARGET_DOCUMENTS / documents

    def scaled(cost: Cost) -> Cost:
        seconds, cpu_seconds = cost.seconds * factor, cost.cpu_seconds * factor
        return Cost(seconds, cpu_seconds, round(cost.peak_bytes * factor), float("nan"))

    title = f"{name}, extrapolated"
    print_index(TARGET_DOCUMENTS, title, scaled(built), disk * factor, scaled(opened))


def document_lengths(documents: int) -> NDArray[np.int32]:
    spread = 1.0  # of the logarithm
    generator = np.random.default_rng(0)
    lengths = generator.standard_normal(documents, dtype=np.float32)
    lengths *= spread
    lengths += np.log(MEAN_LENGTH) - spread**2 / 2
    return np.exp(lengths, out=lengths).astype(np.int32) + 1


def write_corpus(prefix: Path, lengths: NDArray[np.int32], with_text: bool) -> int:
    """Writes a corpus, of random text or of a hole in its place; returns its tokens."""
    ends = np.cumsum(lengths, dtype=np.int64)
    with prefix.with_suffix(".idx").open("wb") as index:
        IndexHeader(DTYPE, len(lengths), len(lengths) + 1).write(index)
        lengths.tofile(index)
        ((ends - lengths) * DTYPE.itemsize).tofile(index)
        np.arange(len(lengths) + 1, dtype=np.int64).tofile(index)
    tokens = int(ends[-1])
    with prefix.with_suffix(".bin").open("wb") as data:
        if with_text:
            text = np.random.default_rng(1).integers(VOCABULARY_SIZE, size=tokens, dtype=DTYPE)
            text.tofile(data)
        data.truncate(tokens * DTYPE.itemsize)
    return tokens


def plain_config(prefix: Path, sequence_length: int) -> GPTDatasetConfig:
    return GPTDatasetConfig(**settings(prefix, "plain"), sequence_length=sequence_length)


def superposed_config(prefix: Path, tokens: int) -> SuperpositionGPTDatasetConfig:
    """Of a run that reads the corpus once."""
    steps_of_phase_1 = STEP_RATIO * tokens / (POSITIONS * (STEP_RATIO * (BAG_SIZE - 1) + 1))
    return SuperpositionGPTDatasetConfig(
        **settings(prefix, "superposed"),
        sequence_length=POSITIONS,
        # The dataset goes by its phases; the number of steps plays no part.
        superposition=SuperpositionConfig(bag_size=BAG_SIZE, steps=1),
        phases=lay_out([(BAG_SIZE, int(steps_of_phase_1))]),
    )


def settings(prefix: Path, cache: str) -> dict[str, Any]:
    return {
        "random_seed": 1234,
        "blend": ([str(prefix)], None),
        "split": "1,0,0",
        "path_to_cache": str(prefix.parent / f"{prefix.name}-{cache}"),
        "tokenizer": MegatronTokenizer.from_pretrained(
            metadata_path={"library": "null-text"},
            vocab_size=VOCABULARY_SIZE,
            eod_id=VOCABULARY_SIZE - 1,
            pad_id=-1,
        ),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }


def switch_of(config: GPTDatasetConfig) -> int:
    """The first sample without bags."""
    is_superposed = isinstance(config, SuperpositionGPTDatasetConfig)
    return config.phases[-1].first_sample if is_superposed else 0


def samples_of(config: GPTDatasetConfig, tokens: int) -> int:
    """Samples of one epoch, of both phases."""
    switch = switch_of(config)
    in_phase_1 = switch * BAG_SIZE * config.sequence_length
    return int(switch + (tokens - in_phase_1 - BAG_SIZE) // config.sequence_length)


def build(config: GPTDatasetConfig, samples: int) -> GPTDataset:
    """Opens a dataset and its index, which is built if it is not there."""
    is_ours = isinstance(config, SuperpositionGPTDatasetConfig)
    dataset_class = SuperpositionGPTDataset if is_ours else GPTDataset
    builder = BlendedMegatronDatasetBuilder(dataset_class, (samples, 0, 0), lambda: True, config)
    return builder.build()[0]


def open_again(config: GPTDatasetConfig, samples: int) -> GPTDataset:
    """Opens a dataset with the index on disk, as all ranks but the one that built it have it."""
    build(config, samples)
    return build(config, samples)


def open_dataset(config: GPTDatasetConfig, samples: int) -> Cost:
    process = psutil.Process()
    before = process.memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start, cpu_start = time.perf_counter(), time.process_time()
    dataset = build(config, samples)
    assert len(dataset[0]["tokens"]) == config.sequence_length
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    # Of phase 2, if there is one. Few, because the kernel reads ahead, and fills holes with zeros.
    places = np.random.default_rng(2).integers(samples // 2, samples, size=100)
    _, again = (access_times(dataset, places) for _ in range(2))
    return Cost(seconds, cpu_seconds, peak - before, float(np.median(again)))


def access_times(dataset: GPTDataset, places: NDArray[np.int64]) -> list[float]:
    times = []
    for place in places.tolist():
        start = time.perf_counter()
        dataset[place]
        times.append(time.perf_counter() - start)
    return times


def in_a_process(function: Callable[..., Cost], *arguments: Any) -> Cost:
    """Calls a function in a process that has nothing in memory but the imports."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def compare_access(folder: Path, megabytes: int, rounds: int, accesses: int) -> None:
    prefix = folder / "text"
    documents = megabytes * 1_000_000 // (MEAN_LENGTH * DTYPE.itemsize)
    tokens = write_corpus(prefix, document_lengths(documents), with_text=True)
    config = superposed_config(prefix, tokens)
    samples = samples_of(config, tokens)
    ours = open_again(config, samples)
    print("\n| tokens | dataset | median, us | 99th percentile, us | ours / Megatron (quartiles) |")
    print("|---|---|---|---|---|")
    for length, places in (
        (BAG_SIZE * POSITIONS, range(switch_of(config))),
        (POSITIONS, range(switch_of(config), samples)),
    ):
        plain = plain_config(prefix, length)
        theirs = open_again(plain, samples_of(plain, tokens))
        measure_access(length, ours, places, theirs, rounds, accesses)


def measure_access(
    length: int, ours: GPTDataset, places: range, theirs: GPTDataset, rounds: int, accesses: int
) -> None:
    """Prints two rows of the table."""
    generator = np.random.default_rng(3)
    contestants = [("Megatron", theirs, range(len(theirs))), ("ours", ours, places)]
    times: dict[str, list[list[float]]] = {name: [] for name, _, _ in contestants}
    for _ in range(rounds):
        for name, dataset, of in contestants:
            chosen = generator.integers(of.start, of.stop, size=accesses)
            times[name].append(access_times(dataset, chosen))
        contestants.reverse()
    medians = np.median([times["ours"], times["Megatron"]], axis=2)
    low, ratio, high = np.quantile(medians[0] / medians[1], (0.25, 0.5, 0.75))
    for name, ratios in (("Megatron", ""), ("ours", f"{ratio:.2f} ({low:.2f} to {high:.2f})")):
        median, tail = np.quantile(times[name], (0.5, 0.99))
        print(f"| {length:,} | {name} | {1e6 * median:.0f} | {1e6 * tail:.0f} | {ratios} |")
    if ratio > BAR:
        print(f"above the bar of {BAR}", file=sys.stderr)


if __name__ == "__main__":
    main()
