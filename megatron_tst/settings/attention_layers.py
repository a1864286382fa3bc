"""Which attention layers of a model have a window, and which have no rotary positions.

Megatron counts layers for both settings. A HybridModel counts each MLP as one, so that a number
means other layers of attention there than in a GPTModel.
"""

from __future__ import annotations

from typing import Any

ATTENTION = "*+D"
"""Layers of a pattern that have it."""


def pattern_of(settings: Any) -> str | None:
    """The pattern of a HybridModel, None of a GPTModel."""
    # The second is its name in older checkpoints.
    names = ("hybrid_layer_pattern", "hybrid_override_pattern")
    return next((value for name in names if (value := getattr(settings, name, None))), None)


def attention_layers(settings: Any) -> list[int]:
    """Numbers, from 1, of the layers with attention, without those of multi-token prediction.

    Args:
        settings: a command line, or Megatron's arguments in a checkpoint.
    """
    if pattern := pattern_of(settings):
        layers = pattern.partition("/")[0].replace("|", "")
        return [number for number, kind in enumerate(layers, 1) if kind in ATTENTION]
    return list(range(1, (settings.num_layers or 0) + 1))


def windows(settings: Any) -> list[tuple[int, int] | None]:
    """By layer with attention its window, as ``is_layer_window_attention`` of Megatron has it."""
    size = getattr(settings, "window_size", None)
    frequency = getattr(settings, "window_attn_skip_freq", None)
    layers = attention_layers(settings)
    if isinstance(frequency, list):
        return [size if size and _is_set(frequency, n) else None for n in layers]
    return [size if size and (not frequency or n % frequency) else None for n in layers]


def without_positions(settings: Any) -> list[bool]:
    """By layer with attention whether it leaves out the rotation of ``--no-rope-freq``."""
    frequency = getattr(settings, "no_rope_freq", None)
    layers = attention_layers(settings)
    if isinstance(frequency, list):
        return [_is_set(frequency, n) for n in layers]
    return [n % frequency == 0 if frequency else False for n in layers]


def _is_set(pattern: list[int], number: int) -> bool:
    """Whether a list names a layer; Megatron ends over one that is too short."""
    return number <= len(pattern) and bool(pattern[number - 1])
