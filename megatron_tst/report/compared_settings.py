"""The settings of a comparison: of superposition, of the length, of the optimizer; which differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_tst.report.describing import OFF, Setting
from megatron_tst.settings.config import SETTINGS

SUPERPOSITION_SETTINGS = (
    *(name for name, known in SETTINGS.items() if known.is_method and name != "steps"),
    "switch_step",
    "bags",
)

LENGTH_SETTINGS = (
    *("total_steps", "lr_warmup_iters", "lr_wsd_decay_iters"),
    *("lr_warmup_samples", "lr_wsd_decay_samples", "phase_transition_iterations"),
)
"""What a run of another length has otherwise: its schedule is scaled with it."""

TUNED_SETTINGS = (
    *("learning_rate", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_wsd_decay_iters"),
    *("lr_wsd_decay_style", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad"),
    *("lr_warmup_samples", "lr_wsd_decay_samples", "lr_warmup_fraction"),
)
"""Settings of the optimizer, which suit an arm or do not."""


def decay_share(settings: Mapping[str, Setting]) -> float | None:
    """Share of a run in which its learning rate falls at the end; None where that is unknown."""
    steps, batch = settings.get("total_steps"), settings.get("global_batch_size")
    if steps and (decay := settings.get("lr_wsd_decay_iters")):
        return float(decay) / float(steps)
    decay = settings.get("lr_wsd_decay_samples", OFF)
    # Off in a run without it, beside runs that have one.
    if steps and isinstance(batch, int) and decay and decay != OFF:
        return float(decay) / (float(steps) * batch)
    return None


def differing(settings: Sequence[Mapping[str, Setting]]) -> list[str]:
    """Names whose values are not the same everywhere."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({one.get(name) for one in settings}) > 1]
