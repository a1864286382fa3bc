"""A micro-batch of bags on every rank that needs it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_tst.settings.phases import Phase

_DOCUMENT_KEYS = ("cu_seqlens", "max_seqlen")
_POSITION_KEYS = ("tokens", "position_ids", "labels", "loss_mask")
BATCH_KEYS = (*_POSITION_KEYS, "attention_mask", *_DOCUMENT_KEYS)
Batch = dict[str, Tensor | None]


def get_batch(
    data_iterator: Iterator[dict[str, Tensor]] | None,
    args: Namespace,
    phase: Phase | None,
    vp_stage: int | None = None,
) -> Batch:
    """Reads a micro-batch and brings to this rank the parts that its pipeline stage needs.

    Args:
        data_iterator: yields collated samples; None on ranks that have no data loader.
        args: Megatron's arguments.
        phase: of the step; None for validation, whose batches are plain.
        vp_stage: virtual pipeline stage.

    Returns:
        The entries of ``BATCH_KEYS``, None where this stage needs none. tokens [b, l/cp] or
        [b, l/cp, s]; labels [b, l/cp] or [b, l/cp, s]; loss_mask and position_ids [b, l/cp].
        With inter-document masking the samples of a micro-batch become one packed sequence, so that
        b is 1 and l is the sum of theirs; every stage gets cu_seqlens, [1, documents + 1], int32 in
        latent positions, and max_seqlen, [samples], int32 in latent positions and in the memory of
        the host where the loader is: reading it waits for nothing.
        Collectives: one broadcast an entry within the tensor-parallel group.
    """
    if not reads_data_on_stage(args, vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    batch: Batch = dict.fromkeys(BATCH_KEYS)
    on_host: Batch | None = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        on_host = {key: sample.get(key) for key in BATCH_KEYS}
        batch = {
            key: None if tensor is None else tensor.cuda(non_blocking=True)
            for key, tensor in on_host.items()
        }
    if phase is None or not phase.is_superposed:
        batch = _on_this_cp_rank(_plain_batch_on_this_tp_rank(batch, args))
    else:
        # Bags are s times as large: a context-parallel rank broadcasts its own positions only.
        batch = _bags_on_this_tp_rank(_on_this_cp_rank(batch), args, phase)
    return batch if batch["cu_seqlens"] is None else _packed(batch, on_host or batch)


def reads_data_on_stage(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this pipeline stage needs a part of the batch."""
    # Attention needs the boundaries of documents in every layer.
    return args.dataloader_inter_document_masking or is_first_or_last_pipeline_stage(vp_stage)


def _predicts_several(args: Namespace) -> bool:
    """Whether this pipeline stage embeds tokens to predict those behind them."""
    return bool(args.mtp_num_layers) and mpu.is_pipeline_last_stage()


def packed_documents(batch: Batch, args: Namespace) -> PackedSeqParams | None:
    """What the layers have to know of the documents of a packed batch; None of any other.

    Args:
        batch: from ``get_batch``.
        args: Megatron's arguments.
    """
    if batch["cu_seqlens"] is None:
        return None
    assert batch["max_seqlen"] is not None
    cu_seqlens, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"].max())
    total = len(batch["max_seqlen"]) * args.seq_length
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        # Lets layers that look at samples, such as a router's balance, tell them apart.
        tokens_per_sample=args.seq_length,
        # Attention takes cu_seqlens; state-space layers need the document of each position.
        total_tokens=total if args.hybrid_layer_pattern is not None else None,
    )


def _packed(batch: Batch, source: Batch) -> Batch:
    """Makes one packed sequence of the samples of a micro-batch.

    Args:
        batch: of this rank.
        source: what holds the documents. How many there are is the shape of ``cu_seqlens``, so that
            a rank waits for the GPU unless it has them in the memory of the host.
    """
    # Upstream's function would flatten the bags as well.
    merged = flatten_batch_for_packed_sequences({**source, "tokens": None, "labels": None})
    packed: Batch = {
        key: None if tensor is None else tensor.flatten(0, 1).unsqueeze(0)
        for key, tensor in batch.items()
        if key in _POSITION_KEYS
    }
    packed["attention_mask"] = batch["attention_mask"]
    packed["cu_seqlens"] = merged["cu_seqlens"].cuda(non_blocking=True)
    packed["max_seqlen"] = source["max_seqlen"]
    return packed


def _on_this_cp_rank(batch: Batch) -> Batch:
    """Upstream's zig-zag slice of the latent positions, dimension 1 in both phases."""
    sliced = get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=True,
    )
    return {key: sliced[key] for key in BATCH_KEYS}


def _plain_batch_on_this_tp_rank(batch: Batch, args: Namespace) -> Batch:
    """Upstream's broadcast, for batches that are exactly upstream's."""
    absent_in_pretraining: dict[str, Any] = dict.fromkeys(
        ("cu_seqlens_padded", "local_cp_size", "hybrid_cp_group")
    )
    micro_batch_size = args.micro_batch_size
    if not torch.is_grad_enabled():
        micro_batch_size = args.eval_micro_batch_size
    result: Batch = get_batch_on_this_tp_rank(
        {**batch, **absent_in_pretraining},
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=args.dataloader_inter_document_masking,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_predicts_several(args),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return result


def _bags_on_this_tp_rank(batch: Batch, args: Namespace, phase: Phase) -> Batch:
    """Broadcasts bags; receivers know the shapes from the phase, so none is sent."""
    local_length = args.seq_length // args.context_parallel_size
    positions = (args.micro_batch_size, local_length)
    bags = (*positions, phase.bag_size)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if mpu.is_pipeline_first_stage() or _predicts_several(args):
        expected["tokens"] = (bags if phase.reads_bags else positions, torch.int64)
        expected["position_ids"] = (positions, torch.int64)
    if mpu.is_pipeline_last_stage():
        expected["labels"] = (bags if phase.predicts_bags else positions, torch.int64)
        expected["loss_mask"] = (positions, torch.float32)
    if args.create_attention_mask_in_dataloader:
        mask_shape = (args.micro_batch_size, 1, local_length, args.seq_length)
        expected["attention_mask"] = (mask_shape, torch.bool)
    if args.dataloader_inter_document_masking:
        expected["cu_seqlens"] = ((args.micro_batch_size, args.seq_length + 1), torch.int32)
        expected["max_seqlen"] = ((args.micro_batch_size,), torch.int32)
    result: Batch = dict.fromkeys(BATCH_KEYS)
    for key, (shape, dtype) in expected.items():
        result[key] = _broadcast(batch[key], shape, dtype)
    return result


def _broadcast(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    group = mpu.get_tensor_model_parallel_group()
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert tensor is not None
        assert tuple(tensor.shape) == shape, (tuple(tensor.shape), shape)
        tensor = tensor.contiguous()
    else:
        tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    if group.size() > 1:
        torch.distributed.broadcast(tensor, mpu.get_tensor_model_parallel_src_rank(), group=group)
    return tensor
