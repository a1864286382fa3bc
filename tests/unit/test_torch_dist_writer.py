"""Writing checkpoints in one process, against the reader; Megatron reads them elsewhere."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path, PurePosixPath

import pytest
import torch
from torch.distributed.checkpoint.metadata import StorageMeta

from megatron_tst.checkpoint import torch_dist_writer
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_index import read_index
from megatron_tst.checkpoint.torch_dist_writer import PlannedChunk, write_checkpoint


@pytest.mark.parametrize(("file_bytes", "files"), [(10**9, 1), (200, 3)])
def test_chunks_are_found_in_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int, files: int
) -> None:
    monkeypatch.setattr(torch_dist_writer, "_FILE_BYTES", file_bytes)
    experts, norm = torch.randn(2, 3, 4, 5), torch.randn(7)
    chunks = [
        PlannedChunk(
            "experts", (layer, expert), (4, 5), torch.float32, experts[layer, expert].clone
        )
        for layer in range(2)
        for expert in range(3)
    ]
    chunks.append(PlannedChunk("norm", (), (7,), torch.bfloat16, norm.clone))
    loaded: list[None] = []
    shapes = {"experts": experts.shape, "norm": norm.shape}
    advance = partial(loaded.append, None)
    write_checkpoint(tmp_path / "new", shapes, chunks, {"state/shard_0_1": 3}, advance)
    assert len(loaded) == len(chunks)
    assert len(list((tmp_path / "new").glob("*.distcp"))) == files
    stored = TorchDistCheckpoint(tmp_path / "new")
    assert stored.shapes() == {"experts": (2, 3, 4, 5), "norm": (7,)}
    stored.check_complete(["experts", "norm", "state/shard_0_1"])
    assert torch.equal(stored.read("experts"), experts)
    assert torch.equal(stored.read("experts", (1, 2)), experts[1, 2])
    assert torch.equal(stored.read("norm"), norm.bfloat16())


def test_an_index_of_python_3_13_is_read(tmp_path: Path) -> None:
    norm = torch.randn(7)
    chunk = PlannedChunk("norm", (), (7,), torch.float32, norm.clone)
    write_checkpoint(tmp_path / "new", {"norm": norm.shape}, [chunk], {}, lambda: None)
    index = tmp_path / "new/.metadata"
    content = read_index(index)
    content.storage_meta = StorageMeta(checkpoint_id=PurePosixPath("checkpoint"))
    # Python 3.13 has the classes of paths in another module.
    pickled = pickle.dumps(content, protocol=2).replace(b"cpathlib\n", b"cpathlib._local\n")
    pickled = pickled.replace(b"PurePosixPath", b"PosixPath")
    assert b"cpathlib._local\nPosixPath" in pickled
    index.write_bytes(pickled)
    assert torch.equal(TorchDistCheckpoint(tmp_path / "new").read("norm"), norm)
