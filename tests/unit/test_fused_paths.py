"""What a run on GPUs says where Transformer Engine or apex is missing."""

from __future__ import annotations

import argparse

import pytest

from megatron_tst.training.fused_paths import lost_fused_paths, refuse_missing_kernels

ALL = {"transformer_engine", "apex", "fused_weight_gradient_mlp_cuda"}


def arguments(
    implementation: str = "transformer_engine", fusion: bool = True, sharded: bool = False
) -> argparse.Namespace:
    return argparse.Namespace(
        transformer_impl=implementation,
        gradient_accumulation_fusion=fusion,
        use_distributed_optimizer=sharded,
        save="runs/a",
    )


def test_nothing_is_lost_in_a_container_that_has_both() -> None:
    refuse_missing_kernels(arguments(), ALL)
    assert lost_fused_paths(arguments(), ALL) == []


@pytest.mark.parametrize(
    ("args", "installed", "message"),
    [
        (arguments(), ALL - {"transformer_engine"}, "--transformer-impl transformer_engine needs"),
        (arguments(), {"transformer_engine"}, "add --no-gradient-accumulation-fusion"),
        (arguments("local"), {"transformer_engine", "apex"}, "fused_weight_gradient_mlp_cuda"),
        (arguments("local", False, True), set(), "--use-distributed-optimizer with --save runs/a"),
    ],
)
def test_what_megatron_would_fail_over_is_refused(
    args: argparse.Namespace, installed: set[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_missing_kernels(args, installed)


@pytest.mark.parametrize(
    ("args", "installed", "starts"),
    [
        (arguments(fusion=False), {"transformer_engine"}, ["accumulation"]),
        (arguments("local", sharded=True), ALL - {"apex"}, ["norms"]),
        (arguments("local", False), set(), ["optimizer", "attention", "norms", "accumulation"]),
    ],
)
def test_each_lost_path_is_named(
    args: argparse.Namespace, installed: set[str], starts: list[str]
) -> None:
    refuse_missing_kernels(args, installed)
    assert [line.split()[0].rstrip(",") for line in lost_fused_paths(args, installed)] == starts
