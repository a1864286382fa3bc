"""A stripped CUDA library keeps the code of one architecture where it was, and nothing else."""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu.strip_cuda_library import ENTRY, HEADER, MAGIC, entries, main

PTX, ELF = 1, 2
KERNEL = ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry kernel() { ret; }\n"


def fat_binary(*codes: tuple[int, int, bytes]) -> bytes:
    """Kind, architecture and payload of each entry; as nvcc lays them out."""
    content = b""
    for kind, architecture, code in codes:
        code += bytes(-len(code) % 8)
        head = ENTRY.pack(kind, 0x101, 64, len(code), architecture)
        # Width of addresses, and that the host is Linux.
        head += struct.pack("<IIQ", 64, 0, 0x11)
        content += head + bytes(64 - len(head)) + code
    return MAGIC + struct.pack("<HQ", HEADER.size, len(content)) + content


def library(*fat_binaries: bytes) -> bytes:
    # Host code compares with the magic number, too.
    return b"\x7fELF host code " + MAGIC + b"\x90\x90 more of it" + b"\0data\0".join(fat_binaries)


def test_all_code_but_that_of_one_architecture_is_zeroed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fat_binary((ELF, 90, b"a" * 40), (ELF, 100, b"b" * 24), (PTX, 90, b"c" * 16))
    second = fat_binary((ELF, 80, b"d" * 8), (ELF, 90, b"e" * 8))
    source, target = tmp_path / "lib.so", tmp_path / "stripped.so.xz"
    source.write_bytes(library(first, second))
    assert main([str(source), "--arch", "90", "--output", str(target)]) == 0
    stripped = lzma.decompress(target.read_bytes())
    expected = source.read_bytes()
    for code in (b"b" * 24, b"c" * 16, b"d" * 8):
        expected = expected.replace(code, bytes(len(code)))
    assert stripped == expected
    assert "ELF of sm_100: 0.0 MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (library(fat_binary((ELF, 80, b"d" * 8))), r"--arch 90: .* code for \[80\]"),
        (b"no CUDA in it", "--arch 90: the library has code for none"),
        (library(fat_binary((7, 90, b"d" * 8))), "unknown entry at byte .*: kind 7"),
        (library(fat_binary((ELF, 90, b"d" * 80)))[:-1], "end at byte .*, behind the library"),
    ],
)
def test_what_cannot_be_stripped_is_refused_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    source, target = tmp_path / "lib.so", tmp_path / "stripped.so"
    source.write_bytes(content)
    assert main([str(source), "--arch", "90", "--output", str(target)]) == 2
    assert not target.exists()
    assert re.search(message, capsys.readouterr().err)


def test_nvidias_own_tool_reads_these_fat_binaries(tmp_path: Path) -> None:
    """So that the layout is not only what this test thinks it is."""
    if find_spec("triton") is None:
        pytest.skip("needs Triton")
    import triton

    programs = Path(triton.__file__).parent / "backends/nvidia/bin"
    (tmp_path / "kernel.ptx").write_text(KERNEL)
    codes = []
    for architecture in (90, 100):
        cubin = tmp_path / f"{architecture}.cubin"
        program = programs / ("ptxas-blackwell" if architecture == 100 else "ptxas")
        arch = f"-arch=sm_{architecture}"
        subprocess.run([program, arch, tmp_path / "kernel.ptx", "-o", cubin], check=True)
        codes.append((ELF, architecture, cubin.read_bytes()))
    source, target = tmp_path / "lib.fatbin", tmp_path / "stripped.fatbin"
    source.write_bytes(fat_binary(*codes))
    assert [entry.architecture for entry in entries(source.read_bytes())] == [90, 100]
    assert main([str(source), "--arch", "90", "--output", str(target)]) == 0
    listed = [
        subprocess.run(
            [programs / "cuobjdump", "-lelf", path], capture_output=True, text=True, check=False
        ).stdout
        for path in (source, target)
    ]
    assert re.findall(r"sm_\d+", listed[0]) == ["sm_90", "sm_100"]
    assert re.findall(r"sm_\d+", listed[1]) == ["sm_90"]
