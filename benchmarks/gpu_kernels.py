"""The tables of benchmarks/roofline.py with a measured column, on a GPU.

    python benchmarks/gpu_kernels.py [--models 270M 3B] [--positions 8192] [--json gpu_kernels.json]

Forward and backward in bf16 of the loss, the embedding and the output layer with its loss, at the
shapes of the paper's models. "torch" is this project's implementation without Triton; the other
names are those of the designs in benchmarks/roofline.py, whose least bytes and times stand beside
what was measured. A contestant that does not fit into memory takes for ever (inf).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import write_json
from benchmarks.roofline import GPUS, MODELS, Cost, Model, embedding_costs, head_costs, loss_costs
from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy
from megatron_tst.ops.embedding import bag_embedding
from megatron_tst.ops.linear_cross_entropy import linear_multi_hot_cross_entropy

Contestant = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median time of one contestant, its peak memory beside its inputs, and the paper figures."""

    model: str
    operation: str
    bag_size: int
    contestant: str
    milliseconds: float
    peak_megabytes: float
    cost: Cost | None


def loss_contestants(n: int, v: int, s: int, device: str) -> Iterator[tuple[str, Contestant]]:
    from megatron_tst.ops.kernels.cross_entropy import shard_gradient, shard_statistics

    logits = torch.randn(n, v, device=device, dtype=torch.bfloat16)
    targets = torch.randint(0, v, (n, s), device=device)
    shares = torch.full((n, s), 1 / s, device=device)
    grad = torch.full((n,), 1 / n, device=device)
    leaf = logits.requires_grad_()

    def triton(out: Tensor | None) -> None:
        maximum, sums, _ = shard_statistics(logits.detach(), targets, shares)
        shard_gradient(logits.detach(), targets, shares, maximum + sums.log(), grad, out=out)

    def torch_path() -> None:
        loss = multi_hot_cross_entropy(leaf, targets, implementation="torch")
        torch.autograd.grad(loss, leaf, grad)

    def loop() -> None:
        wide = leaf.float()
        losses = [F.cross_entropy(wide, column, reduction="none") for column in targets.unbind(-1)]
        torch.autograd.grad(sum(losses, start=torch.zeros_like(grad)) / s, leaf, grad)

    def host() -> None:
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

        group = torch.distributed.group.WORLD
        loss = vocab_parallel_cross_entropy(leaf, targets.squeeze(-1), tp_group=group)
        torch.autograd.grad(loss, leaf, grad)

    yield "Triton", lambda: triton(None)
    yield "torch", torch_path
    yield "loop of s cross-entropies", loop
    if s == 1:
        yield "Megatron, vocabulary-parallel", host
    # Last, because it leaves gradients where the logits were.
    yield "Triton, in place", lambda: triton(logits.detach())


def embedding_contestants(
    n: int, v: int, s: int, h: int, device: str
) -> Iterator[tuple[str, Contestant]]:
    weight = torch.randn(v, h, device=device, dtype=torch.bfloat16, requires_grad=True)
    # As in text, a few tokens are frequent.
    frequency = 1 / torch.arange(1, v + 1, device=device, dtype=torch.float64)
    bags = torch.multinomial(frequency, n * s, replacement=True).view(1, n, s)
    grad = torch.randn(1, n, h, device=device, dtype=torch.bfloat16)

    def train(embed: Callable[[], Tensor]) -> Contestant:
        return lambda: torch.autograd.grad(embed(), weight, grad)

    def look_ups() -> Tensor:
        total = F.embedding(bags[..., 0], weight)
        for offset in range(1, s):
            total = total + F.embedding(bags[..., offset], weight)
        return total / s

    yield "Triton", train(lambda: bag_embedding(weight, bags, implementation="triton"))
    yield "torch", train(lambda: bag_embedding(weight, bags, implementation="torch"))
    yield (
        "gather [n, s, h] and average",
        train(lambda: F.embedding(bags, weight).float().mean(-2).to(weight.dtype)),
    )
    yield "s look-ups, s - 1 additions", train(look_ups)


def head_contestants(
    n: int, v: int, h: int, s: int, device: str
) -> Iterator[tuple[str, Contestant]]:
    hidden = torch.randn(n, h, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, h, device=device).div_(h**0.5).bfloat16().requires_grad_()
    targets = torch.randint(0, v, (n, s), device=device)
    grad = torch.full((n,), 1 / n, device=device)

    def dense() -> None:
        loss = multi_hot_cross_entropy(
            hidden @ weight.t(), targets, reuse_logits=True, implementation="triton"
        )
        torch.autograd.grad(loss, (hidden, weight), grad)

    def linear() -> None:
        loss = linear_multi_hot_cross_entropy(hidden, weight, targets, implementation="triton")
        torch.autograd.grad(loss, (hidden, weight), grad)

    yield "dense, Triton in place", dense
    yield "--tst-loss-impl linear", linear


def operations(
    model: Model, n: int, device: str
) -> Iterator[tuple[str, int, Iterator[tuple[str, Contestant]], Mapping[str, Cost]]]:
    """Operation, bag size, contestants and paper figures of one model."""
    v, h, s = model.vocabulary, model.hidden, model.bag_size
    for bag in (s, 1):
        yield "loss", bag, loss_contestants(n, v, bag, device), loss_costs(n, v, bag)
    yield "embedding", s, embedding_contestants(n, v, s, h, device), embedding_costs(n, v, s, h)
    yield "output layer and loss", s, head_contestants(n, v, h, s, device), head_costs(n, v, h, s)


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


def measure(name: str, arguments: argparse.Namespace) -> Iterator[Timing]:
    for operation, s, contestants, costs in operations(MODELS[name], arguments.positions, "cuda"):
        for contestant, step in contestants:
            try:
                elapsed, peak = time_contestant(step, arguments.repetitions)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                elapsed = peak = float("inf")
            yield Timing(name, operation, s, contestant, elapsed, peak, costs.get(contestant))


def print_timing(row: Timing) -> None:
    cost = row.cost
    paper = f"{cost.bytes_moved / 1e9:.2f}" if cost else ""
    least = [f"{1e3 * cost.seconds(gpu):.2f}" if cost else "" for gpu in GPUS]
    print(
        f"| {row.model} | {row.operation} | {row.bag_size} | {row.contestant} | {paper} | "
        f"{' | '.join(least)} | {row.milliseconds:.2f} | {row.peak_megabytes:.0f} |",
        flush=True,
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--positions", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        print("gpu_kernels.py: needs a CUDA device; this machine shows none.", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, {arguments.positions} positions, bf16\n")
    print("| model | operation | s | design | GB moved |", end="")
    print("".join(f" {gpu.name} at least, ms |" for gpu in GPUS) + " measured, ms | peak, MB |")
    print("|---" * (7 + len(GPUS)) + "|")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        torch.distributed.init_process_group(
            "nccl", init_method=f"file://{directory}/store", rank=0, world_size=1
        )
        for name in arguments.models:
            for row in measure(name, arguments):
                print_timing(row)
                rows.append(asdict(row))
        torch.distributed.destroy_process_group()
    results = {"gpu": torch.cuda.get_device_name(), "positions": arguments.positions, "rows": rows}
    write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
