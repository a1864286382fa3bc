"""Writes torch_dist checkpoints of any size, as four tensor-parallel ranks save them.

Its files are what ``torch.distributed.checkpoint`` writes. The weights repeat each other.
"""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_tst.checkpoint.hf_mapping import KeyLayout, stored_shapes, weight_slices
from megatron_tst.checkpoint.hf_shapes import ModelShape

SHAPES = {
    "3B": ModelShape(
        layers=36,
        hidden=2048,
        ffn=11008,
        heads=16,
        kv_heads=4,
        head_dim=128,
        vocabulary=128256,
        padded_vocabulary=128256,
        tied=False,
    ),
    "10B-A1B": ModelShape(
        layers=32,
        hidden=1536,
        ffn=512,
        heads=24,
        kv_heads=4,
        head_dim=128,
        vocabulary=151936,
        padded_vocabulary=151936,
        tied=False,
        qk_norm=True,
        experts=128,
    ),
}
"""Published shapes: a dense model, and one with experts (Qwen3-MoE)."""
PARAMETERS = {"3B": 3_337_766_912, "10B-A1B": 10_489_144_832}
RANKS = 4
ITERATION = 100
# Dimension that a rank has a part of, counted from the end.
_SPLIT_DIMENSION = {"linear_proj.weight": -1, "linear_fc2.weight": -1}
_Chunk = tuple[tuple[int, ...], tuple[int, ...]]


def arguments(shape: ModelShape) -> Namespace:
    """The training arguments that an export looks at."""
    return Namespace(
        num_experts=shape.experts or None,
        moe_ffn_hidden_size=shape.ffn,
        moe_router_topk=8,
        moe_aux_loss_coeff=1e-3,
        qk_layernorm=shape.qk_norm,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        group_query_attention=True,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        padded_vocab_size=shape.padded_vocabulary,
        untie_embeddings_and_output_weights=not shape.tied,
        max_position_embeddings=4096,
        layernorm_epsilon=1e-6,
        rotary_base=50_000,
        init_method_std=0.02,
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=RANKS,
    )


def write_checkpoint(folder: Path, shape: ModelShape, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a folder of ``--save`` with one iteration; holds one shard at a time.

    Args:
        folder: to create.
        shape: whose sizes four ranks can share.
        dtype: of the weights.
    """
    iteration = folder / f"iter_{ITERATION:07d}"
    iteration.mkdir(parents=True)
    sizes = stored_shapes(weight_slices(shape, KeyLayout()))
    index = Metadata({}, storage_data={})
    files = [f"__{rank}_0.distcp" for rank in range(RANKS)]
    streams = [(iteration / name).open("wb") for name in files]
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    for key, size in sizes.items():
        chunks = list(_chunks(key, size))
        metadata = [ChunkStorageMetadata(torch.Size(at), torch.Size(of)) for at, of in chunks]
        properties = TensorProperties(dtype=dtype)
        index.state_dict_metadata[key] = TensorStorageMetadata(
            properties, torch.Size(size), metadata
        )
        for number, (offsets, chunk_size) in enumerate(chunks):
            rank = number % RANKS
            start = streams[rank].tell()
            torch.save(_repeated(values, chunk_size), streams[rank])
            length = streams[rank].tell() - start
            position = MetadataIndex(key, offsets)
            index.storage_data[position] = _StorageInfo(files[rank], start, length)
    for stream in streams:
        stream.close()
    torch.save({"args": arguments(shape), "iteration": ITERATION}, iteration / "common.pt")
    (iteration / ".metadata").write_bytes(pickle.dumps(index))
    (iteration / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def save_tokenizer(folder: Path, size: int) -> Path:
    """Writes a Hugging Face tokenizer of so many words."""
    # Here, because the import takes seconds.
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1} | {f"t{i}": i for i in range(2, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t2"))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="t2"
    )
    fast.save_pretrained(folder)
    return folder


def _chunks(key: str, size: tuple[int, ...]) -> Iterator[_Chunk]:
    """Offsets and size of every shard: a layer of a rank, gate and up apart, experts whole."""
    is_expert = ".experts." in key
    stacked = 2 if is_expert else int(key.startswith("decoder.layers."))
    of_layer = size[stacked:]
    leading = (1,) * stacked
    for prefix in product(*map(range, size[:stacked])):
        if "norm" in key:
            yield (*prefix, 0), (*leading, *of_layer)
            continue
        name = ".".join(key.split(".")[-2:])
        dimension = _SPLIT_DIMENSION.get(name, -2) % 2
        parts = (1 if is_expert else RANKS) * (2 if name == "linear_fc1.weight" else 1)
        chunk = list(of_layer)
        chunk[dimension] //= parts
        for part in range(parts):
            offsets = [0, 0]
            offsets[dimension] = part * chunk[dimension]
            yield (*prefix, *offsets), (*leading, *chunk)


def _repeated(values: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    elements = prod(size)
    return values.repeat(-(-elements // len(values)))[:elements].clone().view(size)
