"""Writes a Hugging Face model (Llama, Qwen3 or Qwen3-MoE) as a Megatron checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_tst.checkpoint.hf_arguments import (
    megatron_arguments,
    parse_arguments,
    read_config,
    shape_from_config,
)
from megatron_tst.checkpoint.hf_export import DtypeName
from megatron_tst.checkpoint.hf_fused_experts import split_fused_experts
from megatron_tst.checkpoint.hf_mapping import (
    KeyLayout,
    MegatronSlice,
    listed,
    stored_shapes,
    weight_slices,
)
from megatron_tst.checkpoint.hf_shapes import ModelShape
from megatron_tst.checkpoint.output_folder import check_disk, check_output, what_is_read
from megatron_tst.checkpoint.safetensors_reader import StoredWeight, stored_weights
from megatron_tst.checkpoint.torch_dist_index import COMMON_KEY, FORMAT_FILE, is_torch_dist
from megatron_tst.checkpoint.torch_dist_writer import (
    PlannedChunk,
    checkpoint_bytes,
    write_checkpoint,
)
from megatron_tst.checkpoint.tracker import RELEASE, TRACKER_FILE
from megatron_tst.common.atomic_files import replacing_folder
from megatron_tst.common.errors import UsageError
from megatron_tst.common.progress import CountCallback, no_progress
from megatron_tst.evaluation.folder import check_model_folder

ModelKind = Literal["auto", "hybrid", "gpt"]
"""Megatron's model: HybridModel, GPTModel, or HybridModel where it computes the same."""
_OUTPUT_LAYER, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# The arguments of Megatron, all of them.
_COMMON_BYTES = 40_000
# Tables of sines and cosines, which early releases of transformers saved.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
# Megatron's HybridModel leaves the scaling of Llama 3.1 out.
_ONLY_GPT = "rope_parameters of rope_type llama3"


@dataclass(frozen=True)
class ImportResult:
    """What was imported.

    Attributes:
        shape: sizes of the model.
        parameters: number of weights read.
        arguments: of Megatron that a run of the model needs, each with its value.
        hybrid: whether it is for a ``HybridModel``; for a ``GPTModel`` otherwise.
    """

    shape: ModelShape
    parameters: int
    arguments: tuple[tuple[str, ...], ...]
    hybrid: bool


def import_from_huggingface(
    model: Path,
    output: Path,
    dtype: DtypeName | None = None,
    vocabulary_multiple: int = 1,
    overwrite: bool = False,
    on_progress: CountCallback = no_progress,
    kind: ModelKind = "auto",
) -> ImportResult:
    """Imports a model as a torch_dist checkpoint that Megatron loads at any parallel layout.

    One process, on the CPU, without a process group. Reads a layer, or one of its experts, at a
    time and writes it: needs the memory of one or two of these, whatever the size of the model.
    Runs no code of the folder and opens no pickle.

    Args:
        model: folder with config.json and safetensors.
        output: folder to write, for ``--load``; it appears whole or not at all.
        dtype: dtype of the weights; by default the one in the folder.
        vocabulary_multiple: the embedding and the output layer are padded to a multiple of it, with
            zeros, as Megatron fills rows when it loads into a larger vocabulary.
        overwrite: whether an existing ``output`` is replaced, if it is nothing but an import.
        on_progress: called with the parts of the model that are read, and their number.
        kind: of Megatron's model that the checkpoint is for.

    Raises:
        UsageError: naming what is missing, damaged, or cannot be expressed in Megatron; or the disk
            is too small.
    """
    # Where a link points to is what is replaced.
    output = output.resolve()
    check_output(output, overwrite, _not_an_import(output, model))
    if vocabulary_multiple < 1:
        raise UsageError(f"--pad-vocab-to-multiple-of {vocabulary_multiple} is not positive.")
    named = f"--model {model}"
    folder = check_model_folder(model, needs_tokenizer=False)
    config = read_config(folder.config, named)
    shape = shape_from_config(config, vocabulary_multiple)
    hybrid = _is_hybrid(kind, config, named)
    slices = _slices(shape, hybrid)
    weights = split_fused_experts(stored_weights([model / name for name in folder.weights]), shape)
    _check_weights(shape, slices, weights, named)
    chunks = _plan_chunks(slices, weights, dtype, named)
    shapes = stored_shapes(slices)
    states = _module_states(slices, shapes, hybrid)
    check_disk(output, checkpoint_bytes(chunks, len(states)) + _COMMON_BYTES)

    arguments = megatron_arguments(config, shape, hybrid)
    if folder.has_tokenizer:
        tokenizer = str(model.resolve())
        arguments += [
            ["--tokenizer-type", "HuggingFaceTokenizer"],
            ["--tokenizer-model", tokenizer],
        ]
    objects = {COMMON_KEY: _common_state(arguments), **states}
    on_progress(0, len(chunks))
    done = itertools.count(1)
    with replacing_folder(output) as temporary:

        def advance() -> None:
            on_progress(next(done), len(chunks))

        write_checkpoint(temporary / RELEASE, shapes, chunks, objects, advance)
        (temporary / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
    used = {name for part in slices for name in part.names}
    return ImportResult(
        shape=shape,
        parameters=sum(weights[name].elements for name in used),
        arguments=tuple(tuple(argument) for argument in arguments),
        hybrid=hybrid,
    )


def _common_state(arguments: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What Megatron looks for in a checkpoint besides tensors; the arguments for tools as well."""
    words = [word for argument in arguments for word in argument]
    args = parse_arguments([*words, "--no-save-optim", "--no-save-rng"])
    # A plain string: checkpoints hold no class of torch.
    args.tst_torch_version = str(torch.__version__)
    if args.hybrid_layer_pattern:
        # As Megatron's validation has it, and compares it.
        args.num_layers = len(args.hybrid_layer_pattern)
    return {
        "args": args,
        # The order of queries, keys and values since Megatron-LM 2.
        "checkpoint_version": 3.0,
        "iteration": 0,
    }


def _not_an_import(output: Path, model: Path) -> str | None:
    if found := what_is_read(output, [model]):
        return found
    tracker, names = output / TRACKER_FILE, set()
    if output.is_dir():
        names = {path.name for path in output.iterdir()}
    # A run that saves into the folder leaves the imported weights beside its own.
    if others := sorted(names - {TRACKER_FILE, RELEASE}):
        return f"holds something else than an imported model ({others[0]})"
    if not (tracker.is_file() and is_torch_dist(output / RELEASE / FORMAT_FILE)):
        return "holds no imported model"
    text = tracker.read_text(encoding="utf-8", errors="replace")
    return None if text == RELEASE else "holds something else than an imported model"


def _is_hybrid(kind: ModelKind, config: Any, named: str) -> bool:
    is_scaled = config.rope_parameters["rope_type"] == "llama3"
    if kind == "hybrid" and is_scaled:
        raise UsageError(
            f"{named} has {_ONLY_GPT}, which Megatron's HybridModel leaves out: pass --model-kind "
            "gpt."
        )
    return kind == "hybrid" or (kind == "auto" and not is_scaled)


def _slices(shape: ModelShape, hybrid: bool) -> list[MegatronSlice]:
    """The parts of the model; the norm before experts under both names that Megatron has for it."""
    # HybridModel has one of them, and GPTModel numbers the layers where they are of two kinds.
    is_stacked = not (hybrid or shape.dense_layers)
    parts = {
        (part.key, part.index): part
        for fused_norm in ((False,) if hybrid else (True, False))
        for part in weight_slices(shape, KeyLayout(hybrid, is_stacked, fused_norm))
    }
    return list(parts.values())


def _module_states(
    slices: Sequence[MegatronSlice], shapes: Mapping[str, Sequence[int]], hybrid: bool
) -> dict[str, Tensor]:
    """What Megatron's linear layers save besides their weights, by key.

    Loading fails where one is missing. Megatron's own modules have nothing in it, those of
    Transformer Engine the state of fp8, for the absence of which an empty tensor stands. The latter
    have it in norms and attention too; what no module asks for does no harm.
    """
    empty = torch.empty(0, dtype=torch.uint8)
    # Of the layer outside the decoder that HybridModel saves it for, tied or not.
    states = {"output_layer._extra_state/shard_0_1": empty} if hybrid else {}
    for part in slices:
        module = part.key.removesuffix(".weight")
        if module == part.key or not module.startswith("decoder."):
            continue
        stacks = len(part.index)
        place = ".".join(map(str, part.index or (0,)))
        places = ".".join(map(str, shapes[part.key][:stacks] or (1,)))
        for name in {module, module.replace("linear_qkv", "core_attention")}:
            states[f"{name}._extra_state/shard_{place}_{places}"] = empty
    return states


def _check_weights(
    shape: ModelShape,
    slices: Sequence[MegatronSlice],
    weights: Mapping[str, StoredWeight],
    named: str,
) -> None:
    """Compares the weights that there are with the ones that the model consists of."""
    expected = {name: size for part in slices for name, size in part.sizes().items()}
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise UsageError(
            f"{named} has no {listed(missing)}: it does not hold the {shape.architecture} model "
            "that its config.json describes, copy it again."
        )
    unknown = {name for name in weights.keys() - expected.keys() if not _is_table(name)}
    if shape.tied and _OUTPUT_LAYER in unknown:
        unknown.remove(_OUTPUT_LAYER)
        if not torch.equal(weights[_OUTPUT_LAYER].read(), weights[_EMBEDDING].read()):
            raise UsageError(
                f"{named} has tie_word_embeddings true in config.json, and {_OUTPUT_LAYER} is not "
                f"{_EMBEDDING}: set it to false, or remove the weight."
            )
    if unknown:
        raise UsageError(
            f"{named} has {listed(sorted(unknown))}, which {shape.architecture} has no place for: "
            "it cannot be imported without changing the model."
        )
    for name, size in expected.items():
        if weights[name].size != size:
            raise UsageError(
                f"{name} in {weights[name].file} has shape {list(weights[name].size)}, and "
                f"config.json gives {list(size)}: the folder mixes two models."
            )


def _is_table(name: str) -> bool:
    return name.endswith(_IGNORED_SUFFIX)


def _plan_chunks(
    slices: Sequence[MegatronSlice],
    weights: Mapping[str, StoredWeight],
    dtype: DtypeName | None,
    named: str,
) -> list[PlannedChunk]:
    dtypes: dict[str, torch.dtype] = {}
    for part in slices:
        for name in part.names:
            own = weights[name].dtype
            stored = getattr(torch, dtype) if dtype and not part.keeps_dtype else own
            # A tensor of Megatron, which stacks all layers, has one dtype.
            if dtypes.setdefault(part.key, stored) != stored:
                raise UsageError(
                    f"{named} has {name} in {stored}, and the same weight of other layers in "
                    f"{dtypes[part.key]}: pass --dtype."
                )
    return [
        PlannedChunk(part.key, part.index, part.size, dtypes[part.key], _loader(part, weights))
        for part in slices
    ]


def _loader(part: MegatronSlice, weights: Mapping[str, StoredWeight]) -> Callable[[], Tensor]:
    return lambda: part.join([weights[name].read() for name in part.names])
