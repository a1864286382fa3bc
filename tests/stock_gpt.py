"""A plain Megatron pre-training script: nothing of this project but the CPU platform."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import flatten_batch_for_packed_sequences
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_tst.cpu.arguments import set_cpu_defaults


def _datasets(num_samples: Any, vp_stage: int | None = None) -> Any:
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    is_built = partial(lambda: mpu.get_tensor_model_parallel_rank() == 0)
    return BlendedMegatronDatasetBuilder(GPTDataset, num_samples, is_built, config).build()


def _loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
    total = (losses.view(-1).float() * loss_mask.view(-1).float()).sum()
    count = loss_mask.sum().clone().detach().to(torch.int)
    report = torch.cat([total.clone().detach().view(1), count.view(1)])
    return total, count, {"lm loss": report}


def _forward_step(data_iterator: Any, model: Any) -> Any:
    batch = flatten_batch_for_packed_sequences(next(data_iterator))
    documents = None
    if "cu_seqlens" in batch:
        cu_seqlens, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"])
        documents = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            tokens_per_sample=get_args().seq_length,
        )
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=documents,
    )
    return losses, partial(_loss, batch["loss_mask"])


def main() -> int:
    """Trains as the command line says."""
    _datasets.is_distributed = True  # type: ignore[attr-defined]
    args = parse_and_validate_args(extra_args_provider=set_cpu_defaults)
    # The second is Megatron's pretrain_hybrid.py.
    make = hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args
    config = pretrain_cfg_container_from_args(args, make(args))
    pretrain(config, _datasets, ModelType.encoder_or_decoder, _forward_step)
    return 0
