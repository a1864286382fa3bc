"""Normalisation for the CPU: torch's modules, also under sequence parallelism."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

_NORMS: dict[str, type[nn.LayerNorm | nn.RMSNorm]] = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
}


def build_norm(
    cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: Any
) -> nn.Module:
    """Builds a norm over the last dimension, in place of ``WrappedTorchNorm.__new__``.

    Upstream's refuses sequence parallelism, under which a rank holds a slice of the positions and
    thus a part of the gradient of the weight. Megatron adds the parts up, one all-reduce a step,
    for every parameter that is marked as here.

    Raises:
        ValueError: a kind of norm that torch does not have.
    """
    refused = {
        "--normalization": config.normalization not in _NORMS,
        "--apply-layernorm-1p": config.layernorm_zero_centered_gamma,
        "--memory-efficient-layer-norm": config.memory_efficient_layer_norm,
    }
    for flag, is_set in refused.items():
        if is_set:
            raise ValueError(
                f"{flag} asks for a norm that the CPU platform does not compute: use "
                f"--normalization {' or '.join(_NORMS)} alone, or run on a GPU."
            )
    norm = _NORMS[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
