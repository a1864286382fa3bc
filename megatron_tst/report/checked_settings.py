"""Settings of a run that come from outside, a table or a command line: what cannot be is refused.

Reports calculate with some settings, and take runs whose settings differ for different ones. So a
bag size of 2.0 becomes 2, and one of -4 or of 2.5 is an error and no baseline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf, isnan
from typing import Any, TypeGuard

from megatron_tst.common.errors import UsageError
from megatron_tst.report.describing import MODEL_SETTINGS, OFF, Setting
from megatron_tst.settings.config import SETTINGS
from megatron_tst.settings.phases import is_superposed
from megatron_tst.settings.variants import VARIANTS

_ANY = float("-inf")
_WHOLE: dict[str, float] = {
    "bag_size": 1,
    "switch_step": 0,
    "total_steps": 1,
    "seed": _ANY,
    "sequence_length": 1,
    "validation_tokens": 1,
    "global_batch_size": 1,
    "lr_warmup_iters": 0,
    "lr_wsd_decay_iters": 0,
    **{name: 1 for name in MODEL_SETTINGS if name != "num_experts"},
    "num_experts": 0,
}
"""Whole numbers, and the least that each may be."""
SAMPLES = ("lr_warmup_samples", "lr_wsd_decay_samples")
"""Whole numbers or off, as in a run that has its schedule in steps, beside one that has not."""
_NUMBERS = (
    *("tokens_per_step", "step_ratio", "power_law_exponent", "learning_rate", "min_lr"),
    *("weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "lr_decay_share"),
)
_ABOVE_ZERO = ("tokens_per_step", "lr_decay_share")
_OF_SUPERPOSITION = {
    *(name for name, known in SETTINGS.items() if known.is_method or name == "schedule"),
    *("switch_step", "bags"),
} - {"bag_size"}
_LENGTHS = ("switch_step", "step_ratio", "bags", "bag_sizes", "schedule")
"""Settings that say of a run that it has bags."""
_BATCH_SIZES = re.compile(r"\d+:\d+( \d+:\d+)*", re.ASCII)
_BAGS = re.compile(r"\d+:\d+(\+\d+:\d+)*", re.ASCII)
_MEGATRONS = {"lr": "learning_rate", "train_iters": "total_steps", "seq_length": "sequence_length"}


def _bare(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower()).removeprefix("tst")


_KNOWN = {*_WHOLE, *SAMPLES, *_NUMBERS, *_OF_SUPERPOSITION}
_SPELLINGS = {_bare(name): name for name in _KNOWN}
_SPELLINGS |= {_bare(name): ours for name, ours in _MEGATRONS.items()}


def checked_settings(given: Mapping[str, Any], where: str) -> dict[str, Setting]:
    """Settings as reports expect them.

    Whole numbers are of type int, values that are empty or NaN are left out. A run without bags has
    ``bag_size`` 1 and no other setting of superposition, one with bags has a ``step_ratio``.

    Args:
        given: by name.
        where: they were read, for errors.

    Raises:
        UsageError: naming the first that cannot be, its value and the remedy.
    """
    found: dict[str, Setting] = {}
    for name, value in given.items():
        known = _SPELLINGS.get(_bare(name), name)
        if known != name and name not in _KNOWN:
            raise UsageError(f"{where}: {name} is no setting of a report: write {known}.")
        value = checked_value(name, value, where)
        if value is not None:
            found[name] = value
    found.setdefault("bag_size", 1)
    if is_superposed(found):
        return _with_bags(found, where)
    for name in _LENGTHS:
        if found.get(name):
            raise UsageError(
                f"{where}: {name} is {found[name]!r} and bag_size is 1 or not given: set bag_size, "
                f"or leave {name} out of a baseline."
            )
    return {name: value for name, value in found.items() if name not in _OF_SUPERPOSITION}


def checked_value(name: str, value: Any, where: str) -> Setting | None:
    """One setting or data key; None where it is not given.

    Raises:
        UsageError: naming it, its value and the remedy.
    """
    if value is None or (isinstance(value, float) and isnan(value)):
        return None
    if not isinstance(value, str | int | float | bool):
        raise UsageError(f"{where}: {name} is {value!r}: write a number, true, false or text.")
    if name == "global_batch_size" and isinstance(value, str) and _BATCH_SIZES.fullmatch(value):
        return value
    if name in _WHOLE:
        return whole_number(name, value, where, _WHOLE[name])
    if name in SAMPLES:
        return value if value == OFF else whole_number(name, value, where, 0)
    if name in _NUMBERS and not (_is_number(value) and abs(value) < inf):
        raise UsageError(f"{where}: {name} is {value!r}: write a number.")
    if name in _ABOVE_ZERO and not float(value) > 0:
        raise UsageError(f"{where}: {name} is {value!r}: write a number above 0.")
    if name == "bf16" and value not in (True, False):
        raise UsageError(f"{where}: {name} is {value!r}: write true or false.")
    return bool(value) if name == "bf16" else value


def whole_number(name: str, value: Any, where: str, least: float = _ANY) -> int:
    """A whole number, which a program that read a table may have written as 2.0.

    Raises:
        UsageError: it is none, or below ``least``.
    """
    # NaN, infinity, and what int64 does not hold.
    is_number = _is_number(value) and abs(value) < 2**63
    if not is_number or value != int(value) or value < least:
        bound = "" if least == _ANY else f" of at least {least:g}"
        raise UsageError(f"{where}: {name} is {shown(value)}: write a whole number{bound}.")
    return int(value)


def shown(value: Any) -> str:
    """A value in an error."""
    return "empty" if value is None else repr(value)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _with_bags(found: dict[str, Setting], where: str) -> dict[str, Setting]:
    """The settings of a run with bags, whose phases are told apart by them."""
    for name in ("switch_step", "total_steps"):
        if name not in found:
            hint = " (the first step of phase 2)" if name == "switch_step" else ""
            raise UsageError(
                f"{where}: bag_size is {found['bag_size']} without {name}{hint}: state it too, as "
                "in bag_size=4,switch_step=3000, or as columns of a table."
            )
    switch, total = int(found["switch_step"]), int(found["total_steps"])
    if not 0 < switch < total:
        raise UsageError(
            f"{where}: switch_step is {switch} of {total} steps: write the first step of phase 2, "
            f"1 to {total - 1}; total_steps, if that is wrong."
        )
    ratio = float(found.setdefault("step_ratio", round(switch / total, 6)))
    # Ratios are rounded to six digits, switches to whole steps.
    if abs(ratio * total - switch) > 1 + 1e-6 * total:
        raise UsageError(
            f"{where}: step_ratio is {ratio:g}, but switch_step {switch} of {total} steps is "
            f"{switch / total:.4g}: correct one of them, or leave step_ratio out."
        )
    if found.get("variant", "full") not in VARIANTS:
        raise UsageError(
            f"{where}: variant is {found['variant']!r}: choose one of {', '.join(VARIANTS)}."
        )
    if "bags" in found:
        _check_bags(str(found["bags"]), int(found["bag_size"]), switch, where)
    return found


def _check_bags(text: str, bag_size: int, switch_step: int, where: str) -> None:
    parts = [part.split(":") for part in text.split("+")] if _BAGS.fullmatch(text) else []
    sizes, steps = [int(part[0]) for part in parts], [int(part[1]) for part in parts]
    if not parts or min(sizes) < 2 or (max(sizes), sum(steps)) != (bag_size, switch_step):
        raise UsageError(
            f"{where}: bags is {text!r}: write bag size:steps of each phase, as in 4:10+2:15, the "
            f"largest of bag_size {bag_size} and {switch_step} steps in all as in switch_step."
        )
