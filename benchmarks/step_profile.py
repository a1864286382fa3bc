"""Where the time of a training step on the CPU platform goes, by kinds of operators.

    python benchmarks/step_profile.py [--models 127k 9M 270M-layer] [--contestant NAME] [--steps N]
        [--dtype DTYPE]

torch's profiler around steps of the contestants of ``step.py``, on one core. Shares are of the
time of a step under the profiler, which costs most where operators are many and small.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tst.common.bf16 import describe_bf16

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 5
# Names of operators without "aten::" and without what follows, such as "_" and "_backward".
KINDS = {
    "matrix products": "mm addmm matmul linear",
    "attention": "bmm baddbmm _softmax _scaled_dot scaled_dot",
    "conversions between dtypes, copies": "copy _to_copy to cat clone contiguous stack",
    "additions, multiplications, norms": (
        "add mul div sub neg pow mean sum rsqrt sqrt cos sin rms_norm _fused_rms_norm zero fill"
    ),
    "exponentials and maxima of the loss": "exp max amax logsumexp log gather scatter eq",
    "embedding": "embedding _embedding _sparse sparse index _index sort unique bincount",
    "SwiGLU": "silu",
    "Adam, norm of the gradient": "_fused_adamw _foreach linalg",
}
OTHERS = "views, allocation, other operators"
REST = "the rest: Python, reading data"


def main() -> None:
    """Profiles every model in a process of its own and prints a table."""
    from benchmarks.step import MEGATRON, MODELS, add_dtype, chosen_dtype

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--contestant", choices=MEGATRON, default="phase 1")
    parser.add_argument("--steps", type=int, default=10)
    add_dtype(parser)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        profile(options.models[0], options.contestant, options.steps, options.dtype)
        return
    dtype = chosen_dtype(options.dtype)
    print(f"{options.contestant}, share of the time of a step in {dtype}; products of bf16 on this")
    print(f"CPU: {describe_bf16()}\n")
    columns = {
        name: _profiled(name, options.contestant, options.steps, dtype) for name in options.models
    }
    _print_row(("", *columns))
    _print_row(["---"] * (len(columns) + 1))
    for kind in (*KINDS, OTHERS, REST):
        _print_row((kind, *(f"{column[kind]:.0%}" for column in columns.values())))
    _print_row(("operators a step", *(f"{one['operators']:.0f}" for one in columns.values())))


def _print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |")


def _profiled(model: str, contestant: str, steps: int, dtype: str) -> dict[str, float]:
    core = max(os.sched_getaffinity(0))
    command = [
        *("taskset", "-c", str(core), sys.executable, "-W", "ignore", __file__, "--in-process"),
        *("--models", model, "--contestant", contestant, "--steps", str(steps), "--dtype", dtype),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SHARE ")]
    if done.returncode or not lines:
        sys.exit(f"{model} ended with {done.returncode}\n{done.stderr[-4000:]}")
    found = (line.removeprefix("SHARE ").split(" ", 1) for line in lines)
    return {kind: float(value) for value, kind in found}


def profile(name: str, contestant: str, steps: int, dtype: str) -> None:
    """Runs the steps in this process and prints a line for each kind."""
    from megatron_tst import cpu
    from megatron_tst.cpu.platform import restart_with_allocator_settings

    restart_with_allocator_settings()
    cpu.activate()
    import torch
    from torch.profiler import ProfilerActivity

    from benchmarks.step import MEGATRON, MODELS, megatron_arguments
    from megatron_tst.training.pretrain import run

    torch.set_num_threads(1)
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True)
    done, started = 0, 0.0

    def after_step(_: Any) -> None:
        nonlocal done, started
        done += 1
        if done == WARM_UP_STEPS:
            profiler.start()
            started = time.perf_counter()
        if done == WARM_UP_STEPS + steps:
            seconds = time.perf_counter() - started
            profiler.stop()
            _print_shares(profiler.key_averages(), seconds, steps)
            sys.exit()

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        settings = MEGATRON[contestant]
        sys.argv = ["step", *megatron_arguments(MODELS[name], settings, Path(folder), dtype)]
        run(after_step=after_step)


def _print_shares(events: Any, seconds: float, steps: int) -> None:
    whole = 1e6 * seconds
    spent = dict.fromkeys((*KINDS, OTHERS), 0.0)
    operators = [event for event in events if event.key.startswith("aten::")]
    for event in operators:
        spent[_kind(event.key.removeprefix("aten::"))] += event.self_cpu_time_total
    for kind, microseconds in spent.items():
        print(f"SHARE {microseconds / whole} {kind}")
    print(f"SHARE {1 - sum(spent.values()) / whole} {REST}")
    print(f"SHARE {sum(event.count for event in operators) / steps} operators")


def _kind(operator: str) -> str:
    for kind, names in KINDS.items():
        if re.match(rf"({names.replace(' ', '|')})(_|$)", operator):
            return kind
    return OTHERS


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
