"""What the Triton kernels become on Hopper and Blackwell: compiled by ptxas, without a GPU."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernel_counts import VOCABULARY, count, disassemble
from benchmarks.kernel_resources import CAPABILITIES, Resources, compile_for, specialisations
from megatron_tst.ops.kernels.launch import is_interpreted

ROOT = Path(__file__).resolve().parents[2]
# What ptxas reports, and what it was given and made.
Compiled = list[tuple[Resources, Any]]

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or is_interpreted(), reason="needs Triton, compiling"
)


# The largest bag takes the most; python benchmarks/kernel_resources.py compiles them all.
@pytest.fixture(scope="module", params=CAPABILITIES)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    chosen = specialisations(
        bag_sizes=[16], vocabularies=[128256, 50257], dtypes=[torch.bfloat16, torch.float32]
    )
    # Rows shorter than a block of four reads a thread.
    short = specialisations(bag_sizes=[16], vocabularies=[250], dtypes=[torch.float16])
    return [compile_for(each, request.param) for each in (*chosen, *short)]


def _is_aligned(resources: Resources) -> bool:
    return not {"v=50257", "v=250"} & set(resources.label.split())


def test_kernels_compile_and_do_not_spill(compiled: Compiled) -> None:
    kernels = {resources.kernel for resources, _ in compiled}
    loss = ("statistics", "gradient", "statistics_then_gradient", "replace", "rescale")
    assert kernels == {f"{name}_kernel" for name in (*loss, "mean", "piece", "row")}
    architectures = {resources.architecture for resources, _ in compiled}
    assert len(architectures) == 1
    assert architectures <= {"sm_90a", "sm_100a"}
    for resources, _ in compiled:
        spilled = max(resources.spill_bytes, resources.stack_bytes)
        assert spilled == 0, resources
        assert resources.shared_bytes <= 4096, resources
        # Where rows are aligned, registers leave room for at least half of the threads.
        assert resources.registers <= 64 or not _is_aligned(resources), resources


def test_aligned_rows_are_read_16_bytes_at_once(compiled: Compiled) -> None:
    for resources, code in compiled:
        assert ("ld.global.v4.b32" in code["ptx"]) == _is_aligned(resources), resources


def test_targets_are_read_before_and_written_after_the_row(compiled: Compiled) -> None:
    """In place, another order would read a logit that is overwritten, or lose a target."""
    for resources, code in compiled:
        if resources.kernel == "gradient_kernel":
            steps = re.split(r"bar(?:rier)?\.sync", code["ptx"])
            accesses = [set(re.findall(r"(?:ld|st)\.global", step)) for step in steps]
            assert accesses == [{"ld.global"}, {"ld.global", "st.global"}, {"st.global"}]
        if resources.kernel == "replace_kernel":
            before, row, targets = re.split(r"bar(?:rier)?\.sync", code["ptx"])[-3:]
            assert "st.global" in row
            assert "ld.global" in before
            # Of the row's statistics, not of the row.
            assert "st.global.v4" not in code["ptx"][: code["ptx"].index(row)]
            assert set(re.findall(r"(?:ld|st)\.global", targets)) == {"st.global"}


def test_statistics_exchange_nothing_within_the_loop(compiled: Compiled) -> None:
    for resources, code in compiled:
        if resources.kernel == "statistics_kernel":
            ptx = code["ptx"]
            (label,) = re.findall(r"^(\S+):\s+// (?:%.*\n\s+// )?=>This", ptx, re.MULTILINE)
            loop = ptx[ptx.index(f"{label}:") : ptx.rindex(f"bra \t{label};")]
            assert "ld.global" in loop
            assert "ex2" in loop
            assert not re.search(r"shfl|bar\.sync|shared", loop)


def test_instructions_and_bytes_of_a_logit_stay_within_their_bars(compiled: Compiled) -> None:
    labels = {f"bf16 s<=16 v={columns}" for columns in (VOCABULARY, 65536)}
    counted = [
        count(resources, disassemble(code["cubin"]) or "", torch.bfloat16.itemsize)
        for resources, code in compiled
        if resources.label in labels and resources.kernel != "statistics_then_gradient_kernel"
    ]
    kernels = ["statistics_kernel", "gradient_kernel", "replace_kernel"]
    assert [each.kernel for each in counted] == kernels
    for each in counted:
        assert each.is_within_bar, each
        # One exponential a logit, and in the statistics one more for what a thread reads at once.
        most = 2.2 if each.kernel == "replace_kernel" else 1.05
        assert most - 0.2 <= each.exponentials < most, each
        assert each.bytes_read == 2, each
        assert each.bytes_written == (0 if each.kernel == "statistics_kernel" else 2), each
