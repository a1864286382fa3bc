"""A training step on the CPU platform: baseline, both phases, plain PyTorch and transformers.

    python benchmarks/step.py [--models 127k 9M 270M-layer] [--rounds N] [--dtype DTYPE]
        [--json FILE]

Every contestant is a process of its own on the same core, and they take turns, a step each, so that
all see the same machine. A step begins with reading its batch from a tokenized text and ends with
the updated weights; nobody logs. Ratios are those of the medians over all rounds. All contestants
compute in one dtype: what is faster on this CPU, or --dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tst.common.atomic_files import write_json
from megatron_tst.common.bf16 import describe_bf16
from megatron_tst.common.precision import faster_precision

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_ROUNDS = 5
BASELINE = "baseline"
GPT_BASELINE = "baseline of GPTModel"


@dataclass(frozen=True)
class Model:
    """A Llama-shaped model and its batch.

    Attributes:
        vocabulary: rows of the embedding and of the output head, which are not tied.
        hidden: hidden size.
        layers: decoder layers.
        heads: attention heads, as many for keys and values.
        ffn: hidden size of the feed-forward.
        length: latent positions a sequence.
        batch: sequences a step, in one micro-batch.
        bag_size: of the superposition run.
        rounds: steps of each contestant.
        plain_bar: Megatron's step may take this many times that of plain PyTorch.
    """

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    length: int
    batch: int
    bag_size: int
    rounds: int
    plain_bar: float


MODELS = {
    # The quickstart's.
    "127k": Model(256, 64, 2, 1, 160, 128, 8, bag_size=2, rounds=300, plain_bar=0.7),
    "9M": Model(8192, 256, 6, 4, 704, 256, 8, bag_size=4, rounds=24, plain_bar=0.75),
    # One layer of the paper's 270M model with its whole vocabulary.
    "270M-layer": Model(128256, 576, 1, 9, 1536, 512, 2, bag_size=6, rounds=12, plain_bar=1.15),
}
# Contestant, what it is compared with, and the bar of the ratio; None is by model.
COMPARISONS = (
    ("phase 1", BASELINE, 1.03),
    ("phase 2", BASELINE, 1.03),
    ("phase 1, linear loss", BASELINE, None),
    (BASELINE, GPT_BASELINE, 1.03),
    (BASELINE, "plain PyTorch", "plain_bar"),
    (BASELINE, "transformers", 1.0),
    ("baseline in bf16", "baseline in fp32", 1.2),
)
MEGATRON: dict[str, dict[str, Any]] = {
    BASELINE: {"tst_bag_size": 1},
    GPT_BASELINE: {"tst_bag_size": 1, "hybrid_layer_pattern": None},
    "phase 1": {"tst_steps": 1_000_000},
    "phase 2": {"tst_steps": 1},
    "phase 1, linear loss": {"tst_steps": 1_000_000, "tst_loss_impl": "linear"},
}
# The dtype is theirs, whatever --dtype says.
IN_DTYPE = {"baseline in bf16": "bf16", "baseline in fp32": "fp32"}
PLAIN = ("plain PyTorch", "transformers")
# Who takes turns with whom: all at once would not fit into the memory of a small machine.
GROUPS = (tuple(MEGATRON), (BASELINE, *PLAIN), tuple(IN_DTYPE))


def main() -> None:
    """Measures every model and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, help="steps of each contestant (default: by model)")
    add_dtype(parser)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        take_turns(options.contestant, MODELS[options.models[0]], options.dtype)
        return
    dtype = chosen_dtype(options.dtype)
    print(f"{dtype}; products of bf16 on this CPU: {describe_bf16()}")
    results = {name: measure(name, options.rounds, dtype) for name in options.models}
    if options.json:
        write_json(options.json, results)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dtype``."""
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32", "auto"),
        default="auto",
        help="of every contestant (default: auto, what is faster on this CPU)",
    )


def chosen_dtype(asked: str) -> str:
    """``bf16`` or ``fp32``."""
    return faster_precision(on_gpu=False) if asked == "auto" else asked


# --- the contest ----------------------------------------------------------------------------------


def measure(name: str, rounds: int | None, dtype: str) -> dict[str, Any]:
    """Lets the contestants of each group take turns, prints the tables and returns the numbers."""
    model = MODELS[name]
    print(
        f"\n{name}: hidden {model.hidden}, {model.layers} layers, {model.batch} x {model.length} "
        f"positions, vocabulary {model.vocabulary}, bags of {model.bag_size}"
    )
    groups = []
    for group in GROUPS:
        medians, peaks = hold_contest(group, name, WARM_UP_ROUNDS + (rounds or model.rounds), dtype)
        groups.append(print_tables(model, medians, peaks))
    return {"model": asdict(model), "dtype": dtype, "groups": groups}


def hold_contest(
    group: Sequence[str], name: str, rounds: int, dtype: str
) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds and peak bytes of each contestant."""
    contestants = {who: Contestant(who, name, dtype) for who in group}
    try:
        for _ in range(rounds):
            for contestant in contestants.values():
                contestant.step()
        medians = {
            who: statistics.median(contestant.seconds[WARM_UP_ROUNDS:])
            for who, contestant in contestants.items()
        }
        return medians, {who: contestant.peak_bytes() for who, contestant in contestants.items()}
    finally:
        for contestant in contestants.values():
            contestant.process.kill()
            contestant.process.wait()


class Contestant:
    """A process that does a step whenever it is told to."""

    def __init__(self, who: str, model: str, dtype: str) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--contestant", who]
        command += ["--models", model, "--dtype", IN_DTYPE.get(who, dtype)]
        core = max(os.sched_getaffinity(0))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.who = who
        self.seconds: list[float] = []
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
        self.process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**environment, "PYTHONPATH": str(ROOT)},
        )

    def step(self) -> None:
        """Lets it do a step, and takes the time that it measured."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its end is reported below
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP "):
                self.seconds.append(float(line.split()[1]))
                return
        self.errors.seek(0)
        ended = f"{self.who} ended with {self.process.wait()} (-9: out of memory, most likely)"
        sys.exit(f"{ended}\n{self.errors.read()[-4000:]}")

    def peak_bytes(self) -> int:
        """Largest resident memory so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def print_tables(model: Model, medians: dict[str, float], peaks: dict[str, int]) -> dict[str, Any]:
    print("\n| step | ms | peak memory, MB |")
    print("|---|---|---|")
    for who, seconds in medians.items():
        print(f"| {who} | {1e3 * seconds:.1f} | {peaks[who] / 1e6:.0f} |")
    print("\n| comparison | ratio | bar |")
    print("|---|---|---|")
    ratios = {}
    for who, other, bar in COMPARISONS:
        if who in medians and other in medians:
            limit = getattr(model, bar) if isinstance(bar, str) else bar
            ratio = ratios[f"{who} / {other}"] = medians[who] / medians[other]
            print(f"| {who} / {other} | {ratio:.3f} | {limit or ''} |")
    sys.stdout.flush()
    return {"seconds": medians, "peak_bytes": peaks, "ratios": ratios}


# --- the contestants ------------------------------------------------------------------------------


def take_turns(who: str, model: Model, dtype: str) -> None:
    """Does steps as told, as one of the contestants."""
    from megatron_tst.cpu.platform import restart_with_allocator_settings

    restart_with_allocator_settings()
    who = BASELINE if who in IN_DTYPE else who
    if who in MEGATRON:
        run_megatron(who, model, dtype)
        return
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = (plain_step if who == "plain PyTorch" else transformers_step)(model, dtype)
    with tempfile.TemporaryDirectory() as folder:
        batches = read_batches(model, Path(folder))
        for _ in sys.stdin:
            started = time.perf_counter()
            tokens = next(batches)
            step(tokens[:, :-1], tokens[:, 1:])
            print(f"STEP {time.perf_counter() - started}", flush=True)


def read_batches(model: Model, folder: Path) -> Iterator[Any]:
    """Windows [b, l + 1] at random places of the text that Megatron trains on, int64."""
    import numpy
    import torch

    from tests.runs import tokenize_standard_library

    # Megatron stores tokens of so small a vocabulary as uint16.
    path = tokenize_standard_library(folder).with_suffix(".bin")
    text = numpy.memmap(path, dtype=numpy.uint16, mode="r")
    while True:
        starts = torch.randint(len(text) - model.length, (model.batch,)).tolist()
        windows = numpy.stack([text[start : start + model.length + 1] for start in starts])
        yield torch.from_numpy(windows.astype(numpy.int64))


def plain_step(model: Model, dtype: str) -> Callable[..., Any]:
    from benchmarks.plain_llama import PlainLlama, PlainTrainer

    network = PlainLlama(
        model.vocabulary, model.hidden, model.layers, model.heads, model.ffn, model.length
    )
    return PlainTrainer(network, is_bf16=dtype == "bf16").step


def transformers_step(model: Model, dtype: str) -> Callable[..., Any]:
    from torch.nn.functional import cross_entropy
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.plain_llama import PlainTrainer

    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        max_position_embeddings=model.length,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    network: Any = LlamaForCausalLM(config)

    class Trainer(PlainTrainer):
        def loss(self, tokens: Any, labels: Any) -> Any:
            logits = network(tokens).logits
            return cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return Trainer(network, is_bf16=dtype == "bf16").step


def run_megatron(who: str, model: Model, dtype: str) -> None:
    """Trains on Megatron's own loop, which waits for its turn after each step."""
    from megatron_tst import cpu

    cpu.activate()
    import torch

    torch.set_num_threads(1)
    from megatron_tst.training.pretrain import run

    # Megatron prints to standard output, and forked processes write there as well.
    turns = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    started = 0.0

    def wait_for_turn(_: Any = None) -> None:
        nonlocal started
        if started:
            print(f"STEP {time.perf_counter() - started}", file=turns, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        started = time.perf_counter()

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sys.argv = ["step", *megatron_arguments(model, MEGATRON[who], Path(folder), dtype)]
        # The first step is not timed: it starts with the model that is yet to be built.
        run(after_step=wait_for_turn)


def megatron_arguments(
    model: Model, settings: dict[str, Any], folder: Path, dtype: str
) -> list[str]:
    from tests.runs import SmallRun, tokenize_standard_library

    run = SmallRun(tokenize_standard_library(folder), folder / "run").with_(
        num_layers=None,
        hybrid_layer_pattern="*-" * model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        group_query_attention=None,
        num_query_groups=None,
        seq_length=model.length,
        max_position_embeddings=model.length,
        micro_batch_size=model.batch,
        global_batch_size=model.batch,
        padded_vocab_size=model.vocabulary,
        train_iters=2_000_000,
        log_interval=100,
        bf16=dtype == "bf16",
        eval_iters=0,
        save=None,
        load=None,
        tensorboard_dir=None,
        tst_max_epochs="inf",
    )
    if "hybrid_layer_pattern" in settings:
        settings = {**settings, "num_layers": model.layers}
    return run.with_(**{"tst_bag_size": model.bag_size, **settings}).argv


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
