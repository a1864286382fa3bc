"""One stage of benchmarks/gpu/check.py in a process of its own, all but tests and training."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.gpu.contestants import KERNELS, LINEAR, operations  # noqa: E402
from benchmarks.gpu.measuring import append, measure  # noqa: E402
from benchmarks.roofline import MODELS, Model  # noqa: E402

PACKAGES = (
    "torch", "triton", "megatron-core", "transformer-engine", "liger-kernel", "cut-cross-entropy",
    "quack-kernels", "numpy",
)  # fmt: skip
# For a CPU in Triton's interpreter: whether it runs, not how fast.
TINY = Model(hidden=24, vocabulary=300, matrix_parameters=1e3, bag_size=3)


def ceilings(options: argparse.Namespace) -> None:
    """Versions and card, bandwidth of a copy, FLOP/s of a large product in bf16."""
    device = options.device
    append(options.rows, {"what": "machine", **describe_machine(device)})
    size, elements = (64, 1 << 16) if options.tiny else (8192, 1 << 30)
    source = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copied = measure(lambda: target.copy_(source), device, options.repetitions)
    per_second = 2 * source.nbytes / (copied["milliseconds"] / 1e3)
    append(options.rows, {"what": "copy", "bytes_per_second": per_second, **copied})
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = measure(lambda: left @ right, device, options.repetitions)
    per_second = 2 * size**3 / (product["milliseconds"] / 1e3)
    append(options.rows, {"what": "product", "flops_per_second": per_second, **product})


def describe_machine(device: str) -> dict[str, object]:
    """Card, driver, and versions of all packages that take part."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    card, driver = platform.processor() or platform.machine(), "none"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        card = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    python = platform.python_version()
    return {"card": card, "driver": driver, "python": python, "versions": versions}


def contestants(options: argparse.Namespace) -> None:
    """Every contestant of the operations of this stage, as a row with its paper figures."""
    models = {"tiny": TINY} if options.tiny else {name: MODELS[name] for name in options.models}
    n, device = (4 if options.tiny else options.positions), options.device
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
        )
        for name, model in models.items():
            for operation, bag_size, found, costs in operations(model, n, device, options.stage):
                for contestant, step in found:
                    row = {"model": name, "operation": operation, "bag_size": bag_size}
                    row |= {"contestant": contestant, "positions": n}
                    cost = costs.get(contestant)
                    row["cost"] = asdict(cost) if cost else None
                    append(options.rows, row | run_contestant(step, options))
        torch.distributed.destroy_process_group()


def once(options: argparse.Namespace) -> None:
    """Every kernel once, forward and backward: for the tools that watch kernels.

    At shapes whose ends are cut out of blocks under the sanitizer, and at those of a model for
    counters.
    """
    from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy
    from megatron_tst.ops.embedding import bag_embedding

    is_watched = options.stage == "sanitizer"
    n, h, s = (5, 70, 3) if is_watched or options.tiny else (8192, 576, 6)
    sizes = (1, 250, 8208) if is_watched or options.tiny else (65536, 128256)
    known = torch.full((1,), 1.0 / n, device=options.device)
    for v in sizes:
        for expected in (None, known):
            shape = {"device": options.device, "dtype": torch.bfloat16}
            logits = torch.randn(n, v, **shape).requires_grad_()
            targets = torch.randint(0, v, (n, s), device=options.device)
            loss = multi_hot_cross_entropy(
                logits * 1, targets, None, None, -100, True, "triton", expected
            )
            loss.mean().backward()
            weight = torch.randn(v, h, **shape).requires_grad_()
            if expected is not None:
                summed: Any = weight
                summed.main_grad = torch.zeros(v, h, device=options.device)
                summed.grad_added_to_main_grad = False
            embedded = bag_embedding(
                weight, targets[None], implementation="triton", accumulate_into_main_grad=True
            )
            embedded.float().sum().backward()
    if options.device == "cuda":
        torch.cuda.synchronize()
    print("all kernels ran")


def run_contestant(
    step: Callable[[], object] | str, options: argparse.Namespace
) -> dict[str, object]:
    """What was measured, or why there is nothing: the others are to be measured all the same."""
    if isinstance(step, str):
        return {"milliseconds": None, "timed": step}
    try:
        return measure(step, options.device, options.repetitions)
    except Exception as error:
        if options.tiny and not isinstance(error, ImportError):
            raise
        return {"milliseconds": None, "timed": f"failed: {type(error).__name__}: {error}"[:300]}


STAGES = {"ceilings": ceilings, "sanitizer": once, "counters": once}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures a stage; rows go to a file of JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, KERNELS, LINEAR))
    parser.add_argument("--rows", type=Path, required=True, help="file to append to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["270M", "10B-A1B"])
    parser.add_argument("--positions", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(argv)
    if options.tiny:
        options.repetitions = 1
    STAGES.get(options.stage, contestants)(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
