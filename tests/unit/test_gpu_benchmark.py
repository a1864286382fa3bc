"""The check of a GPU runs on a CPU, and its paper figures follow from the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import check
from benchmarks.gpu.tables import METRICS, counters, least_step, tables
from benchmarks.gpu.training import LINEAR, OURS, VOCABULARY
from benchmarks.roofline import (
    BLOCK_ELEMENTS,
    GPUS,
    LARGEST_ROW,
    LEAST_POSITIONS,
    TILE,
    Cost,
    Gpu,
    Model,
    loss_costs,
)
from megatron_tst.ops import logit_blocks
from tests.kernel_devices import Runner

OTHERS = {
    "Transformer Engine", "Liger, cross-entropy", "quack", "cut cross-entropy",
    "Liger, fused linear", "torch, linear_cross_entropy",
}  # fmt: skip
MAY_BE_MISSING = (
    "datasets", "einops", "gigatoken", "hypothesis", "psutil", "pyarrow", "pytest", "regex", "rich",
    "safetensors", "tensorboard", "tokenizers", "tqdm", "transformers", "yaml", "zstandard",
)  # fmt: skip


def run_contestants(device: str) -> None:
    from benchmarks.gpu.contestants import KERNELS, LINEAR, operations

    model = Model(hidden=24, vocabulary=300, matrix_parameters=1e3, bag_size=3)
    seen = []
    for stage in (KERNELS, LINEAR):
        for operation, bag_size, contestants, costs in operations(model, 4, device, stage):
            for name, step in contestants:
                if isinstance(step, str):
                    assert name in OTHERS
                    assert step.startswith("left out: ")
                elif not name.startswith("Megatron"):  # needs a process group
                    step()
                assert name in costs or cost_is_unknown(name)
                seen.append((operation, bag_size, name))
    assert len(seen) == len(set(seen)) == 6 + 11 + 2 + 4 + 7 + 10


def cost_is_unknown(name: str) -> bool:
    others = ("torch", "quack", "Megatron, native fusion", "torch, linear_cross_entropy")
    return name in others or name.startswith("linear, blocks")


def test_contestants_run(on_device: Runner) -> None:
    on_device(run_contestants)


def run_once(device: str, folder: Path) -> None:
    from benchmarks.gpu import stages

    rows = ("--rows", str(folder / "rows"), "--device", device)
    assert stages.main(["sanitizer", *rows, "--tiny"]) == 0


def test_all_kernels_run_once_for_tools_that_watch(on_device: Runner, tmp_path: Path) -> None:
    on_device(run_once, tmp_path)


@pytest.mark.parametrize("stage", ["sanitizer", "counters"])
def test_a_tool_that_is_missing_is_named(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "TOOL_FOLDERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    options = check.parse_arguments(["--stages", stage, "--output", str(tmp_path)])
    (task,) = check.tasks(options)
    tool = check.TOOLS[stage]
    outcome = check.run(task, tmp_path / "log", "cuda", seconds=60)
    assert outcome.ended == f"left out: {tool} not installed"
    # A stand-in that is found runs the stage, and is told of a driver that keeps its counters.
    (tmp_path / tool).write_text('#!/bin/sh\necho "==ERROR== ERR_NVGPUCTRPERM"; exit 1\n')
    (tmp_path / tool).chmod(0o755)
    (task,) = check.tasks(options)
    assert task.under[0] == str(tmp_path / tool)
    outcome = check.run(task, tmp_path / "log", "cuda", seconds=60)
    assert outcome.ended.startswith("left out: ERR_NVGPUCTRPERM")


def test_counters_become_rows(tmp_path: Path) -> None:
    heads = ",".join(f'"{name}"' for name in ("ID", "Kernel Name", *METRICS))
    units = ",".join(['""'] * (2 + len(METRICS)))
    values = ",".join(['"0"', '"_replace_kernel"', '"1,024"', '"2"', '"3"', '"4.5"', '"6"'])
    file = tmp_path / "counters.csv"
    file.write_text(f"==PROF== Connected\n{heads}\n{units}\n{values}\n")
    (row,) = counters(file)
    assert row == {
        "kernel": "_replace_kernel",
        **dict(zip(METRICS, (1024, 2, 3, 4.5, 6), strict=True)),
    }
    resumed = {"killed_after": 12, "resumed_at": 9, "switch": 10, "steps": 4}
    rows: dict[str, Any] = {name: [] for name in (*check.MACHINE_STAGES, check.TE_STAGE)}
    rows |= {"counters": [row], "resume": [{**resumed, "largest_difference": 0.0}]}
    table = tables([], rows)
    assert "| _replace_kernel | 1024 | 2 | 3 | 4.5 | 6 |" in table
    assert "Killed after step 12, resumed at 9, switch at 10: 4 losses differ by 0 of" in table
    assert counters(tmp_path / "none") == []


def test_the_kernels_move_each_logit_three_times_whatever_the_bag() -> None:
    n, v = 1024, 128256
    costs = [loss_costs(n, v, s)["Triton"].bytes_moved for s in (1, 16)]
    assert costs[0] == pytest.approx(3 * 2 * n * v, rel=1e-3)
    assert costs[1] == pytest.approx(costs[0], rel=2e-3)
    blocks = logit_blocks._BLOCK_ELEMENTS_GPU, logit_blocks._TILE, logit_blocks._LEAST_POSITIONS
    assert blocks == (BLOCK_ELEMENTS, TILE, LEAST_POSITIONS)


def test_rows_that_a_program_holds_move_each_logit_twice() -> None:
    n, v = 1024, LARGEST_ROW
    costs = loss_costs(n, v, 16)
    assert costs["Triton, one read"].bytes_moved == pytest.approx(2 * 2 * n * v, rel=1e-2)
    assert "Triton, one read" not in loss_costs(n, v + 16, 16)


def test_the_least_time_adds_kernels_and_takes_the_slower_side_of_products() -> None:
    gpu = GPUS[0]
    second = {"bytes": gpu.bytes_per_second, "flops": gpu.flops_per_second}
    cost = Cost(second["bytes"], flops=3 * second["flops"], product_bytes=2 * second["bytes"])
    assert cost.seconds(gpu) == pytest.approx(4)
    memory_bound = Cost(0, flops=second["flops"], product_bytes=2 * second["bytes"])
    assert memory_bound.seconds(gpu) == pytest.approx(2)


@pytest.mark.slow
def test_the_check_runs_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = ("ceilings", "tests", "kernels", "resume", "training")
    arguments = ["--device", "cpu", "--output", str(tmp_path), "--steps", "4"]
    assert check.main([*arguments, "--stages", *stages, "--arms", "TST, linear"]) == 0

    results = json.loads((tmp_path / "gpu-check.json").read_text())
    ended = {outcome["name"]: outcome["ended"] for outcome in results["stages"]}
    assert ended == {
        "ceilings": "done",
        "tests": "left out: no GPU",
        "kernels": "done",
        "resume": "done",
        "TST, linear": "done",
    }
    assert [row["what"] for row in results["rows"]["ceilings"]] == ["machine", "copy", "product"]
    kernels = {row["contestant"]: row for row in results["rows"]["kernels"]}
    for host in ("Megatron, vocabulary-parallel", "Megatron, native fusion"):
        assert kernels[host]["milliseconds"] > 0
    assert kernels["quack"]["timed"].startswith("left out: No module named")
    (resumed,) = results["rows"]["resume"]
    assert (resumed["resumed_at"], resumed["switch"], resumed["largest_difference"]) == (9, 10, 0)
    phases = results["rows"]["training"]
    assert [(row["phase"], row["design"]) for row in phases] == [(1, LINEAR), (2, LINEAR)]
    assert all(row["milliseconds"] > 0 and 0 < row["loss"] < 7 for row in phases)
    assert (tmp_path / "gpu-check.md").read_text() in capfd.readouterr().out


def test_a_stage_is_stopped_with_its_children_and_keeps_what_it_printed(tmp_path: Path) -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '''{child}'''])"
    task = check.Task("kernels", "kernels", ("-c", code), seconds=600)
    outcome = check.run(task, tmp_path / "log", "cpu", seconds=3)
    assert outcome.ended == "stopped after 3 s"
    # Its parent is gone, and the system ends it in its own time.
    deadline = time.monotonic() + 60
    while is_running(int((tmp_path / "log").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert check.run(task, tmp_path / "log", "cpu", seconds=0).ended == "left out: no time left"


def is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status


def test_a_failed_stage_says_why(tmp_path: Path) -> None:
    task = check.Task("kernels", "kernels", ("-c", "raise ValueError('no such shape')"), 60)
    outcome = check.run(task, tmp_path / "log", "cpu", 60)
    assert outcome.ended == "failed with 1: ValueError: no such shape"


def test_the_table_has_shares_of_the_measured_ceilings() -> None:
    cost = asdict(Cost(kernel_bytes=3e9))
    row = {"model": "3B", "operation": "loss", "bag_size": 6, "contestant": "Triton"}
    row |= {"milliseconds": 2.0, "timed": "graph", "cost": cost}
    missing = {**row, "contestant": "quack", "milliseconds": None, "timed": "left out: none"}
    ceilings = [
        {"what": "copy", "bytes_per_second": 2e12},
        {"what": "product", "flops_per_second": 5e14},
    ]
    rows: dict[str, list[dict[str, Any]]] = {"ceilings": ceilings, "kernels": [row, missing]}
    table = tables([], {**rows, "linear": [], "training": [], "te": []})
    # 3 GB in 2 ms are 1500 GB/s, three quarters of what a copy moves, and take 1.5 ms at least.
    assert "| loss | 6 | Triton | 2 | graph |  | 1500 | 0.75 | 1.5 |" in table
    assert "| quack |  | left out: none |  |  |  | 1.5 |" in table


def test_the_prediction_of_a_step_adds_its_loss_to_its_products() -> None:
    gpu = Gpu("toy", 1e12, 1e15)
    row = {"arm": "TST, auto", "phase": 1, "design": OURS}
    n, products = 32 * 512, 6 * 193.4e6 * 32 * 512 / 1e15
    bytes_moved = loss_costs(n, VOCABULARY, 6)[OURS].bytes_moved
    assert least_step(row, gpu) == pytest.approx(1e3 * (products + bytes_moved / 1e12))
    # Sums of gradients in float32, made as zeros and read once, and written in bfloat16.
    linear = least_step({**row, "design": LINEAR}, gpu)
    passes = (4 * n * VOCABULARY + 10 * 576 * (n + VOCABULARY)) / 1e12
    assert linear == pytest.approx(1e3 * (products + passes))
    assert least_step({**row, "design": None}, gpu) is None


def test_the_check_refuses_to_run_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    assert check.main(["--output", str(tmp_path)]) == 2
    assert capfd.readouterr().err == "error: torch sees no CUDA device on this machine\n"


def test_training_needs_nothing_beside_megatron_core_on_a_gpu(tmp_path: Path) -> None:
    code = f"""
import importlib.machinery as machinery
missing = {MAY_BE_MISSING!r}
find = machinery.PathFinder.find_spec.__func__
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in missing else find(cls, name, *rest)
)
from megatron_tst.training import pretrain
from benchmarks.gpu import check, contestants, stages, training
training.write_corpus(__import__("pathlib").Path({str(tmp_path)!r}), 512, 2048)
print("done")
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=check.ROOT,
        env={**os.environ, "PYTHONPATH": str(check.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "done\n", result.stderr
