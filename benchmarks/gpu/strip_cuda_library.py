"""Keeps the code of one architecture in a CUDA library, so that it compresses well.

    python benchmarks/gpu/strip_cuda_library.py libtransformer_engine.so --arch 90 \\
        --output libtransformer_engine.so.xz

A library holds its device code once for each architecture, in fat binaries. Payloads of the others
are zeroed; nothing moves, so that headers, offsets and host code stay as they are. On a GPU of
another architecture the library does not work any more. An output that ends with .xz is compressed.
"""

from __future__ import annotations

import argparse
import lzma
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_tst.common.atomic_files import write_file  # noqa: E402
from megatron_tst.common.errors import UsageError, print_error  # noqa: E402

# A fat binary: magic number, version 1, size of this header, bytes of all entries behind it.
MAGIC = struct.pack("<IH", 0xBA55ED50, 1)
HEADER = struct.Struct("<IHHQ")
# An entry: kind (PTX 1, ELF 2), version, size of this header, bytes of the payload, and further on
# the architecture, 90 for sm_90 and sm_90a.
ENTRY = struct.Struct("<HHIQ12xI")
KINDS = {1: "PTX", 2: "ELF"}


@dataclass(frozen=True)
class Entry:
    """Code for one architecture: where its payload lies in the library."""

    kind: str
    architecture: int
    start: int
    end: int


def entries(library: bytes | bytearray) -> Iterator[Entry]:
    """All entries of all fat binaries of a library.

    Raises:
        UsageError: a fat binary is not laid out as this program knows it.
    """
    place = library.find(MAGIC)
    while place >= 0:
        end = place + len(MAGIC)
        if place + HEADER.size <= len(library):
            _, _, header_size, size = HEADER.unpack_from(library, place)
            # Elsewhere the number is part of host code that compares with it.
            if header_size == HEADER.size:
                end = place + HEADER.size + size
                yield from _entries_between(library, place + HEADER.size, end)
        place = library.find(MAGIC, end)


def _entries_between(library: bytes | bytearray, place: int, end: int) -> Iterator[Entry]:
    if end > len(library):
        raise UsageError(f"a fat binary would end at byte {end}, behind the library's own end")
    while place + ENTRY.size <= end:
        kind, _, header_size, size, architecture = ENTRY.unpack_from(library, place)
        start = place + header_size
        if kind not in KINDS or header_size < ENTRY.size or start + size > end:
            raise UsageError(
                f"the library has an unknown entry at byte {place}: kind {kind}, header of "
                f"{header_size} bytes, payload of {size}; nothing was written"
            )
        yield Entry(KINDS[kind], architecture, start, start + size)
        place = start + size


def strip(library: bytearray, architecture: int) -> Counter[tuple[str, int]]:
    """Zeroes all code that is not for an architecture.

    Args:
        library: changed in place.
        architecture: such as 90. Its PTX goes too: the code itself is there.

    Returns:
        Bytes of the code that there was, by kind and architecture.

    Raises:
        UsageError: there is no code for this architecture, or an entry of unknown form.
    """
    found = list(entries(library))
    kept = ("ELF", architecture)
    sizes: Counter[tuple[str, int]] = Counter()
    for entry in found:
        sizes[entry.kind, entry.architecture] += entry.end - entry.start
    if kept not in sizes:
        there = sorted({number for kind, number in sizes if kind == "ELF"})
        raise UsageError(f"--arch {architecture}: the library has code for {there or 'none'}")
    for entry in found:
        if (entry.kind, entry.architecture) != kept:
            library[entry.start : entry.end] = bytes(entry.end - entry.start)
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Strips a library, prints what was in it and how large it is after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--arch", type=int, required=True, help="to keep: 90 for H100 and H200")
    parser.add_argument("--output", type=Path, required=True, help=".xz: compressed")
    options = parser.parse_args(argv)
    try:
        library = bytearray(options.library.read_bytes())
        sizes = strip(library, options.arch)
    except (UsageError, OSError) as error:
        print_error(error)
        return 2
    is_compressed = options.output.suffix == ".xz"
    content = lzma.compress(library) if is_compressed else bytes(library)
    write_file(options.output, content)
    for (kind, architecture), size in sorted(sizes.items()):
        print(f"{kind} of sm_{architecture}: {size / 1e6:.1f} MB")
    print(f"{options.output}: {len(content) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
