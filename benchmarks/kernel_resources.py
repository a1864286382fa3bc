"""Compile the Triton kernels for Hopper and Blackwell, without a GPU, and show what they take.

    python benchmarks/kernel_resources.py [--bag-sizes 1 2 4 6 8 16] [--json resources.json]

Registers a thread and spilled bytes are what ptxas reports for sm_90a and sm_100a; shared memory is
what a launch asks for. Exits with 1 if a kernel spills.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tst.common.atomic_files import write_json
from megatron_tst.ops.kernels.launch import is_interpreted, next_power_of_2

CAPABILITIES = (90, 100)
BAG_SIZES = (1, 2, 4, 6, 8, 16)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A padded vocabulary, one whose rows are not aligned, and one smaller than a block.
VOCABULARIES = (128256, 50257, 250)
HIDDEN = 4096
_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Specialisation:
    """A kernel with the types of its arguments and the values fixed at compile time."""

    kernel: Any
    label: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]
    num_warps: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Resources:
    """What ptxas made of one specialisation."""

    kernel: str
    label: str
    architecture: str
    num_warps: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def specialisations(
    bag_sizes: Iterable[int],
    vocabularies: Sequence[int] = VOCABULARIES,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Iterator[Specialisation]:
    """Every form in which the kernels are launched for these sizes and dtypes."""
    bag_sizes = sorted(set(bag_sizes))
    for dtype in dtypes:
        for padded_bag in sorted({next_power_of_2(s) for s in bag_sizes}):
            for vocabulary in vocabularies:
                yield from _cross_entropy(dtype, padded_bag, vocabulary)
            yield _whole_rows(dtype, padded_bag)
        yield _rescale(dtype)
        for masked in (False, True):
            for s in bag_sizes:
                yield _bag_mean(dtype, s, masked)
            yield from _bag_mean_backward(dtype, masked)


def compile_for(specialisation: Specialisation, capability: int) -> tuple[Resources, Any]:
    """Compiles afresh, with the ptxas that Triton brings; the resources, and "ptx" and "cubin"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = specialisation.kernel
    source = ASTSource(
        kernel,
        # In the order of the kernel's arguments.
        {name: specialisation.arguments.get(name, "constexpr") for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): v for name, v in specialisation.constants.items()},
        {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name in specialisation.aligned
        },
    )
    # A cached kernel would come without ptxas's report.
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                source,
                target=GPUTarget("cuda", capability, 32),
                options={
                    "num_warps": specialisation.num_warps,
                    "maxnreg": specialisation.max_registers,
                },
            )
    report = log.getvalue()
    resources = Resources(
        kernel=kernel.__name__.strip("_"),
        label=specialisation.label,
        architecture=_numbers(r"for '(sm_\w+)'", report)[0],
        num_warps=specialisation.num_warps,
        registers=int(_numbers(r"Used (\d+) registers", report)[0]),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=sum(map(int, _numbers(r"(\d+) bytes stack frame", report))),
        spill_bytes=sum(map(int, _numbers(r"(\d+) bytes spill", report))),
    )
    return resources, compiled.asm


def _numbers(pattern: str, report: str) -> list[str]:
    found = re.findall(pattern, report)
    if not found:
        raise RuntimeError(f"ptxas reports no {pattern!r}:\n{report}")
    return found


def _cross_entropy(
    dtype: torch.dtype, padded_bag: int, vocabulary: int
) -> Iterator[Specialisation]:
    from megatron_tst.ops.kernels import cross_entropy as kernels

    element, label = _TYPE_NAMES[dtype], f"{_TYPE_NAMES[dtype]} s<={padded_bag} v={vocabulary}"
    depth, width, num_warps = kernels.block_shape(vocabulary, dtype)
    threads = 32 * num_warps
    common = {"logits": f"*{element}", "columns": "*i64", "coefficients": "*fp32"}
    sizes = {"v": "i32", "s": "i32", "row_stride": "i32"}
    divisible = {"v", "row_stride", "out_stride"} if vocabulary % 16 == 0 else set()
    statistics = {"maximum": "*fp32", "sums": "*fp32", "target_logits": "*fp32"}
    yield _specialise(
        kernels._statistics_kernel,
        label,
        common | statistics | sizes,
        {
            "depth": depth,
            "threads": threads,
            "width": width,
            "aligned": vocabulary % 16 == 0,
            "padded_bag": padded_bag,
        },
        divisible,
        num_warps,
    )
    if vocabulary % 16 == 0:
        both = {"scale": "*fp32", "log_sum_exp": "*fp32", "target_logits": "*fp32"}
        yield _specialise(
            kernels._statistics_then_gradient_kernel,
            label,
            common | both | sizes,
            {
                "depth": depth,
                "threads": threads,
                "width": width,
                "aligned": True,
                "padded_bag": padded_bag,
            },
            divisible,
            num_warps,
        )
    gradient = {"log_sum_exp": "*fp32", "scale": "*fp32", "out": f"*{element}"}
    yield _specialise(
        kernels._gradient_kernel,
        label,
        common | gradient | sizes | {"out_stride": "i32"},
        {"block": depth * threads * width, "padded_bag": padded_bag},
        divisible,
        num_warps,
    )


def _whole_rows(dtype: torch.dtype, padded_bag: int) -> Specialisation:
    from megatron_tst.ops.kernels import whole_rows as kernels

    vocabulary = kernels._ROW_BYTES // dtype.itemsize
    depth, width, num_warps = kernels.row_shape(vocabulary, dtype)
    arguments = {"logits": f"*{_TYPE_NAMES[dtype]}", "columns": "*i64", "coefficients": "*fp32"}
    arguments |= dict.fromkeys(("scale", "maximum", "sums", "target_logits"), "*fp32")
    arguments |= {"s": "i32", "row_stride": "i32"}
    constants = {"v": vocabulary, "depth": depth, "threads": 32 * num_warps, "width": width}
    return _specialise(
        kernels._replace_kernel,
        f"{_TYPE_NAMES[dtype]} s<={padded_bag} v={vocabulary}",
        arguments,
        {**constants, "padded_bag": padded_bag, "compiled": True},
        {"row_stride"},
        num_warps,
        kernels._MAX_REGISTERS,
    )


def _rescale(dtype: torch.dtype) -> Specialisation:
    from megatron_tst.ops.kernels import whole_rows as kernels

    arguments = {"gradient": f"*{_TYPE_NAMES[dtype]}", "expected": "*fp32", "scale": "*fp32"}
    return _specialise(
        kernels._rescale_kernel,
        _TYPE_NAMES[dtype],
        arguments | {"v": "i32", "row_stride": "i32"},
        {"block": kernels._RESCALE_BLOCK},
        {"v", "row_stride"},
        8,
    )


def _bag_mean(dtype: torch.dtype, s: int, masked: bool) -> Specialisation:
    from megatron_tst.ops.kernels import bag_embedding as kernels

    element = f"*{_TYPE_NAMES[dtype]}"
    block, num_warps = kernels.block_shape(HIDDEN, dtype)
    arguments = {"weight": element, "rows": "*i64", "absent": "*i1", "divisors": "*fp32"}
    arguments |= {"out": element, "v": "i32", "h": "i32", "weight_stride": "i32"}
    constants = {"s": s, "block": block}
    return _specialise(
        kernels._mean_kernel,
        f"{element[1:]} s={s}{' masked' * masked}",
        *_optional(arguments, constants, ("absent", "divisors"), masked),
        {"v", "h", "weight_stride"},
        num_warps,
    )


def _bag_mean_backward(dtype: torch.dtype, masked: bool) -> Iterator[Specialisation]:
    from megatron_tst.ops.kernels import bag_embedding as kernels

    element = f"*{_TYPE_NAMES[dtype]}"
    label = f"{element[1:]}{' masked' * masked}"
    block, num_warps = kernels.block_shape(HIDDEN, dtype)
    constants = {"piece": kernels._PIECE, "block": block}
    common = {"grad": element, "bags": "*i64", "divisors": "*fp32", "partial": "*fp32"}
    common |= {"h": "i32", "grad_stride": "i32"}
    row = {"sorted_rows": "*i64", "num_rows": "i32", "starts": "*i64", "bag_size": "fp32"}
    for kernel, into, own, fixed in (
        (kernels._piece_kernel, "", {"sorted_rows": "*i64", "num_rows": "i32"}, {}),
        (kernels._row_kernel, "", {**row, "out": element}, {"adds": False}),
        (kernels._row_kernel, " into fp32", {**row, "out": "*fp32"}, {"adds": True}),
    ):
        yield _specialise(
            kernel,
            label + into,
            *_optional(common | own, constants | fixed, ("divisors",), masked),
            {"h", "grad_stride", "num_rows"},
            num_warps,
        )


def _optional(
    arguments: dict[str, str], constants: dict[str, Any], names: Sequence[str], given: bool
) -> tuple[dict[str, str], dict[str, Any]]:
    """Where arguments are not given, Triton fixes them to None."""
    if given:
        return arguments, constants
    kept = {name: kind for name, kind in arguments.items() if name not in names}
    return kept, constants | dict.fromkeys(names)


def _specialise(
    kernel: Any,
    label: str,
    arguments: dict[str, str],
    constants: dict[str, Any],
    divisible: set[str],
    num_warps: int,
    max_registers: int | None = None,
) -> Specialisation:
    """Tensors start at multiples of 16 bytes, as those that torch allocates do."""
    pointers = {name for name, kind in arguments.items() if kind.startswith("*")}
    aligned = frozenset(pointers | (divisible & arguments.keys()))
    return Specialisation(kernel, label, arguments, constants, aligned, num_warps, max_registers)


def print_table(rows: Sequence[Resources]) -> None:
    print(
        f"{'kernel':<18} {'specialisation':<24} {'arch':<8} {'warps':>5} {'registers':>9} "
        f"{'shared B':>8} {'stack B':>7} {'spill B':>7}"
    )
    for row in rows:
        print(
            f"{row.kernel:<18} {row.label:<24} {row.architecture:<8} {row.num_warps:>5} "
            f"{row.registers:>9} {row.shared_bytes:>8} {row.stack_bytes:>7} {row.spill_bytes:>7}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bag-sizes", type=int, nargs="+", default=BAG_SIZES, metavar="S")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if is_interpreted():
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels are not compiled; unset it.")
    rows = [
        compile_for(specialisation, capability)[0]
        for specialisation in specialisations(arguments.bag_sizes)
        for capability in CAPABILITIES
    ]
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, [asdict(row) for row in rows])
    return int(any(row.spill_bytes for row in rows))


if __name__ == "__main__":
    sys.exit(main())
