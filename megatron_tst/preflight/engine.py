"""Transformer Engine, where it is installed: its modules and its FP8 recipes, without a GPU."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context


@cache
def has_transformer_engine() -> bool:
    """Whether models are built with Transformer Engine, and not with Megatron's own modules."""
    try:
        import_module("transformer_engine.pytorch")
    # Where a library of its own is missing it raises other errors than ImportError.
    except Exception:
        return False
    return True


def engine_version() -> str:
    """Of the installed Transformer Engine."""
    return version("transformer_engine")


def forget_capability() -> None:
    """Lets Transformer Engine ask again what the GPU is, which it does once, when imported."""
    utils = import_module("transformer_engine.pytorch.utils")
    quantization = import_module("transformer_engine.pytorch.quantization")
    utils._get_device_compute_capability.cache_clear()
    for name in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_NVFP4_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
        assert hasattr(quantization, name), name
        setattr(quantization, name, None)


def mark_split_weights(model: torch.nn.Module) -> None:
    """Marks the parameters of which each tensor-parallel rank has a part, where nobody has.

    Transformer Engine does that when it fills them, which it leaves undone on the meta device;
    Megatron does it for experts.
    """
    base = import_module("transformer_engine.pytorch.module.base").TransformerEngineBaseModule
    for module in model.modules():
        mode = getattr(module, "parallel_mode", None)
        if not isinstance(module, base) or mode not in ("column", "row"):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_split = name == "weight" or (name == "bias" and mode == "column")
            if is_split and not hasattr(parameter, "tensor_model_parallel"):
                parameter.tensor_model_parallel = True


def enter_recipes(transformer: Any) -> list[str | None]:
    """Enters the FP8 context of every layer as Megatron does in each forward pass.

    Transformer Engine then makes the recipe and refuses one that the GPU does not have. The process
    groups of Megatron must be there.

    Args:
        transformer: configuration of the layers.

    Returns:
        The recipe of every layer; None in bf16.

    Raises:
        Exception: whatever Megatron and Transformer Engine raise.
    """
    quantization = import_module("transformer_engine.pytorch.quantization")
    recipes = []
    for layer in range(transformer.num_layers):
        with get_fp8_context(transformer, layer):
            state = quantization.FP8GlobalStateManager
            recipe = state.get_fp8_recipe() if state.is_fp8_enabled() else None
            recipes.append(type(recipe).__name__ if recipe else None)
    return recipes
