"""Reads safetensors files a weight at a time, into memory of its own.

The library maps a whole file into memory, which counts as memory of the process for as long as the
file is open, and takes a header of thousands of weights apart whenever it is opened again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tst.checkpoint.safetensors_writer import DTYPES
from megatron_tst.common.errors import UsageError

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight lies.

    Attributes:
        file: the safetensors file.
        offset: of its first byte in the file.
        size: shape of the weight.
        dtype: in the file.
    """

    file: Path
    offset: int
    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.size)

    def read(self) -> Tensor:
        """The weight, contiguous, on the CPU."""
        data = torch.empty(self.elements * self.dtype.itemsize, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            read = file.readinto(memoryview(data.numpy()))
        assert read == len(data)
        return data.view(self.dtype).view(self.size)


def stored_weights(files: Sequence[Path]) -> dict[str, StoredWeight]:
    """Every weight of some files by name; reads their headers only.

    Raises:
        UsageError: naming a file that is damaged, or a weight that no model has in this form.
    """
    weights: dict[str, StoredWeight] = {}
    for file in files:
        for name, weight in _weights_of(file).items():
            if name in weights:
                raise UsageError(
                    f"{name} is in both {weights[name].file} and {file}: the folder mixes two "
                    "models, copy it again."
                )
            weights[name] = weight
    return weights


def _weights_of(file: Path) -> dict[str, StoredWeight]:
    try:
        # Compares the header with itself and with the size of the file.
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise UsageError(f"{file} cannot be read ({error}): copy it again.") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        header = json.loads(stream.read(length))
    weights = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise UsageError(
                f"{name} in {file} is of dtype {entry['dtype']}: quantized weights cannot be "
                f"trained on, use a folder of {', '.join(sorted(_DTYPES))}."
            )
        offset = _LENGTH_BYTES + length + entry["data_offsets"][0]
        size = tuple(entry["shape"])
        weights[name] = StoredWeight(file, offset, size, _DTYPES[entry["dtype"]])
    return weights
