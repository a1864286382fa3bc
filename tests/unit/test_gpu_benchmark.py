"""The GPU benchmark's contestants run, and its paper figures follow from the kernels."""

from __future__ import annotations

import pytest

from benchmarks.roofline import BLOCK_ELEMENTS, GPUS, Cost, Model, loss_costs
from megatron_tst.ops import linear_cross_entropy
from tests.kernel_devices import Runner


def run_contestants(device: str) -> None:
    from benchmarks.gpu_kernels import operations

    model = Model(hidden=24, vocabulary=300, matrix_parameters=1e3, bag_size=3)
    seen = []
    for operation, bag_size, contestants, costs in operations(model, 8, device):
        for name, step in contestants:
            if name != "Megatron, vocabulary-parallel":  # needs a process group
                step()
            assert name in costs or name == "torch"
            seen.append((operation, bag_size, name))
    assert len(seen) == len(set(seen)) == 4 + 5 + 4 + 2


def test_contestants_run(on_device: Runner) -> None:
    on_device(run_contestants)


def test_the_kernels_move_each_logit_three_times_whatever_the_bag() -> None:
    n, v = 1024, 128256
    costs = [loss_costs(n, v, s)["Triton"].bytes_moved for s in (1, 16)]
    assert costs[0] == pytest.approx(3 * 2 * n * v, rel=1e-3)
    assert costs[1] == pytest.approx(costs[0], rel=2e-3)
    assert linear_cross_entropy._BLOCK_ELEMENTS_GPU == BLOCK_ELEMENTS


def test_the_least_time_adds_kernels_and_takes_the_slower_side_of_products() -> None:
    gpu = GPUS[0]
    second = {"bytes": gpu.bytes_per_second, "flops": gpu.flops_per_second}
    cost = Cost(second["bytes"], flops=3 * second["flops"], product_bytes=2 * second["bytes"])
    assert cost.seconds(gpu) == pytest.approx(4)
    memory_bound = Cost(0, flops=second["flops"], product_bytes=2 * second["bytes"])
    assert memory_bound.seconds(gpu) == pytest.approx(2)
