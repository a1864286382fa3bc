"""The layers that a frequency names, in both kinds of models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_tst.settings.attention_layers import windows, without_positions

SIZE = (8, 0)


def settings(**given: Any) -> Any:
    usual = {"num_layers": 4, "hybrid_layer_pattern": None, "window_size": SIZE}
    return SimpleNamespace(**usual | given)


@pytest.mark.parametrize("frequency", [None, 2, 3, [1, 0, 0, 1]])
def test_windows_are_megatrons(frequency: Any) -> None:
    expected = [is_layer_window_attention(SIZE, frequency, number) for number in range(1, 5)]
    found = windows(settings(window_attn_skip_freq=frequency))
    assert found == [SIZE if is_windowed else None for is_windowed in expected]


def test_a_hybrid_model_counts_other_layers() -> None:
    hybrid = settings(hybrid_layer_pattern="*-*-|*-*-/*-", window_attn_skip_freq=4)
    assert windows(hybrid) == [SIZE] * 4
    older = settings(hybrid_override_pattern=hybrid.hybrid_layer_pattern, num_layers=8)
    assert windows(older) == [SIZE] * 4
    hybrid.window_attn_skip_freq = [1, 1, 1, 1, 1, 1, 0, 0]
    # The same as every fourth layer of a GPTModel.
    assert windows(hybrid) == windows(settings(window_attn_skip_freq=4)) == [SIZE] * 3 + [None]


def test_layers_without_rotation() -> None:
    assert without_positions(settings()) == [False] * 4
    assert without_positions(settings(no_rope_freq=2)) == [False, True] * 2
    hybrid = settings(hybrid_layer_pattern="*-*-", no_rope_freq=3)
    assert without_positions(hybrid) == [False, True]
    assert without_positions(settings(no_rope_freq=[1, 0, 0, 0])) == [True, False, False, False]
