"""Time the Triton kernels on a GPU against plain PyTorch and the host's own loss.

    python benchmarks/gpu_kernels.py [--vocabularies 32768 128256] [--json gpu_kernels.json]

Forward and backward in bf16. GB/s counts the bytes that a contestant has to move at least, not
those that it moves: logits read twice and their gradient written once; s rows and one result a bag,
then s gradient rows a bag and every row of the weight's gradient. "loop" is s calls of torch's
cross_entropy, each with its backward; "host" is Megatron's vocab_parallel_cross_entropy (s = 1);
"torch" is this project's implementation without Triton; "gather" averages a [n, s, h] tensor.
A contestant that does not fit into memory takes for ever (inf).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tst.model.cross_entropy import multi_hot_cross_entropy
from megatron_tst.model.embedding import bag_embedding

Contestant = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median time of one contestant, and the rate at which it did the unavoidable."""

    operation: str
    contestant: str
    vocabulary: int
    bag_size: int
    milliseconds: float
    gigabytes_per_second: float
    peak_megabytes: float


def loss_contestants(n: int, v: int, s: int) -> Iterator[tuple[str, Contestant]]:
    from megatron_tst.model.kernels.cross_entropy import shard_gradient, shard_statistics

    logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, v, (n, s), device="cuda")
    shares = torch.full((n, s), 1 / s, device="cuda")
    grad = torch.full((n,), 1 / n, device="cuda")
    leaf = logits.requires_grad_()

    def triton(out: Tensor | None) -> None:
        maximum, sums, _ = shard_statistics(logits.detach(), targets, shares)
        shard_gradient(logits.detach(), targets, shares, maximum + sums.log(), grad, out=out)

    def torch_path() -> None:
        torch.autograd.grad(multi_hot_cross_entropy(leaf, targets), leaf, grad)

    def loop() -> None:
        total = torch.zeros_like(logits, requires_grad=False)
        for column in targets.unbind(-1):
            loss = F.cross_entropy(leaf.float(), column, reduction="none") / s
            total += torch.autograd.grad(loss, leaf, grad)[0]

    def host() -> None:
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

        group = torch.distributed.group.WORLD
        loss = vocab_parallel_cross_entropy(leaf, targets.squeeze(-1), tp_group=group)
        torch.autograd.grad(loss, leaf, grad)

    yield "triton", lambda: triton(None)
    yield "torch", torch_path
    yield "loop", loop
    if s == 1:
        yield "host", host
    # Last, because it leaves gradients where the logits were.
    yield "triton in place", lambda: triton(logits.detach())


def embedding_contestants(n: int, v: int, s: int, h: int) -> Iterator[tuple[str, Contestant]]:
    from megatron_tst.model.kernels.bag_embedding import bag_mean, bag_mean_backward

    weight = torch.randn(v, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    # As in text, a few tokens are frequent.
    frequency = 1 / torch.arange(1, v + 1, device="cuda", dtype=torch.float64)
    bags = torch.multinomial(frequency, n * s, replacement=True).view(n, s)
    grad = torch.randn(n, h, device="cuda", dtype=torch.bfloat16)

    def triton() -> None:
        bag_mean(weight.detach(), bags)
        bag_mean_backward(grad, bags, None, None, v)

    def torch_path() -> None:
        mean = bag_embedding(weight, bags.unsqueeze(0))
        torch.autograd.grad(mean, weight, grad.unsqueeze(0))

    def gather() -> None:
        mean = F.embedding(bags, weight).float().mean(1).to(weight.dtype)
        torch.autograd.grad(mean, weight, grad)

    yield "triton", triton
    yield "torch", torch_path
    yield "gather", gather


def time_contestant(contestant: Contestant, repetitions: int) -> tuple[float, float]:
    """Median milliseconds after two runs that compile and warm up, and megabytes beside inputs."""
    for _ in range(2):
        contestant()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    elapsed = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        contestant()
        end.record()
        end.synchronize()
        elapsed.append(start.elapsed_time(end))
    return statistics.median(elapsed), (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(arguments: argparse.Namespace) -> Iterator[Timing]:
    n, h = arguments.positions, arguments.hidden
    for v in arguments.vocabularies:
        for s in arguments.bag_sizes:
            cases = (
                ("cross-entropy", loss_contestants(n, v, s), 6 * n * v),
                ("bag embedding", embedding_contestants(n, v, s, h), 2 * h * (2 * n * s + n + v)),
            )
            for operation, contestants, moved in cases:
                for name, contestant in contestants:
                    try:
                        elapsed, peak = time_contestant(contestant, arguments.repetitions)
                    except torch.OutOfMemoryError:
                        torch.cuda.empty_cache()
                        elapsed = peak = float("inf")
                    yield Timing(operation, name, v, s, elapsed, moved / elapsed / 1e6, peak)


def print_timing(row: Timing) -> None:
    print(
        f"{row.operation:<14} {row.contestant:<16} {row.vocabulary:>7} {row.bag_size:>3} "
        f"{row.milliseconds:>9.3f} {row.gigabytes_per_second:>8.0f} {row.peak_megabytes:>9.0f}",
        flush=True,
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32768, 128256], metavar="V")
    parser.add_argument("--bag-sizes", type=int, nargs="+", default=[1, 4, 8, 16], metavar="S")
    parser.add_argument("--hidden", type=int, default=4096, help="of the embedding")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        print("gpu_kernels.py: needs a CUDA device; this machine shows none.", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, {arguments.positions} positions, bf16")
    print(f"{'operation':<14} {'contestant':<16} {'V':>7} {'s':>3}", end="")
    print(f" {'ms':>9} {'GB/s':>8} {'peak MB':>9}")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        torch.distributed.init_process_group(
            "nccl", init_method=f"file://{directory}/store", rank=0, world_size=1
        )
        for row in measure(arguments):
            print_timing(row)
            rows.append(asdict(row))
        torch.distributed.destroy_process_group()
    if arguments.json:
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(rows, indent=2))
        os.replace(temporary, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
