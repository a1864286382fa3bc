"""The embedding of bags against s look-ups and s - 1 additions: time and memory.

    OMP_NUM_THREADS=1 python benchmarks/embedding.py [--json FILE]

Forward and backward on one CPU thread. "look-ups" is the usual way: an embedding a token, and their
mean, as the additions go into one tensor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

POSITIONS = 4096
BAG_SIZES = (2, 4, 8, 16)
# Vocabulary, hidden size.
SHAPES = ((32768, 576), (128256, 576))
BAR = 3.0


def look_ups(weight: Tensor, bags: Tensor) -> Tensor:
    total = F.embedding(bags[..., 0], weight)
    for offset in range(1, bags.shape[-1]):
        total = total + F.embedding(bags[..., offset], weight)
    return total / bags.shape[-1]


def contestants(vocabulary: int, hidden: int, bag_size: int) -> dict[str, Callable[[], object]]:
    from megatron_tst.ops.embedding import bag_embedding

    torch.manual_seed(0)
    weight = torch.randn(vocabulary, hidden).bfloat16().requires_grad_()
    # Frequencies of words: a few tokens make up most of a text.
    ranks = torch.rand(1, POSITIONS, bag_size).pow(4).mul(vocabulary).long()
    grad = torch.randn(1, POSITIONS, hidden).bfloat16()

    def train(embed: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def step() -> None:
            weight.grad = None
            embed(weight, ranks).backward(grad)

        return step

    return {"look-ups": train(look_ups), "bag embedding": train(bag_embedding)}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    from megatron_tst.cpu.platform import restart_with_allocator_settings

    # As in training on the CPU platform.
    restart_with_allocator_settings()
    from benchmarks.measuring import peak_bytes, seconds_by_turns, write_json

    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    print(f"{POSITIONS} positions, bf16\n")
    print("| vocabulary | hidden | s | look-ups, ms | ours, ms | ratio | look-ups, MB | ours, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for vocabulary, hidden in SHAPES:
        for bag_size in BAG_SIZES:
            steps = contestants(vocabulary, hidden, bag_size)
            peaks = {name: peak_bytes(step) for name, step in steps.items()}
            times = seconds_by_turns(steps, options.rounds)
            theirs, ours = times["look-ups"], times["bag embedding"]
            print(
                f"| {vocabulary} | {hidden} | {bag_size} | {1e3 * theirs:.1f} | {1e3 * ours:.1f} | "
                f"{theirs / ours:.2f} | {peaks['look-ups'] / 1e6:.0f} | "
                f"{peaks['bag embedding'] / 1e6:.0f} |"
            )
            results.append(
                {"vocabulary": vocabulary, "bag_size": bag_size, "seconds": times, "bytes": peaks}
            )
    print(f"\nbar at s = 8: {BAR}")
    write_json(options.json, results)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
