"""Writes a dense Megatron checkpoint as a Hugging Face Llama model."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from megatron_tst.checkpoint.hf_config import huggingface_config
from megatron_tst.checkpoint.hf_mapping import check_stored_shapes, find_layout, weight_slices
from megatron_tst.checkpoint.hf_shapes import ModelShape, shape_from_arguments
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint, find_checkpoint

DtypeName = Literal["float32", "bfloat16"]
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        checkpoint: folder of the iteration that was read.
        iteration: optimizer steps done.
        shape: sizes of the model.
        parameters: number of weights written.
        warnings: sentences that the user must see.
    """

    checkpoint: Path
    iteration: int
    shape: ModelShape
    parameters: int
    warnings: tuple[str, ...]


def export_to_huggingface(
    checkpoint: Path,
    tokenizer: Path,
    output: Path,
    dtype: DtypeName | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> ExportResult:
    """Exports a torch_dist checkpoint; one process, on the CPU, without a process group.

    Holds one copy of the weights in memory, plus the largest of them.

    Args:
        checkpoint: folder of an iteration, or a folder of ``--save`` (its latest iteration).
        tokenizer: folder of the Hugging Face tokenizer that the model was trained with. Embedding
            rows beyond its size are Megatron's padding and are left out.
        output: folder to write; it appears whole or not at all.
        dtype: dtype of the weights; by default the stored one.
        overwrite: whether an existing ``output`` is replaced.
        max_shard_size: size beyond which the weights are split into several files.

    Raises:
        ValueError: naming what is missing, damaged, or cannot be expressed as a Llama model.
    """
    _check_output(output, overwrite)
    source = TorchDistCheckpoint(find_checkpoint(checkpoint))
    common = source.read_common()
    args, iteration = common["args"], int(common.get("iteration", 0))
    vocabulary, bos_id, eos_id = _read_tokenizer(tokenizer)
    shape = shape_from_arguments(args, vocabulary)
    check_stored_shapes(shape, find_layout(source.shapes()), source.shapes())

    weights = _read_weights(source, shape, dtype)
    stored_dtype = str(weights["model.norm.weight"].dtype).removeprefix("torch.")
    config = huggingface_config(shape, args, stored_dtype, bos_id, eos_id)
    _write(output, config, weights, tokenizer, max_shard_size)
    return ExportResult(
        checkpoint=source.folder,
        iteration=iteration,
        shape=shape,
        parameters=sum(weight.numel() for weight in weights.values()),
        warnings=tuple(_warnings(args, iteration, shape)),
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"--output {output} exists: pass --overwrite to replace it.")
    if not (output / "config.json").is_file():
        raise ValueError(
            f"--output {output} is no exported model (it has no config.json), so --overwrite does "
            "not remove it: name another folder."
        )


def _read_tokenizer(folder: Path) -> tuple[int, int | None, int | None]:
    """Size, beginning-of-sequence id and end-of-sequence id."""
    # Here, because the import takes seconds.
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ValueError(f"--tokenizer {folder} is not a folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--tokenizer {folder} holds no Hugging Face tokenizer ({error}): "
            "pass the folder with its tokenizer.json and tokenizer_config.json."
        ) from error
    return len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id


def _read_weights(
    source: TorchDistCheckpoint, shape: ModelShape, dtype: DtypeName | None
) -> dict[str, Tensor]:
    weights = {}
    for piece in weight_slices(shape, find_layout(source.shapes())):
        stored = source.read_tensor(piece.key)[piece.index]
        target = stored.dtype if dtype is None else getattr(torch, dtype)
        for name, part in piece.split(stored).items():
            # Copied even where the dtype stays: weights that share memory are written as one.
            weights[name] = part.to(target, copy=True, memory_format=torch.contiguous_format)
    return weights


def _write(
    output: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    tokenizer: Path,
    max_shard_size: str,
) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.writing-{os.getpid()}")
    temporary.mkdir()
    try:
        save_torch_state_dict(
            weights, temporary, max_shard_size=max_shard_size, metadata={"format": "pt"}
        )
        special_ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "generation_config.json", special_ids)
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, temporary / name)
        _move_into_place(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _move_into_place(temporary: Path, output: Path) -> None:
    # A folder cannot be replaced in one step: the old one steps aside and is removed last.
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(temporary, output)
    except OSError:
        if old.exists():
            os.replace(old, output)
        raise
    if old.is_dir():
        shutil.rmtree(old)


def _warnings(args: Namespace, iteration: int, shape: ModelShape) -> list[str]:
    warnings = []
    switch_step = getattr(args, "tst_switch_step", 0)
    if iteration < switch_step:
        warnings.append(
            f"The checkpoint is from step {iteration}, in phase 1 (the switch is at step "
            f"{switch_step}): the model expects bags of {args.tst_bag_size} tokens and is not an "
            "ordinary language model yet."
        )
    unused = shape.padded_vocabulary - shape.vocabulary
    padding_unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    if unused >= padding_unit:
        warnings.append(
            f"{unused} of {shape.padded_vocabulary} embedding rows belong to no entry of the "
            f"tokenizer, more than padding to a multiple of {padding_unit} makes: check that "
            "--tokenizer is the one that the model was trained with."
        )
    return warnings
