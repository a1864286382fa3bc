"""Time the multi-hot cross-entropy against a loop of cross-entropies and the host's own loss.

    OMP_NUM_THREADS=1 python benchmarks/loss.py [--json loss.json]

Forward and backward on one CPU thread. The contestants take turns, so that a busy machine slows
all of them, and the fastest of the repetitions counts. "host" is Megatron's unfused
vocab_parallel_cross_entropy, for one target only; "loop" calls torch's cross_entropy once a target.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tst.common.atomic_files import write_json
from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy

POSITIONS = 1024
BAG_SIZES = (1, 4, 8, 16)
CASES = ((32768, torch.bfloat16, 7), (256, torch.float32, 60), (256, torch.bfloat16, 60))

Loss = Callable[[Tensor, Tensor], Tensor]


def loop_of_cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.float()
    losses = [F.cross_entropy(wide, column, reduction="none") for column in targets.unbind(-1)]
    return torch.stack(losses).mean(0)


def host_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    group = torch.distributed.group.WORLD
    return vocab_parallel_cross_entropy(logits, targets.squeeze(-1), tp_group=group)


def seconds(loss: Loss, logits: Tensor, targets: Tensor) -> float:
    # Fresh logits, as in a training step: the host overwrites float32 ones.
    leaf = logits.clone().requires_grad_()
    # A view, because a leaf may not be overwritten.
    view, grad = leaf.view_as(leaf), torch.ones(len(logits))
    start = time.perf_counter()
    loss(view, targets).backward(grad)
    return time.perf_counter() - start


def measure(vocabulary: int, dtype: torch.dtype, repetitions: int) -> dict[str, float]:
    """Milliseconds of every contestant."""
    torch.manual_seed(0)
    logits = torch.randn(POSITIONS, vocabulary).mul(3).to(dtype)
    targets = torch.randint(0, vocabulary, (POSITIONS, max(BAG_SIZES)))
    contestants: dict[str, tuple[Loss, int]] = {"host s=1": (host_cross_entropy, 1)}
    for bag_size in BAG_SIZES:
        contestants[f"ours s={bag_size}"] = (multi_hot_cross_entropy, bag_size)
        contestants[f"loop s={bag_size}"] = (loop_of_cross_entropies, bag_size)
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(repetitions):
        for name, (loss, bag_size) in contestants.items():
            elapsed = seconds(loss, logits, targets[:, :bag_size].contiguous())
            best[name] = min(best[name], 1e3 * elapsed)
    return best


def print_table(title: str, best: dict[str, float]) -> None:
    ours = best["ours s=1"]
    print(f"\n{title}")
    print(f"{'s':>3} {'ours ms':>9} {'loop ms':>9} {'loop/ours':>10} {'ours/ours s=1':>14}")
    for bag_size in BAG_SIZES:
        row, loop = best[f"ours s={bag_size}"], best[f"loop s={bag_size}"]
        print(f"{bag_size:>3} {row:>9.2f} {loop:>9.2f} {loop / row:>10.2f} {row / ours:>14.2f}")
    print(f"host s=1: {best['host s=1']:.2f} ms, {best['host s=1'] / ours:.2f} times ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the milliseconds to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{directory}/store", rank=0, world_size=1
        )
        for vocabulary, dtype, repetitions in CASES:
            best = measure(vocabulary, dtype, repetitions)
            name = str(dtype).removeprefix("torch.")
            print_table(f"{POSITIONS} positions, vocabulary {vocabulary}, {name}", best)
            results.append({"vocabulary": vocabulary, "dtype": name, "milliseconds": best})
        torch.distributed.destroy_process_group()
    if arguments.json:
        write_json(arguments.json, {"positions": POSITIONS, "cases": results})


if __name__ == "__main__":
    main()
