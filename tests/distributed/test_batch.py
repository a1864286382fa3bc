"""Batches of bags on every rank that needs them: the right part, sent once."""

from __future__ import annotations

from argparse import Namespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.harness import run_distributed

BATCH, LENGTH, BAG_SIZE = 2, 8, 3
INT64, FLOAT32 = 8, 4


def draw_sample(variant: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("tokens", "labels"), (BATCH, LENGTH))
    for name, superposed in (("tokens", "output-only"), ("labels", "input-only")):
        if variant != superposed:
            shapes[name] = (BATCH, LENGTH, BAG_SIZE)
    drawn = {n: torch.randint(99, shape, generator=generator) for n, shape in shapes.items()}
    positions = torch.arange(LENGTH).expand(BATCH, -1).contiguous()
    mask = torch.randint(2, (BATCH, LENGTH), generator=generator).float()
    return {**drawn, "position_ids": positions, "loss_mask": mask}


def get_batch_on_ranks(variant: str, sizes: dict[str, int]) -> tuple[dict[str, Any], list[int]]:
    """The batch of this rank and the bytes of the broadcasts that it took part in."""
    from megatron.core import parallel_state

    from megatron_tst.data.batch import get_batch
    from megatron_tst.settings.phases import Phase
    from megatron_tst.settings.variants import VARIANTS

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **sizes)
    args = Namespace(
        micro_batch_size=BATCH,
        seq_length=LENGTH,
        context_parallel_size=sizes.get("context_parallel_size", 1),
        create_attention_mask_in_dataloader=False,
        dataloader_inter_document_masking=False,
        mtp_num_layers=None,
    )
    phase = Phase(0, 0, BAG_SIZE, VARIANTS[variant])
    has_loader = parallel_state.get_tensor_model_parallel_rank() == 0
    sent: list[int] = []
    broadcast = torch.distributed.broadcast

    def record(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return broadcast(tensor, *args, **kwargs)

    try:
        with mock.patch.object(torch.distributed, "broadcast", record):
            samples = iter([draw_sample(variant)]) if has_loader else None
            batch = get_batch(samples, args, phase)
    finally:
        parallel_state.destroy_model_parallel()
    return batch, sent


def zig_zag(tensor: Tensor, rank: int, cp: int) -> Tensor:
    chunks = tensor.chunk(2 * cp, dim=1)
    return torch.cat((chunks[rank], chunks[2 * cp - 1 - rank]), dim=1)


@pytest.mark.parametrize("variant", ["full", "input-only", "output-only"])
@pytest.mark.parametrize("cp", [1, 2])
def test_context_parallel_ranks_broadcast_their_own_positions(variant: str, cp: int) -> None:
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": cp}
    sample = draw_sample(variant)
    # Ranks are numbered tensor-parallel first.
    for rank, (batch, sent) in enumerate(
        run_distributed(2 * cp, get_batch_on_ranks, variant, sizes, cpu_platform=True)
    ):
        expected = {name: zig_zag(whole, rank // 2, cp) for name, whole in sample.items()}
        for name, wanted in expected.items():
            assert torch.equal(batch[name], wanted), name
        assert sorted(sent) == sorted(wanted.nbytes for wanted in expected.values())
        assert batch["attention_mask"] is None


def test_pipeline_stages_get_only_what_they_need() -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    sample = draw_sample("full")
    positions = BATCH * LENGTH
    needed = {
        0: {"tokens": positions * BAG_SIZE * INT64, "position_ids": positions * INT64},
        1: {"labels": positions * BAG_SIZE * INT64, "loss_mask": positions * FLOAT32},
    }
    for rank, (batch, sent) in enumerate(
        run_distributed(4, get_batch_on_ranks, "full", sizes, cpu_platform=True)
    ):
        names = needed[rank // 2]
        assert {name for name, part in batch.items() if part is not None} == names.keys()
        assert all(torch.equal(batch[name], sample[name]) for name in names)
        assert sorted(sent) == sorted(names.values())


def test_without_tensor_parallelism_nothing_is_sent() -> None:
    sizes = {"context_parallel_size": 2}
    for _, sent in run_distributed(2, get_batch_on_ranks, "full", sizes, cpu_platform=True):
        assert sent == []


WAITING = (
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
)


class WaitsForDevice(TorchDispatchMode):
    """Counts reads of what ``Tensor.cuda`` gave, on a machine where that gives memory of the CPU.

    On a GPU each waits for all that is queued: numbers, and shapes that depend on numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._kept: list[Tensor] = []

    def to_device(self, tensor: Tensor) -> Tensor:
        self._kept.append(copy := tensor.clone())
        return copy

    def _is_on_device(self, tensor: Any) -> bool:
        storages = {kept.untyped_storage().data_ptr() for kept in self._kept}
        return isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in storages

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = operator(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        if any(map(self._is_on_device, leaves)):
            name = operator.overloadpacket.__name__
            if name in WAITING:
                self.waits.append(name)
            # Kept, so that no other tensor gets its memory.
            self._kept += [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        return result


def packed_on_a_rank(pattern: str | None) -> Any:
    from megatron.core import parallel_state

    from megatron_tst.data.batch import get_batch, packed_documents
    from megatron_tst.settings.phases import Phase

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    args = Namespace(
        micro_batch_size=BATCH,
        seq_length=LENGTH,
        context_parallel_size=1,
        create_attention_mask_in_dataloader=False,
        dataloader_inter_document_masking=True,
        hybrid_layer_pattern=pattern,
        mtp_num_layers=None,
    )
    # Documents of 3 and 5 positions in the first sample, of 8 in the second.
    cu_seqlens = torch.full((BATCH, LENGTH + 1), LENGTH, dtype=torch.int32)
    cu_seqlens[:, 0], cu_seqlens[0, 1] = 0, 3
    documents = {"cu_seqlens": cu_seqlens, "max_seqlen": torch.tensor([5, 8], dtype=torch.int32)}
    phase = Phase(0, 0, BAG_SIZE, aligns_documents=True)
    try:
        counter = WaitsForDevice()
        copies = mock.patch.object(Tensor, "cuda", lambda host, **_: counter.to_device(host))
        with counter, copies:
            batch = get_batch(iter([draw_sample("full") | documents]), args, phase)
            return batch, packed_documents(batch, args), counter.waits
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("pattern", [None, "*-M-"])
def test_samples_with_documents_become_one_sequence(pattern: str | None) -> None:
    sample = draw_sample("full")
    ((batch, packed, waits),) = run_distributed(1, packed_on_a_rank, pattern, cpu_platform=True)
    # The host's own, for state-space layers.
    assert waits == ([] if pattern is None else ["repeat_interleave"])
    for name, tensor in sample.items():
        assert torch.equal(batch[name], tensor.flatten(0, 1)[None]), name
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 8, 16]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 8
    assert packed.tokens_per_sample == LENGTH
    # State-space layers start anew where this changes.
    expected = None if pattern is None else [[0] * 3 + [1] * 5 + [2] * 8]
    assert (packed.seq_idx if pattern is None else packed.seq_idx.tolist()) == expected
