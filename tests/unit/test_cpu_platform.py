"""The CPU platform, in processes of its own: the one that runs the tests stays as it is."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tst.cpu import collectives
from megatron_tst.cpu.arguments import _WITHOUT_GPU, refuse_gpu_arguments, set_cpu_defaults
from megatron_tst.cpu.optimizer import FusedAdam
from tests import platform_checks
from tests.distributed.harness import WorkerPool, run_distributed
from tests.zygote import ROOT, Launcher

CHECKS = sorted(name for name in vars(platform_checks) if name.startswith("check_"))


@pytest.fixture(scope="module")
def platform(request: pytest.FixtureRequest, has_cuda_device: bool) -> Iterator[Launcher]:
    """Starts processes where the platform is on, whatever GPUs the machine has."""
    if not has_cuda_device:
        yield request.getfixturevalue("launcher")
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        owner = Launcher()
        yield owner
        owner.close()


@pytest.fixture
def unpatched() -> Iterator[WorkerPool]:
    """A process that has imported Megatron and has not activated the platform."""
    pool = WorkerPool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("check", CHECKS)
def test_on_the_platform(platform: Launcher, tmp_path: Path, check: str) -> None:
    platform.run([check], tmp_path / "log", main="tests.platform_checks:main")


def test_nothing_changes_beside_a_gpu(unpatched: WorkerPool) -> None:
    unpatched.run(platform_checks.stay_inert_beside_a_gpu, (), 60)


def test_untested_megatron_is_refused_by_name(unpatched: WorkerPool) -> None:
    (message,) = unpatched.run(platform_checks.message_about_version, ("0.99.0",), 60)
    assert "megatron-core 0.99.0" in message
    assert "0.19.2" in message


def test_activation_without_a_symbol_names_it(unpatched: WorkerPool) -> None:
    missing = "megatron.core.optimizer.clip_grads", "l2_norm_impl"
    (message,) = unpatched.run(platform_checks.message_about_missing, missing, 60)
    assert ".".join(missing) in message
    assert "pyproject.toml" in message


def use_groups() -> None:
    groups: list[Any] = [dist.new_group([rank]) for rank in range(2)]
    alone = groups[dist.get_rank()]
    # gloo refuses the dtype, which shows whether it is asked.
    unreducible = torch.zeros(1, dtype=torch.int16)
    with pytest.raises(RuntimeError):
        dist.all_reduce(unreducible, group=alone)
    upstream = dist.all_reduce, dist.broadcast, dist.all_gather
    collectives.install()
    try:
        assert dist.all_reduce(unreducible, group=alone) is None
        handle = dist.all_reduce(unreducible, group=alone, async_op=True)
        assert handle is not None
        assert handle.wait()
        assert handle.is_completed()
        # A rank that is not in the group: any collective that looked at it would fail.
        assert dist.broadcast(unreducible, 99, alone) is None
        received = torch.tensor([dist.get_rank() + 1.0])
        dist.broadcast(received, 1)
        assert received.item() == 2.0
        for op, expected in ((dist.ReduceOp.SUM, 3.0), (dist.ReduceOp.MAX, 2.0)):
            tensor = torch.tensor([dist.get_rank() + 1.0])
            dist.all_reduce(tensor, op)
            assert tensor.item() == expected
            tensor = torch.tensor([dist.get_rank() + 1.0])
            handle = dist.all_reduce(tensor, op=op, async_op=True)
            assert handle is not None
            handle.wait()
            assert tensor.item() == expected
    finally:
        dist.all_reduce, dist.broadcast, dist.all_gather = upstream


def test_only_groups_of_one_skip_collectives() -> None:
    run_distributed(2, use_groups)


@pytest.mark.parametrize(
    ("adam_w_mode", "stock"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)]
)
def test_fused_adam_takes_the_steps_of_stock_ones(
    adam_w_mode: bool, stock: type[torch.optim.Adam]
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,))]
    ours, theirs = ([x.clone().requires_grad_() for x in start] for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}
    fused = FusedAdam(ours, adam_w_mode=adam_w_mode, **settings)
    optimizers = [fused, stock(theirs, **settings, foreach=False)]
    for _ in range(20):
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn(our.shape, generator=generator)
            their.grad = our.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # The fused kernel orders its operations differently: a few float32 roundings a step.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # Where Megatron looks for it in the optimizers of Transformer Engine and apex.
    assert [group["step"] for group in optimizers[0].param_groups] == [20]
    assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in optimizers[0].state.values())


def test_a_fused_optimizer_leaves_parameters_without_gradient_alone() -> None:
    with_gradient, without = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = FusedAdam([{"params": [with_gradient]}, {"params": [without]}], weight_decay=0.1)
    with_gradient.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(with_gradient, torch.ones(2))
    assert torch.equal(without, torch.ones(2))
    assert without not in optimizer.state


def megatron_like_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--transformer-impl", default="transformer_engine")
    return parser


def test_defaults_of_unknown_arguments_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="'distributed_backend'"):
        set_cpu_defaults(megatron_like_parser())


WORKS = {name: value for name, _, value in _WITHOUT_GPU} | {
    "profile": False,
    "use_pytorch_profiler": False,
    "hybrid_layer_pattern": None,
    "reset_attention_mask": False,
    "create_attention_mask_in_dataloader": False,
    "tst_loss_impl": "linear",
    "moe_token_dispatcher_type": "alltoall",
    "window_size": None,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
    "context_parallel_size": 1,
    "multi_latent_attention": False,
    "qk_layernorm": True,
    "q_lora_rank": None,
    "dataloader_inter_document_masking": False,
}


def test_arguments_that_work_without_a_gpu_are_accepted() -> None:
    refuse_gpu_arguments(argparse.Namespace(**WORKS))
    refuse_gpu_arguments(
        argparse.Namespace(**{**WORKS, "profile": True, "use_pytorch_profiler": True})
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer_impl", "transformer_engine", "--transformer-impl .*: use local"),
        ("distributed_backend", "nccl", "--distributed-backend nccl .*: use gloo"),
        ("fp8", "hybrid", "--fp8-format hybrid .*: remove it"),
        ("log_straggler", True, "--log-straggler needs .*: remove it"),
        ("tst_loss_impl", "triton", "--tst-loss-impl triton needs .*: use auto"),
        ("moe_latent_size", 16, "--moe-latent-size 16 needs .*: remove it"),
        ("cpu_offloading_num_layers", 2, "--cpu-offloading-num-layers 2 needs .*: remove it"),
        ("moe_token_dispatcher_type", "flex", "--moe-token-dispatcher-type flex .*: use alltoall"),
        ("profile", True, "--profile .*: add --use-pytorch-profiler"),
        ("hybrid_layer_pattern", "*EM-|G", r"--hybrid-layer-pattern \*EM-\|G .* GPU \(G M\)"),
        ("reset_attention_mask", True, "--reset-attention-mask .*: remove it"),
    ],
)
def test_arguments_that_need_a_gpu_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_gpu_arguments(argparse.Namespace(**{**WORKS, name: value}))


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"window_size": (8, 0)}, "--window-size"),
        ({"softmax_type": "learnable"}, "--softmax-type"),
        ({"apply_query_key_layer_scaling": True}, "--apply-query-key-layer-scaling"),
    ],
)
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({}, ""),
        ({"context_parallel_size": 2}, "--context-parallel-size 2"),
        ({"multi_latent_attention": True, "q_lora_rank": 8}, "--multi-latent-attention"),
        ({"hybrid_layer_pattern": "+-"}, "--multi-latent-attention"),
        ({"dataloader_inter_document_masking": True}, "--dataloader-inter-document-masking"),
    ],
)
def test_unfused_attention_is_refused_where_megatrons_does_not_compute_it(
    setting: dict[str, Any], flag: str, other: dict[str, Any], named: str
) -> None:
    refused = pytest.raises(ValueError, match=f"{flag} with {named} needs a GPU .*: remove one")
    with refused if named else nullcontext():
        refuse_gpu_arguments(argparse.Namespace(**{**WORKS, **setting, **other}))


def test_normalised_queries_of_latent_attention_need_their_rank() -> None:
    latent = {**WORKS, "multi_latent_attention": True}
    refuse_gpu_arguments(argparse.Namespace(**latent | {"q_lora_rank": 8}))
    with pytest.raises(ValueError, match=r"--qk-layernorm .* needs --q-lora-rank"):
        refuse_gpu_arguments(argparse.Namespace(**latent))


RESTARTING_SCRIPT = """
import json, os, sys
from megatron_tst.cpu import platform

if os.environ.get("PRETEND_GPU"):
    platform._GPU_DRIVER_DEVICES = (__file__,)
with open(os.environ["STARTS"], "a") as starts:
    print(os.getpid(), file=starts)
platform.restart_with_allocator_settings()
print(json.dumps({
    "argv": sys.argv[1:],
    "package": __package__,
    "tunables": os.environ.get("GLIBC_TUNABLES"),
    "imports torch": "torch" in sys.modules,
}))
"""


def start_script(folder: Path, **variables: str) -> tuple[dict[str, object], list[str]]:
    """Runs the script as a module; returns its report and the process id of each start."""
    package = folder / "launched"
    package.mkdir()
    (package / "script.py").write_text(RESTARTING_SCRIPT)
    starts = folder / "starts"
    inherited = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment = {
        **inherited,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "CUDA_VISIBLE_DEVICES": "",
        "STARTS": str(starts),
        **variables,
    }
    command = [sys.executable, "-m", "launched.script", "--flag", "two words", ""]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report, starts.read_text().split()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_process_restarts_once_under_allocator_settings(tmp_path: Path) -> None:
    report, starts = start_script(tmp_path)
    assert len(starts) == 2
    assert len(set(starts)) == 1  # in place: torchrun keeps watching the same process
    assert "glibc.malloc" in str(report["tunables"])
    assert report["argv"] == ["--flag", "two words", ""]
    assert report["package"] == "launched"
    assert report["imports torch"] is False


def test_allocator_settings_of_the_user_are_kept(tmp_path: Path) -> None:
    report, starts = start_script(tmp_path, GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert len(starts) == 1
    assert report["tunables"] == "glibc.malloc.arena_max=2"


@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("-1", 2)])
def test_only_visible_gpus_keep_the_allocator(tmp_path: Path, visible: str, count: int) -> None:
    _, starts = start_script(tmp_path, PRETEND_GPU="1", CUDA_VISIBLE_DEVICES=visible)
    assert len(starts) == count
