"""Output layer and loss in one against whole logits, and the loss alone: memory and time.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/linear_loss.py [--positions 4096] [--json FILE]

Forward and backward in bf16 on one CPU thread, in CPU seconds. "dense" multiplies out all logits
and takes multi_hot_cross_entropy of them; "dense, logits reused" lets their gradient take their
place, as training does. "linear" is linear_multi_hot_cross_entropy: with "four products"; with
three, whose forward computes the gradients; that and an fp32 ``main_grad`` of the weight, as
Megatron's DDP has it before, into which the backward adds it; and "gradient known", where the
forward does. torch's linear_cross_entropy has one target a position: as it is, and in chunks. The
gradients of hidden states and weight are part of the memory of all, but for ``main_grad``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BAG_SIZE = 6
HIDDEN = 576
# And whether the time is measured.
VOCABULARIES = {32768: True, 128256: True, 262144: False}
MEMORY_BAR, TIME_BAR = 1 / 8, 0.85


def contestants(n: int, vocabulary: int) -> dict[str, Callable[[], object]]:
    from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy
    from megatron_tst.ops.linear_cross_entropy import linear_multi_hot_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(n, HIDDEN).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN).div_(8).bfloat16().requires_grad_()
    with_main_grad: Any = weight.detach().clone().requires_grad_()
    with_main_grad.main_grad = torch.zeros(weight.shape)
    with_main_grad.grad_added_to_main_grad = False
    targets = torch.randint(0, vocabulary, (n, BAG_SIZE))

    def train(loss: Callable[[], Tensor]) -> Callable[[], object]:
        def step() -> None:
            hidden.grad = weight.grad = with_main_grad.grad = None
            loss().sum().backward()

        return step

    def dense(reuse: bool) -> Callable[[], object]:
        return train(
            lambda: multi_hot_cross_entropy(hidden @ weight.t(), targets, reuse_logits=reuse)
        )

    def linear(rows: Tensor, **settings: Any) -> Callable[[], object]:
        return train(lambda: linear_multi_hot_cross_entropy(hidden, rows, targets, **settings))

    def of_torch(options: Any) -> Callable[[], object]:
        return train(
            lambda: F.linear_cross_entropy(
                *(hidden, weight, targets[:, 0]), reduction="sum", options=options
            )
        )

    into_main: dict[str, Any] = {"accumulate_into_main_grad": True, "uniform_gradient": True}
    return {
        "dense": dense(False),
        "dense, logits reused": dense(True),
        "linear, four products": linear(weight),
        "linear": linear(weight, uniform_gradient=True),
        "linear, main_grad": linear(with_main_grad, **into_main),
        "linear, main_grad, gradient known": linear(
            with_main_grad, expected_gradient=torch.ones(()), **into_main
        ),
        "torch, dense": of_torch(None),
        "torch, chunks": of_torch(torch.nn.LinearCrossEntropyOptions()),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--without-torch", action="store_true", help="leave out torch's, whose chunks take minutes"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    from benchmarks.measuring import peak_bytes, seconds_by_turns, write_json

    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    print(f"{options.positions} positions, hidden {HIDDEN}, bags of {BAG_SIZE}\n")
    print("| vocabulary | loss | peak memory, MB | of dense | CPU s | of dense |")
    print("|---|---|---|---|---|---|")
    for vocabulary in options.vocabularies:
        steps = contestants(options.positions, vocabulary)
        if options.without_torch:
            steps = {name: step for name, step in steps.items() if not name.startswith("torch")}
        # Before any of them has run here.
        peaks = {name: peak_bytes(step) for name, step in steps.items()}
        times: dict[str, float] = {}
        if VOCABULARIES.get(vocabulary, True):
            times = seconds_by_turns(steps, options.rounds, time.process_time)
        for name, peak in peaks.items():
            memory, seconds = peak / peaks["dense"], times.get(name)
            took = f"{seconds:.2f} | {seconds / times['dense']:.2f}" if seconds else "|"
            print(f"| {vocabulary} | {name} | {peak / 1e6:.0f} | {memory:.3f} | {took} |")
        results.append({"vocabulary": vocabulary, "peak_bytes": peaks, "seconds": times})
        sys.stdout.flush()
    print(f"\nbars of linear at 128256: {MEMORY_BAR} of the memory, {TIME_BAR} times the time")
    write_json(options.json, {"positions": options.positions, "results": results})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
