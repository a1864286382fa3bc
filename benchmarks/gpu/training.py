"""A few steps of one arm end to end, as benchmarks/gpu/check.py runs it in a process of its own.

The arguments are those of examples/pretrain/pretrain_gpt_270m.sh on a corpus of random tokens with
the frequencies of text. Half of the steps of a TST arm are phase 1. Nothing is saved.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.measuring import Row, append  # noqa: E402

VOCABULARY, BAG_SIZE = 128256, 6
CORPUS_TOKENS, DOCUMENT = 1 << 22, 1 << 10
MASKS = "--no-create-attention-mask-in-dataloader"
LOSS_LINE = re.compile(r"^.* iteration +(\d+)/.* lm loss: (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Arm:
    """A run to time.

    Attributes:
        arguments: its own ones.
        loss: the design of benchmarks/roofline.py that it trains with, if that has it.
        is_tst: whether its first half reads bags.
        has_te: whether its layers are Transformer Engine's.
        precision: of the launch script.
        has_masks: whether the loader makes attention masks.
    """

    arguments: tuple[str, ...] = ()
    loss: str | None = None
    is_tst: bool = False
    has_te: bool = False
    precision: str = "bf16"
    has_masks: bool = False


HOSTS, OURS, LINEAR = "Megatron, vocabulary-parallel", "Triton, in place", "linear"
NATIVE = ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native")
ARMS = {
    "baseline": Arm(loss=OURS),
    "baseline, host's loss": Arm(("--tst-loss-impl", "host"), HOSTS),
    "baseline, native fusion": Arm(("--tst-loss-impl", "host", *NATIVE)),
    "baseline, attention masks": Arm(loss=OURS, has_masks=True),
    "TST, auto": Arm(loss=OURS, is_tst=True),
    "TST, torch": Arm(("--tst-loss-impl", "torch"), is_tst=True),
    "TST, linear": Arm(("--tst-loss-impl", "linear"), LINEAR, is_tst=True),
}
TE_ARMS = {
    f"{who}, {precision}": Arm((), OURS, is_tst, True, precision)
    for precision in ("bf16", "fp8")
    for who, is_tst in (("baseline", False), ("TST", True))
}
GRAPHS = ("--cuda-graph-impl", "transformer_engine", "--te-rng-tracker")
TE_ARMS |= {
    "baseline, bf16, CUDA graphs": Arm(GRAPHS, OURS, has_te=True),
    "TST, bf16, CUDA graphs": Arm(GRAPHS, OURS, is_tst=True, has_te=True),
}
# What Megatron's own layers need where neither Transformer Engine nor apex is. Their attention
# holds all scores, so that sequences are short; the positions of a step are half the script's.
LOCAL = [
    "--transformer-impl", "local", "--no-gradient-accumulation-fusion", "--no-persist-layer-norm",
    "--no-masked-softmax-fusion", "--no-rope-fusion", "--seq-length", "512",
    "--max-position-embeddings", "512", "--micro-batch-size", "32", "--global-batch-size", "32",
]  # fmt: skip
WITH_TE = ["--global-batch-size", "16"]
TINY = [
    "--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64",
    "--num-attention-heads", "2", "--kv-channels", "16", "--num-query-groups", "2",
    "--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "2",
    "--global-batch-size", "2",
]  # fmt: skip
# Saved is nothing, and TensorBoard may be missing.
DROPPED_WITH_VALUE = ("--save", "--load", "--tensorboard-dir", "--num-workers")
# Of a process alone.
DROPPED_ON_CPU = ("--overlap-grad-reduce", "--overlap-param-gather", "--use-distributed-optimizer")


def write_corpus(folder: Path, vocabulary: int, tokens: int) -> Path:
    """Random documents whose tokens are as frequent as their rank says (Zipf); gives the prefix."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = folder / "zipf"
    if prefix.with_suffix(".idx").exists():
        return prefix
    # The last token ends documents.
    uniform = numpy.random.default_rng(0).random(tokens)
    ids = torch.from_numpy(((vocabulary - 1) ** uniform).astype(numpy.int32) - 1)
    builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=numpy.int32)
    for document in ids.split(DOCUMENT):
        builder.add_document(document, [len(document)])
    builder.finalize(str(prefix.with_suffix(".idx")))
    return prefix


def arguments_of(arm: Arm, folder: Path, steps: int, is_tiny: bool) -> list[str]:
    """The command line of an arm: the launch script's, and what a short run needs instead."""
    vocabulary = 512 if is_tiny else VOCABULARY
    corpus = write_corpus(folder, vocabulary, 1 << 16 if is_tiny else CORPUS_TOKENS)
    environment = {
        **os.environ, "DATA_PATH": str(corpus), "TOKENIZER": "none", "OUTPUT_DIR": str(folder),
        "VARIANT": "tst" if arm.is_tst else "baseline", "TRAIN_STEPS": str(steps),
        "PRECISION": arm.precision, "ASYNC_SAVE": "0", "CUDA_GRAPHS": "0", "DRY_RUN": "1",
        # On a GPU Megatron has no local modules for HybridModel.
        "MODEL": "gpt",
    }  # fmt: skip
    script = ROOT / "examples/pretrain/pretrain_gpt_270m.sh"
    printed = subprocess.run(
        ["bash", str(script)], env=environment, check=True, capture_output=True, text=True
    ).stdout
    words = shlex.split(printed)
    argv = words[words.index("megatron_tst.pretrain") + 1 :]
    dropped = (MASKS, *(DROPPED_ON_CPU if is_tiny else ()))
    argv = [word for word in without(argv, DROPPED_WITH_VALUE) if word not in dropped]
    argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocabulary)]
    argv += [
        "--lr-warmup-iters",
        "1",
        "--lr-wsd-decay-iters",
        "1",
        "--eval-iters",
        "0",
        "--split",
        "1,0,0",
    ]
    argv += ["--log-interval", "1", "--num-workers", "2", "--data-cache-path", f"{folder}/cache"]
    argv += WITH_TE if arm.has_te else LOCAL
    argv += TINY if is_tiny else ()
    argv += () if arm.has_masks else (MASKS,)
    if arm.is_tst:
        argv += ["--tst-bag-size", str(BAG_SIZE), "--tst-step-ratio", "0.5"]
    return [*argv, "--tst-max-epochs", "inf", *arm.arguments]


def without(argv: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    """Arguments without some flags and the value of each."""
    rest = iter(argv)
    for word in rest:
        if word in flags:
            next(rest)
        else:
            yield word


class Recorder:
    """Time and peak memory of every step, by phase."""

    def __init__(self, switch_step: int) -> None:
        self.switch_step = switch_step
        self.milliseconds: dict[int, list[float]] = {1: [], 2: []}
        self.peaks: dict[int, float] = {}
        self._before: float | None = None

    def __call__(self, step: Any) -> None:
        import torch

        phase = 1 if step.iteration <= self.switch_step else 2
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            self.peaks[phase] = torch.cuda.max_memory_allocated() / 1e6
            if step.iteration == self.switch_step:
                torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        if self._before is not None:
            self.milliseconds[phase].append(1e3 * (now - self._before))
        self._before = now

    def rows(self, losses: dict[int, float]) -> Iterator[Row]:
        """A row a phase: the median without the first fifth of its steps, and its last loss."""
        for phase, times in self.milliseconds.items():
            if times:
                last = self.switch_step if phase == 1 else max(losses, default=0)
                yield {
                    "phase": phase,
                    "milliseconds": statistics.median(times[len(times) // 5 :]),
                    "peak_megabytes": self.peaks.get(phase),
                    "loss": losses.get(last),
                }


def log_of(folder: Path, arm: str) -> Path:
    """What the run of an arm prints."""
    return folder / f"{re.sub('[^a-z0-9A-Z]+', '-', arm)}.log"


def losses_in(log: Path) -> dict[int, float]:
    """By step; none if there is no such file."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return {int(step): float(loss) for step, loss in LOSS_LINE.findall(text)}


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Sends what this process and its children print to a file."""
    with path.open("w") as log:
        kept = os.dup(1)
        os.dup2(log.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains an arm and appends a row a phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=ARMS | TE_ARMS)
    parser.add_argument("--rows", type=Path, required=True, help="file to append to")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    rest = argparse.REMAINDER
    parser.add_argument("--more", nargs=rest, default=[], help="all that follows is for the run")
    options = parser.parse_args(argv)
    arm = (ARMS | TE_ARMS)[options.arm]
    folder = options.rows.parent
    # As examples/pretrain/launch.sh; Megatron asserts the second one with the first and graphs.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    argv = arguments_of(arm, folder, options.steps, options.tiny)
    sys.argv = ["training", *argv, *options.more]
    recorder = Recorder(options.steps // 2 if arm.is_tst else 0)
    log = log_of(folder, options.arm)
    with output_to(log):
        from megatron_tst import cpu

        cpu.activate()
        from megatron_tst.training.pretrain import main as train

        code = train(recorder)
    losses = losses_in(log)
    named = {"arm": options.arm, "design": arm.loss, "steps": options.steps}
    named["is_tiny"] = options.tiny
    for row in recorder.rows(losses):
        append(options.rows, {**named, **row})
    return code


if __name__ == "__main__":
    sys.exit(main())
