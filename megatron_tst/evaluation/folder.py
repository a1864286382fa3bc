"""Opens a Hugging Face folder with nothing but the code and the formats that are safe to open."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_tst.common.bf16 import bf16_products, describe_bf16
from megatron_tst.common.errors import UsageError, read_json_object
from megatron_tst.corpus.huggingface_tokenizer import load_huggingface_tokenizer

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPE_HELP = "default: as stored, or float32 for bfloat16 on a CPU that has no bf16"

_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that was checked, and not loaded yet.

    Attributes:
        path: the folder.
        config: content of config.json.
        weights: names of its safetensors files, sorted.
        name: what it is called in messages and results; ``path`` as a rule.
    """

    path: Path
    config: dict[str, Any]
    weights: tuple[str, ...]
    name: str

    def sha256(self) -> str:
        """Hash of config.json and the weights, in full."""
        digest = hashlib.sha256()
        for name in ("config.json", *self.weights):
            with (self.path / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def context(self) -> int | None:
        """Most tokens that the model was made for, if its config says so."""
        return self.config.get("max_position_embeddings")

    @property
    def has_tokenizer(self) -> bool:
        """Whether the files of a tokenizer are there."""
        return any((self.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    @property
    def revision(self) -> str | None:
        """Commit of a snapshot in the cache of the Hugging Face hub; None for other folders."""
        path = self.path.resolve()
        return path.name if path.parent.name == "snapshots" else None


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, and its tokenizer.

    Attributes:
        model: of transformers.
        tokenizer: of transformers.
        notes: what the user must know of its dtype and its tokenizer; none as a rule.
    """

    model: Any
    tokenizer: Any
    notes: tuple[str, ...] = ()

    @property
    def context(self) -> int:
        """Most tokens that the model was made for, by its config.json.

        Raises:
            UsageError: it does not say.
        """
        length = getattr(self.model.config, "max_position_embeddings", None)
        if length is None:
            raise UsageError(
                f"{self.model.config.name_or_path} has no max_position_embeddings in config.json: "
                "add the number of tokens that the model was made for."
            )
        return int(length)


def check_model_folder(
    path: Path, flag: str = "--model", needs_tokenizer: bool = True
) -> ModelFolder:
    """Looks at a folder without loading anything from it.

    Args:
        path: the folder.
        flag: what the user passed it with.
        needs_tokenizer: whether a folder without a tokenizer is of no use.

    Raises:
        UsageError: not a Hugging Face folder, no safetensors weights, a missing file, weights of
            which tools take different ones, or a model that brings code of its own.
    """
    named = f"{flag} {path}"
    if not path.is_dir():
        raise UsageError(f"{named} is not a folder: pass one that has config.json and safetensors.")
    config = _read_json(path / "config.json", named)
    if "auto_map" in config:
        raise UsageError(
            f"{named} brings code of its own (auto_map in config.json), which is never run: use a "
            "model that transformers itself knows."
        )
    _refuse_other_weights(path, config, named)
    weights = _weight_files(path, named)
    missing = [name for name in weights if not (path / name).is_file()]
    if missing:
        raise UsageError(f"{named}: {', '.join(missing)} is missing: copy the folder again.")
    folder = ModelFolder(path, config, tuple(weights), str(path))
    if needs_tokenizer and not folder.has_tokenizer:
        raise UsageError(f"{named} has no tokenizer: copy tokenizer.json and its config into it.")
    return folder


def _refuse_other_weights(path: Path, config: dict[str, Any], named: str) -> None:
    """Refuses what makes transformers load other weights than the index or the single file."""
    if "transformers_weights" in config:
        raise UsageError(
            f"{named} names the file of its weights in config.json (transformers_weights "
            f"{config['transformers_weights']}), which only transformers follows: call the file "
            f"{_SINGLE_FILE} and remove the entry."
        )
    if (path / _ADAPTER).is_file():
        raise UsageError(
            f"{named} holds an adapter ({_ADAPTER}), which transformers applies where peft is "
            "installed and leaves out elsewhere: merge it into the weights, or remove it."
        )


def _weight_files(path: Path, named: str) -> list[str]:
    has_single_file = (path / _SINGLE_FILE).is_file()
    if (path / _INDEX).is_file():
        try:
            listed = {str(name) for name in _read_json(path / _INDEX, named)["weight_map"].values()}
        except (KeyError, AttributeError) as error:
            raise UsageError(f"{path / _INDEX} lists no weights: copy the folder again.") from error
        if has_single_file and listed != {_SINGLE_FILE}:
            raise UsageError(
                f"{named} holds {_SINGLE_FILE} and {_INDEX}, which lists other files "
                f"({', '.join(sorted(listed)[:3])}): transformers loads the first and other tools "
                "the second. Remove the one that is not the model."
            )
        return sorted(listed)
    if has_single_file:
        return [_SINGLE_FILE]
    pickles = sorted(found.name for pattern in _PICKLES for found in path.glob(pattern))
    if pickles:
        raise UsageError(
            f"{named} has its weights as pickles only ({', '.join(pickles[:3])}), which can run "
            "any code when they are opened: convert them to safetensors first."
        )
    raise UsageError(f"{named} has no weights: model.safetensors or {_INDEX} is missing.")


def _read_json(path: Path, named: str) -> dict[str, Any]:
    try:
        return read_json_object(path, "copy the folder again")
    except FileNotFoundError as error:
        raise UsageError(
            f"{named} has no {path.name}: pass a Hugging Face folder "
            "(tst convert to-hf makes one of a checkpoint)."
        ) from error


def device_of(name: str) -> torch.device:
    """The device to use: ``auto`` is the GPU where there is one.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch reports by RuntimeError, and by AssertionError where it was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used ({reason}): pass auto or cpu.") from error
    return device


def load_model(folder: ModelFolder, dtype: DtypeName, device: torch.device) -> LoadedModel:
    """Loads a checked folder; runs none of its code, opens no pickle, and asks no server.

    Args:
        folder: what to load.
        dtype: of the weights. ``auto`` is as stored, or float32 for bfloat16 on a CPU that has no
            instructions for its products.
        device: where to.

    Raises:
        UsageError: transformers cannot load it, or weights are missing in it.
    """
    from transformers import AutoModelForCausalLM

    loaded = load_huggingface_tokenizer(folder.path, folder.name)
    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe
        )
    # transformers and safetensors raise all kinds.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"{folder.name} cannot be loaded ({type(error).__name__}: {reason}): it needs a causal "
            "language model that transformers knows."
        ) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UsageError(f"{folder.name}: {len(names)} weights are missing, such as {names[0]}.")
    notes = [loaded.note] if loaded.note else []
    if dtype == "auto" and model.dtype == torch.bfloat16 and _widens(device):
        model = model.float()
        notes.append(
            f"{folder.name} is bfloat16 and computes in float32 here, products of bf16 being "
            f"{describe_bf16()}: pass --dtype bfloat16 to round as it was trained."
        )
    return LoadedModel(model.to(device).eval(), loaded.tokenizer, tuple(notes))


def _widens(device: torch.device) -> bool:
    return device.type == "cpu" and bf16_products() == "widened"
