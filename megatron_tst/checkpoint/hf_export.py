"""Writes a Megatron checkpoint as a Hugging Face model: Llama, Qwen3 or a mixture of experts."""

from __future__ import annotations

import json
import math
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_tst.checkpoint.argument_names import check_present
from megatron_tst.checkpoint.hf_config import huggingface_config
from megatron_tst.checkpoint.hf_mapping import (
    MULTI_TOKEN_PREFIX,
    MegatronSlice,
    check_stored_shapes,
    find_layout,
    weight_slices,
)
from megatron_tst.checkpoint.hf_shapes import ModelShape, shape_from_arguments
from megatron_tst.checkpoint.output_folder import check_disk, check_output, what_is_read
from megatron_tst.checkpoint.safetensors_writer import WRITTEN, PlannedWeight, SafetensorsWriter
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_index import find_checkpoint
from megatron_tst.common.atomic_files import replacing_folder
from megatron_tst.common.errors import UsageError, read_json_object
from megatron_tst.common.progress import CountCallback, no_progress
from megatron_tst.corpus.huggingface_tokenizer import (
    PLAIN_CLASS,
    HuggingFaceTokenizer,
    load_huggingface_tokenizer,
)
from megatron_tst.corpus.tokenizer import CONFIG_FILE
from megatron_tst.settings.phases import phase_at, phase_name, recorded_phases

DtypeName = Literal["float32", "bfloat16"]
_OF_PADDING = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
FILES_OF_CLASSES = (
    *("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model"),
    *("spm_char.model", "bpe.codes", "byte_maps.json", "emoji.json", "dict.txt", "normalizer.json"),
    *("entity_vocab.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json"),
    *("word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer"),
    *("source.spm", "target.spm"),
)
"""What classes of transformers read besides; an export has those of its own."""
_CONFIG, _GENERATION = "config.json", "generation_config.json"


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
    on_progress: CountCallback = no_progress,
) -> ExportResult:
    """Exports a torch_dist checkpoint; one process, on the CPU, without a process group.

    Reads a layer, or one of its experts, at a time and writes it where it belongs: needs the memory
    of the two largest of these, whatever the size of the model.

    Args:
        checkpoint: folder of an iteration, or a folder of ``--save`` (its latest iteration), saved
            at any parallel layout.
        tokenizer: folder of the Hugging Face tokenizer that the model was trained with. Embedding
            rows beyond its last id are Megatron's padding and are left out; if it is the folder of
            a model that was imported, rows beyond the vocabulary of that model.
        output: folder to write; it appears whole or not at all.
        dtype: dtype of the weights; by default the stored one.
        overwrite: whether an existing ``output`` is replaced, if it is nothing but an export;
            it may be ``tokenizer``.
        max_shard_size: size beyond which the weights are split into several files.
        on_progress: called with the parts of the model that are written, and their number.

    Raises:
        UsageError: naming what is missing, damaged, or cannot be expressed as such a model; or the
            disk is too small.
    """
    # Where a link points to is what is replaced.
    output = output.resolve()
    check_output(output, overwrite, _not_an_export(output, checkpoint, tokenizer))
    source = TorchDistCheckpoint(find_checkpoint(checkpoint))
    common = source.read_common()
    args, iteration = common["args"], int(common.get("iteration", 0))
    check_present(args, ["padded_vocab_size", *_OF_PADDING])
    loaded = read_tokenizer(tokenizer)
    vocabulary = _vocabulary(tokenizer, _rows(loaded.tokenizer), args.padded_vocab_size)
    shape = shape_from_arguments(args, vocabulary)
    stored = source.shapes()
    layout = find_layout(stored)
    check_stored_shapes(shape, layout, stored)
    slices = weight_slices(shape, layout)
    source.check_complete({part.key for part in slices})

    weights = _plan_weights(source, slices, dtype)
    writer = SafetensorsWriter(weights, max_shard_size)
    # The embedding, whose dtype is that of the model.
    model_dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    settings = _tokenizer_settings(tokenizer, loaded)
    eos_id = loaded.tokenizer.eos_token_id
    bos_id = loaded.tokenizer.bos_token_id
    config = huggingface_config(
        shape, args, model_dtype, eos_id if bos_id is None else bos_id, eos_id
    )
    files = _tokenizer_files(tokenizer, loaded)
    check_disk(output, writer.total_bytes + sum(file.stat().st_size for file in files))
    _write(output, config, source, slices, writer, files, settings, on_progress)
    return ExportResult(
        checkpoint=source.folder,
        iteration=iteration,
        shape=shape,
        parameters=sum(weight.elements for weight in weights.values()),
        warnings=(
            *_warnings(args, iteration, shape),
            *_left_out(stored),
            *_class_note(loaded),
        ),
    )


def _not_an_export(output: Path, checkpoint: Path, tokenizer: Path) -> str | None:
    # Its files are copied before its folder goes.
    is_tokenizer = output == tokenizer.resolve()
    if found := what_is_read(output, [checkpoint] if is_tokenizer else [checkpoint, tokenizer]):
        return found
    if not (output / _CONFIG).is_file():
        return f"is no exported model (it has no {_CONFIG})"
    names = {path.name: path.is_file() for path in output.iterdir()}
    weights = {name for name in names if WRITTEN.fullmatch(name)}
    own = {_CONFIG, _GENERATION, *TOKENIZER_FILES, *FILES_OF_CLASSES, *weights}
    others = sorted(name for name, is_file in names.items() if not is_file or name not in own)
    if others:
        return f"holds {others[0]}, which no export writes"
    return None if weights or is_tokenizer else "is no exported model (it has no weights)"


def read_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    """The tokenizer of ``--tokenizer``.

    Raises:
        UsageError: not a folder, or none that transformers can load.
    """
    if not folder.is_dir():
        raise UsageError(f"--tokenizer {folder} is not a folder.")
    return load_huggingface_tokenizer(folder, f"--tokenizer {folder}")


def _rows(tokenizer: Any) -> int:
    """Embedding rows that a tokenizer uses."""
    # Its length counts entries: with gaps between their ids, the last id is beyond it.
    return max(len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values()))


def _vocabulary(tokenizer: Path, size: int, padded: int) -> int:
    """Rows of the embedding that are no padding.

    Models such as Qwen3 have more of them than their tokenizer has entries, which an import keeps.
    """
    config = tokenizer / _CONFIG
    settings = read_json_object(config, "copy the folder again") if config.is_file() else {}
    of_model = settings.get("vocab_size", size)
    # A bool is an int for Python.
    if type(of_model) is not int:
        raise UsageError(
            f"{config} has vocab_size {json.dumps(of_model)}: write the number of embedding rows "
            "of the model, or remove the entry if the folder is not that of a model."
        )
    return of_model if size <= of_model <= padded else size


def _plan_weights(
    source: TorchDistCheckpoint, slices: Sequence[MegatronSlice], dtype: DtypeName | None
) -> dict[str, PlannedWeight]:
    return {
        name: PlannedWeight(
            size,
            getattr(torch, dtype) if dtype and not part.keeps_dtype else source.dtype(part.key),
        )
        for part in slices
        for name, size in part.sizes().items()
    }


def _write(
    output: Path,
    config: dict[str, Any],
    source: TorchDistCheckpoint,
    slices: Sequence[MegatronSlice],
    writer: SafetensorsWriter,
    files: Sequence[Path],
    tokenizer_settings: dict[str, Any],
    on_progress: CountCallback,
) -> None:
    with replacing_folder(output) as temporary:
        writer.start(temporary)
        for done, part in enumerate(slices):
            on_progress(done, len(slices))
            for name, weight in part.split(source.read(part.key, part.index)).items():
                writer.write(name, weight)
        on_progress(len(slices), len(slices))
        writer.finish()
        special_ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        _write_json(temporary / _CONFIG, config)
        _write_json(temporary / _GENERATION, special_ids)
        for file in files:
            shutil.copyfile(file, temporary / file.name)
        _write_json(temporary / CONFIG_FILE, tokenizer_settings)


def _tokenizer_files(folder: Path, loaded: HuggingFaceTokenizer) -> list[Path]:
    names = {*TOKENIZER_FILES, *getattr(loaded.tokenizer, "vocab_files_names", {}).values()}
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def _tokenizer_settings(folder: Path, loaded: HuggingFaceTokenizer) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``, with what engines and ``generate`` ask for.

    Without a beginning of text or padding the end of a document stands for it, as in GPT-2. The
    padding is not in ``config.json``, where transformers would give its row no gradient.
    """
    path = folder / CONFIG_FILE
    settings = read_json_object(path, "copy the folder again") if path.is_file() else {}
    if loaded.is_plain:
        settings["tokenizer_class"] = PLAIN_CLASS
    # By default there is one more, which causal language models do not take.
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    end = loaded.tokenizer.eos_token
    missing = [name for name in ("bos_token", "pad_token") if not getattr(loaded.tokenizer, name)]
    return settings | (dict.fromkeys(missing, end) if end is not None else {})


def _left_out(stored: dict[str, tuple[int, ...]]) -> list[str]:
    sizes = [math.prod(size) for key, size in stored.items() if key.startswith(MULTI_TOKEN_PREFIX)]
    if not sizes:
        return []
    return [
        f"The layers of multi-token prediction were left out, {sum(sizes):,} parameters "
        f"({MULTI_TOKEN_PREFIX}*): the model predicts the next token without them, and its class "
        "in transformers has no place for them."
    ]


def _class_note(loaded: HuggingFaceTokenizer) -> list[str]:
    return [f"{loaded.note} The exported folder has it."] if loaded.is_plain else []


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _warnings(args: Namespace, iteration: int, shape: ModelShape) -> list[str]:
    warnings = []
    phases = recorded_phases(getattr(args, "tst_settings", None))
    last = max(iteration - 1, 0)
    if (phase := phase_at(phases, last)).is_superposed:
        warnings.append(
            f"The checkpoint is from step {iteration}, in {phase_name(phases, last)} (the switch "
            f"is at step {phases[-1].first_step}): the model has seen nothing but bags of "
            f"{phase.bag_size} tokens, and its outputs are mixtures of a bag, not predictions of "
            "the next token."
        )
    factor, is_ours = getattr(args, "rope_scaling_factor", 8.0), hasattr(args, "tst_bag_size")
    if getattr(args, "use_rope_scaling", False) and factor != 8 and iteration and not is_ours:
        warnings.append(
            f"The checkpoint was trained with --rope-scaling-factor {factor:g} and not by this "
            "project: pretrain_gpt.py of Megatron-LM up to 0.19.2 takes 8 whatever the flag says. "
            "If that trained it, write 8 as the factor in config.json."
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
