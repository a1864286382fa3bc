"""Writes safetensors files a weight at a time.

The library's own writer takes all weights of a file at once, and copies them. The format is a
length of eight bytes, a JSON header of that length, and the weights one after the other:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from megatron_tst.common.errors import UsageError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names in the header of a file."""
_ALIGNMENT = 8
_INDEX_FILE = "model.safetensors.index.json"
WRITTEN = re.compile(rf"model(-\d{{5,}}-of-\d{{5,}})?\.safetensors|{re.escape(_INDEX_FILE)}")
"""Names of all files that are written."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class PlannedWeight:
    """A weight to be written.

    Attributes:
        size: shape of the weight.
        dtype: in the file.
    """

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.size)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.elements * self.dtype.itemsize


class SafetensorsWriter:
    """One safetensors file, or several with an index, of the names that transformers looks for.

    Args:
        weights: every weight by name; files take them in this order.
        max_shard_size: largest size of a file, such as "5GB"; a larger weight has its own file.

    Raises:
        UsageError: ``max_shard_size`` is no size, or a dtype is none of a model.
    """

    def __init__(self, weights: Mapping[str, PlannedWeight], max_shard_size: str) -> None:
        for name, weight in weights.items():
            if weight.dtype not in DTYPES:
                raise UsageError(f"{name} is of {weight.dtype}: pass --dtype bfloat16 or float32.")
        split = split_state_dict_into_shards_factory(
            dict(weights),
            get_storage_size=lambda weight: weight.bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=_parse_size(max_shard_size),
        )
        self._weights = weights
        self._file_of = split.tensor_to_filename
        self._headers: dict[str, bytes] = {}
        self._offsets: dict[str, int] = {}
        for file, names in split.filename_to_tensors.items():
            self._place(file, names)
        self._folder: Path | None = None
        self._left: set[str] = set(weights)

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        headers = sum(len(header) for header in self._headers.values())
        return headers + len(self._index()) + sum(weight.bytes for weight in self._weights.values())

    def start(self, folder: Path) -> None:
        """Creates the files."""
        self._folder = folder
        for file, header in self._headers.items():
            (folder / file).write_bytes(header)

    def write(self, name: str, weight: Tensor) -> None:
        """Writes one weight, of any dtype, in the dtype that was planned."""
        assert self._folder is not None
        planned = self._weights[name]
        assert weight.shape == planned.size
        data = weight.to(planned.dtype).contiguous().view(torch.uint8).flatten().numpy()
        with (self._folder / self._file_of[name]).open("r+b") as file:
            file.seek(self._offsets[name])
            file.write(memoryview(data))
        self._left.remove(name)

    def finish(self) -> None:
        """Writes the index, if there are several files. All weights must have been written."""
        assert self._folder is not None
        assert not self._left, self._left
        if index := self._index():
            (self._folder / _INDEX_FILE).write_bytes(index)

    def _place(self, file: str, names: list[str]) -> None:
        """Lays out one file."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            weight = self._weights[name]
            start, end = end, end + weight.bytes
            entries[name] = {
                "dtype": DTYPES[weight.dtype],
                "shape": list(weight.size),
                "data_offsets": [start, end],
            }
            self._offsets[name] = start
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._headers[file] = len(text).to_bytes(8, "little") + text
        for name in names:
            self._offsets[name] += len(self._headers[file])

    def _index(self) -> bytes:
        if len(self._headers) == 1:
            return b""
        total = sum(weight.bytes for weight in self._weights.values())
        content = {"metadata": {"total_size": total}, "weight_map": self._file_of}
        return json.dumps(content, indent=2).encode() + b"\n"


def _parse_size(text: str) -> int:
    """Bytes, of a size such as "5GB"."""
    # The library's own takes sizes of zero, of less, and without end.
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not size:
        raise UsageError(f"--max-shard-size {text} is no size: pass one such as 500MB or 5GB.")
    return size
