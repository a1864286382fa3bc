"""Values of a study file: numbers, switches and mappings, checked."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any

from megatron_tst.common.errors import UsageError


def number(
    value: Any,
    name: str,
    kind: type[Any],
    least: float = float("-inf"),
    most: float = float("inf"),
) -> Any:
    """A number of the file.

    Raises:
        UsageError: it is none, or outside ``least`` to ``most``.
    """
    try:
        found = kind(value)
        good = not isinstance(value, bool) and found == float(value) and isfinite(found)
        good = good and least <= found <= most
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        kinds = "a whole number" if kind is int else "a number"
        bounds = "" if least == float("-inf") else f" of at least {least:g}"
        bounds += "" if most == float("inf") else f" and at most {most:g}"
        raise UsageError(f"{name} is {value!r}: use {kinds}{bounds}.")
    return found


def mapping(
    value: Any,
    where: str,
    required: Iterable[str] = (),
    optional: Iterable[str] | None = None,
) -> dict[str, Any]:
    """A mapping with known keys; any key if ``required`` and ``optional`` are left out.

    Raises:
        UsageError: it is no mapping, or has an unknown key or lacks one.
    """
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}: write keys with values, as docs/studies.md shows.")
    required = tuple(required)
    known = {*required, *(optional or ())}
    if required or optional is not None:
        for key in value:
            if key not in known:
                raise UsageError(
                    f"{where} has the unknown key {key!r}: use {', '.join(sorted(known))}."
                )
    for key in required:
        if key not in value:
            raise UsageError(f"{where} has no {key}: add it.")
    return dict(value)


def switch(value: Any, name: str) -> bool:
    """True or false.

    Raises:
        UsageError: it is neither.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}: use true or false.")
    return value
