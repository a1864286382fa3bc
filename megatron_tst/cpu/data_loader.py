"""Keeps data loaders from drawing the random numbers of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader


def _without_drawing(make_iterator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make_iterator)
    def wrapper(self: Any) -> Any:
        state = torch.default_generator.get_state()
        try:
            return make_iterator(self)
        finally:
            torch.default_generator.set_state(state)

    return wrapper


def install() -> None:
    """Restores the generator after a loader has drawn the seed of its workers from it.

    On a GPU dropout has a generator of its own. Here it shares the CPU's, and Megatron makes its
    loaders after it has restored the random state of a checkpoint: without this, a resumed run
    would drop other units than one that was not interrupted.
    """
    DataLoader.__iter__ = _without_drawing(DataLoader.__iter__)  # type: ignore[method-assign]
