"""Checkpoints as another torch writes them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorProperties

RUNNING = torch.__version__.split("+")[0]
NEWER, OLDER = "9" + RUNNING[1:], "1" + RUNNING[1:]


def record_torch(checkpoint: Path, version: str) -> None:
    """Puts a version, of as many characters, in the place of the one that a checkpoint records."""
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(file.read_bytes().replace(RUNNING.encode(), version.encode()))


def write_as_newer_torch(checkpoint: Path) -> None:
    """Writes an index again as torch 2.15 does: with more values for a tensor than 2.14 takes."""
    index = checkpoint / ".metadata"
    content = pickle.loads(index.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        values = TensorProperties.__getstate__
        patch.setattr(TensorProperties, "__getstate__", lambda self: (*values(self), None, None))
        index.write_bytes(pickle.dumps(content))
