"""Bytes, FLOPs and the least time on an H100 and a B200 of every way to compute the bag's loss.

    python benchmarks/roofline.py [--positions 8192] [--json FILE]

Paper figures, no measurement: benchmarks/gpu/check.py measures. Traffic counts each pass over a
tensor of the size of the logits, or of the weight, once from and to the memory of the GPU, as if
caches held nothing between two kernels and everything within one. Forward and backward, one rank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, log2
from pathlib import Path

BF16, FP32, INT64, SECTOR = 2, 4, 8, 32
# Columns that a program of the loss can hold.
LARGEST_ROW = 1 << 16
# Logits of a block of the linear loss on a GPU, which holds whole tiles of positions.
BLOCK_ELEMENTS, TILE, LEAST_POSITIONS = 1 << 27, 256, 512


@dataclass(frozen=True)
class Gpu:
    """Vendor's peak figures: NVIDIA's data sheets of H100 SXM and HGX B200, dense bf16."""

    name: str
    bytes_per_second: float
    flops_per_second: float


GPUS = (Gpu("H100", 3.35e12, 989e12), Gpu("B200", 7.7e12, 2250e12))


@dataclass(frozen=True)
class Model:
    """A model of the paper and its bag size.

    Attributes:
        hidden: hidden size.
        vocabulary: rows of the output layer.
        matrix_parameters: weights that a token meets in matrix products, output layer included.
        bag_size: of its superposition run.
    """

    hidden: int
    vocabulary: int
    matrix_parameters: float
    bag_size: int


# Parameters without the input embedding; of the experts, those that are active.
MODELS = {
    "270M": Model(576, 128256, 193.4e6, 6),
    "600M": Model(960, 128256, 477.1e6, 6),
    "3B": Model(2048, 128256, 3075.1e6, 6),
    "10B-A1B": Model(1536, 151936, 1196.1e6, 16),
}


@dataclass(frozen=True)
class Cost:
    """What a way to compute something takes at least.

    Attributes:
        kernel_bytes: moved from and to the memory of the GPU by kernels without matrix products.
        extra_bytes: held at once on top of the operands and their gradients.
        flops: of matrix products.
        product_bytes: moved by matrix products.
    """

    kernel_bytes: float
    extra_bytes: float = 0.0
    flops: float = 0.0
    product_bytes: float = 0.0

    @property
    def bytes_moved(self) -> float:
        return self.kernel_bytes + self.product_bytes

    def seconds(self, gpu: Gpu) -> float:
        """Least time: kernels one after another, a product bound by memory or by arithmetic."""
        product = max(self.product_bytes / gpu.bytes_per_second, self.flops / gpu.flops_per_second)
        return self.kernel_bytes / gpu.bytes_per_second + product


def loss_costs(n: int, v: int, s: int) -> dict[str, Cost]:
    """Loss of logits [n, v] in bf16 and s targets a position, and their gradient in bf16."""
    logits = n * v
    targets = 2 * n * s * (INT64 + SECTOR)
    read_twice_and_write = 3 * BF16 * logits
    costs = {
        "Triton": Cost(read_twice_and_write + targets, extra_bytes=BF16 * logits),
        "Triton, in place": Cost(read_twice_and_write + targets),
    }
    if v <= LARGEST_ROW:
        # The backward reads what it expects and what it gets for each position.
        costs["Triton, one read"] = Cost(2 * BF16 * logits + 1.5 * targets + 2 * n * FP32)
    # One float32 copy. A target: log-softmax (reads twice, writes), a dense gradient of the
    # negative log-likelihood (writes), that of log-softmax (reads both, one of them twice, writes)
    # and, from the second target on, an addition of gradients (reads two, writes).
    a_target, addition = (3 + 1 + 4) * FP32, 3 * FP32
    casts = 2 * (BF16 + FP32)
    costs["loop of s cross-entropies"] = Cost(
        logits * (casts + s * a_target + (s - 1) * addition),
        extra_bytes=logits * (FP32 + s * FP32 + 2 * FP32 + BF16),
    )
    if s == 1:
        # Copy, maximum, subtraction, exponential, sum, division; multiplication, cast.
        passes = (BF16 + FP32) + FP32 + 2 * FP32 + 2 * FP32 + FP32 + 2 * FP32
        passes += 2 * FP32 + (FP32 + BF16)
        costs["Megatron, vocabulary-parallel"] = Cost(passes * logits, extra_bytes=6 * logits)
        # A pass for the statistics, one that leaves the gradient in place, and in the backward one
        # that multiplies it with that of the loss.
        in_place = Cost((BF16 + 2 * BF16 + 2 * BF16) * logits)
        costs |= {"Transformer Engine": in_place, "Liger, cross-entropy": in_place}
    return costs


def embedding_costs(n: int, v: int, s: int, h: int) -> dict[str, Cost]:
    """Mean of s rows of [v, h] in bf16 for n bags, and the dense gradient in bf16."""
    result, weight = n * h, v * h
    # Keys and places go through a radix sort of 8 bits a pass; ids have 18 bits at most.
    sort = 3 * 2 * n * s * 2 * INT64
    ids = n * s * INT64
    look_up = 2 * BF16 * result
    fp32_mean = (BF16 + FP32) * s * result + FP32 * s * result + BF16 * result
    return {
        "Triton": Cost(
            (s + 1) * BF16 * result + s * BF16 * result + BF16 * weight + sort + 2 * ids,
            extra_bytes=2 * n * s * 2 * INT64,
        ),
        "gather [n, s, h] and average": Cost(
            # Rows, their mean in float32, and back: a gradient for each row, sorted and added.
            s * look_up + fp32_mean + (FP32 + FP32 + BF16) * s * result
            + s * BF16 * result + BF16 * weight + sort,
            extra_bytes=s * result * (BF16 + FP32),
        ),
        "s look-ups, s - 1 additions": Cost(
            # Each look-up has a dense gradient, and these are added.
            s * look_up + (s - 1) * 3 * BF16 * result
            + s * (BF16 * result + BF16 * weight) + (s - 1) * 3 * BF16 * weight + sort,
            extra_bytes=BF16 * (result + weight),
        ),
    }  # fmt: skip


def head_costs(n: int, v: int, h: int, s: int) -> dict[str, Cost]:
    """Output layer and loss: hidden states [n, h], weight [v, h], to both gradients."""
    product, logits, weight = 2.0 * n * v * h, BF16 * n * v, BF16 * v * h
    operands = BF16 * n * h + weight
    # Liger's chunks of positions: so many that their logits are as large as the hidden states.
    chunks = n / 2 ** ceil(log2(n * h / v))
    return {
        # A product writes the logits; two read their gradient.
        "dense, Triton in place": Cost(
            kernel_bytes=loss_costs(n, v, s)["Triton, in place"].kernel_bytes,
            extra_bytes=logits,
            flops=3 * product,
            product_bytes=3 * logits + 4 * operands,
        ),
        "--tst-loss-impl linear": linear_cost(n, v, h),
        # Logits stay on the chip. Operands alone, though once more for the recomputation.
        "cut cross-entropy": Cost(0, 0, flops=4 * product, product_bytes=5 * operands),
        # The gradient is computed in the forward, so that the loss has to be a mean. Each chunk
        # reads the weight twice, and reads and writes its gradient.
        "Liger, fused linear": Cost(
            kernel_bytes=loss_costs(n, v, 1)["Liger, cross-entropy"].kernel_bytes,
            extra_bytes=logits / chunks,
            flops=3 * product,
            product_bytes=3 * logits + chunks * 4 * weight,
        ),
    }


def linear_cost(n: int, v: int, h: int) -> Cost:
    """The linear loss in blocks of positions, whose forward computes both gradients in float32."""
    product, logits = 2.0 * n * v * h, BF16 * n * v
    positions = min(max(BLOCK_ELEMENTS // v // TILE * TILE, LEAST_POSITIONS), n)
    # A block reads the weight twice, and reads and writes the sum of its gradient.
    of_blocks = ceil(n / positions) * (2 * BF16 + 2 * FP32) * v * h
    # Sums begin as zeros, and are read, multiplied and written by the backward.
    sums = (2 * FP32 + BF16) * (v + n) * h
    return Cost(
        # One kernel reads a row twice, the second time from the cache, and writes its gradient.
        kernel_bytes=2 * logits + sums,
        extra_bytes=BF16 * positions * v + FP32 * (v + n) * h,
        flops=3 * product,
        product_bytes=3 * logits + of_blocks + (2 * BF16 + 2 * FP32) * n * h,
    )


def step_seconds(model: Model, n: int, gpu: Gpu) -> float:
    """Least time of all matrix products of a step, without attention scores."""
    return 6 * model.matrix_parameters * n / gpu.flops_per_second


def print_table(title: str, tables: Mapping[str, Mapping[str, Cost]]) -> None:
    """Prints the designs of one operation, a column a model."""
    print(f"\n{title}: GB moved / extra GB / {' / '.join(f'{gpu.name}, ms' for gpu in GPUS)}\n")
    print(f"| design | {' | '.join(tables)} |")
    print("|---" * (1 + len(tables)) + "|")
    for design in next(iter(tables.values())):
        cells = []
        for costs in tables.values():
            cost = costs[design]
            numbers = [f"{cost.bytes_moved / 1e9:.2f}", f"{cost.extra_bytes / 1e9:.2f}"]
            cells.append(" / ".join(numbers + [f"{1e3 * cost.seconds(gpu):.2f}" for gpu in GPUS]))
        print(f"| {design} | {' | '.join(cells)} |")


def main() -> None:
    """Prints the tables of docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    from benchmarks.measuring import write_json

    n = options.positions
    operations: dict[str, dict[str, dict[str, Cost]]] = {}
    for name, model in MODELS.items():
        v, h, s = model.vocabulary, model.hidden, model.bag_size
        label = f"{name}, s = {s}"
        for operation, costs in (
            ("Loss", loss_costs(n, v, s)),
            ("Loss at s = 1", loss_costs(n, v, 1)),
            ("Embedding", embedding_costs(n, v, s, h)),
            ("Output layer and loss", head_costs(n, v, h, s)),
        ):
            operations.setdefault(operation, {})[label] = costs
    for operation, tables in operations.items():
        print_table(operation, tables)
    print(f"\nAll matrix products of a step, at least, {' / '.join(gpu.name for gpu in GPUS)}, ms:")
    for name, model in MODELS.items():
        times = (f"{1e3 * step_seconds(model, n, gpu):.1f}" for gpu in GPUS)
        print(f"{name} {' / '.join(times)}")
    results = {
        operation: {
            label: {design: asdict(cost) for design, cost in costs.items()}
            for label, costs in tables.items()
        }
        for operation, tables in operations.items()
    }
    write_json(options.json, {"positions": n, "operations": results})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
