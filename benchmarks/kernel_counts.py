"""Count the instructions and bytes that a logit costs in the Triton kernels, without a GPU.

    python benchmarks/kernel_counts.py [--json counts.json]

Compiles the kernels of the loss for Hopper and Blackwell and reads the machine code of their main
loop: instructions and exponentials for 32 logits of a thread, and the bytes of a logit that it
reads and writes. For bfloat16 rows of 128256 columns, and of 65536 for the kernel that holds a row:
it has no loop, and all of its instructions count. Exits with 1 above the bars.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.kernel_resources import Resources, compile_for, specialisations
from megatron_tst.common.atomic_files import write_json
from megatron_tst.ops.kernels.launch import is_interpreted

CAPABILITIES = (90, 100, 103)
VOCABULARY = 128256
# Instructions for 32 logits of a thread: kernel, architecture.
BARS = {
    ("statistics_kernel", "sm_90a"): 265,
    ("statistics_kernel", "sm_100a"): 240,
    ("statistics_kernel", "sm_103a"): 240,
    ("gradient_kernel", "sm_90a"): 205,
    ("gradient_kernel", "sm_100a"): 205,
    ("gradient_kernel", "sm_103a"): 205,
    ("replace_kernel", "sm_90a"): 520,
    ("replace_kernel", "sm_100a"): 510,
    ("replace_kernel", "sm_103a"): 510,
}


@dataclass(frozen=True)
class Counts:
    """What the logits of a kernel cost, for 32 logits of a thread or for one logit."""

    kernel: str
    architecture: str
    instructions: float
    exponentials: float
    bytes_read: float
    bytes_written: float
    registers: int
    spill_bytes: int

    @property
    def is_within_bar(self) -> bool:
        bar = BARS[self.kernel, self.architecture]
        return self.instructions <= bar and self.spill_bytes == 0


def counts(capabilities: Sequence[int] = CAPABILITIES) -> Iterator[Counts]:
    """Compile the kernels of the loss and count."""
    for each in specialisations([16], [VOCABULARY], [torch.bfloat16]):
        if f"{each.kernel.__name__}".strip("_") in {kernel for kernel, _ in BARS}:
            for capability in capabilities:
                resources, code = compile_for(each, capability)
                sass = disassemble(code["cubin"])
                if sass is None:
                    print(
                        f"{resources.architecture}: this cuobjdump cannot read it", file=sys.stderr
                    )
                else:
                    yield count(resources, sass, torch.bfloat16.itemsize)


def disassemble(cubin: bytes) -> str | None:
    """Addresses and instructions, a line each, by the cuobjdump that Triton brings.

    ``None`` where it does not know the architecture: that of Triton 3.6 does not know sm_103a.
    """
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True)
    if dump.returncode and "Cannot decode architecture" in dump.stderr:
        return None
    dump.check_returncode()
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", dump.stdout)
    return "\n".join(f"{hex(int(address, 16))} {instruction}" for address, instruction in lines)


def count(resources: Resources, sass: str, item_bytes: int) -> Counts:
    """Counts of the loop that reads the most, or of all, as :func:`disassemble` gives it."""
    loop = max(_loops(sass), key=lambda body: sum("MUFU.EX2" in line for line in body))
    if resources.kernel == "replace_kernel":
        loop = [line.partition(" ")[2] for line in sass.splitlines()]
    # What is read and written for the targets is narrower.
    wide = [line for line in loop if ".128" in line]
    read = _bytes("LDG", wide)
    logits = read / item_bytes
    return Counts(
        resources.kernel,
        resources.architecture,
        instructions=len(loop) * 32 / logits,
        exponentials=sum("MUFU.EX2" in line for line in loop) / logits,
        bytes_read=read / logits,
        bytes_written=_bytes("STG", wide) / logits,
        registers=resources.registers,
        spill_bytes=resources.spill_bytes,
    )


def _loops(sass: str) -> Iterator[list[str]]:
    """Instructions between each label and a jump back to it."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        address, _, instruction = line.partition(" ")
        labels[address] = len(code)
        code.append(instruction)
        jump = re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", instruction)
        if jump and jump[1] in labels:
            yield code[labels[jump[1]] :]


def _bytes(operation: str, code: list[str]) -> int:
    """Bytes a thread that loads or stores of global memory move."""
    total = 0
    for line in code:
        found = re.search(rf"\b{operation}\.E(\S*)", line)
        if found:
            size = re.search(r"\.(?:[US](8|16)|(64|128))\b", found[1])
            total += int(size[1] or size[2]) // 8 if size else 4
    return total


def print_table(rows: Sequence[Counts]) -> None:
    print(
        f"{'kernel':<18} {'arch':<8} {'instructions':>12} {'bar':>5} {'exp2/logit':>10} "
        f"{'read B':>6} {'written B':>9} {'registers':>9} {'spill B':>7}"
    )
    for row in rows:
        print(
            f"{row.kernel:<18} {row.architecture:<8} {row.instructions:>12.0f} "
            f"{BARS[row.kernel, row.architecture]:>5} {row.exponentials:>10.2f} "
            f"{row.bytes_read:>6.1f} {row.bytes_written:>9.1f} {row.registers:>9} "
            f"{row.spill_bytes:>7}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if is_interpreted():
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels are not compiled; unset it.")
    import triton

    rows = list(counts())
    print(
        f"Triton {triton.__version__}, bfloat16, {VOCABULARY} columns (replace_kernel: 65536); "
        "instructions per 32 logits"
    )
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, [asdict(row) for row in rows])
    return int(not all(row.is_within_bar for row in rows))


if __name__ == "__main__":
    sys.exit(main())
