"""Finds the functions of Megatron that this package wraps."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def unwrapped(owner: Any, name: str) -> Callable[..., Any]:
    """The function of Megatron behind a name, also when it has been wrapped before.

    Raises:
        RuntimeError: Megatron has no such function.
    """
    if not hasattr(owner, name):
        raise RuntimeError(
            f"{owner.__name__}.{name} does not exist in megatron-core {version('megatron-core')}: "
            "install the version pinned in pyproject.toml."
        )
    function = getattr(owner, name)
    original: Callable[..., Any] = getattr(function, "__wrapped__", function)
    return original
