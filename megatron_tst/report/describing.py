"""Describes a run for a comparison: what was asked, what was read, how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log, prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_tst.report.events import FloatArray, Series
from megatron_tst.settings.phases import Phase, is_superposed, lay_out
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.settings.variants import FULL, VARIANTS

Status = Literal["finished", "diverged", "unfinished"]
Setting = str | int | float | bool
IntArray = npt.NDArray[np.int64]

MODEL_SETTINGS = (
    "parameters",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_experts",
    "padded_vocab_size",
)
_TRAINING_SETTINGS = (
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_style",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "clip_grad",
    "bf16",
)
DESCRIBED_ARGUMENTS = {
    *(*MODEL_SETTINGS, *_TRAINING_SETTINGS, "lr", "train_iters", "seed", "seq_length", "split"),
    *("tokenizer_type", "eval_iters", "eval_global_batch_size", "global_batch_size"),
    *("rampup_batch_size", "step_batch_size_schedule", "encoder_num_layers"),
    *("fp16", "fp8", "fp8_recipe", "fp4", "fp4_recipe"),
}
"""Arguments that settings, data and numerics of a run tell."""
NUMERICS = ("device", "torch", "megatron", "fp16", "fp8", "fp4")
DATA_KEYS = (
    "data_path",
    "split",
    "tokenizer_type",
    "tokenizer_model",
    "sequence_length",
    "validation_tokens",
)
OFF = "off"
_TEXT_ARGUMENTS = (
    *("data_path", "train_data_path", "valid_data_path"),
    *("data_args_path", "per_split_data_args_path"),
)
# Logged training losses kept as they are on each side of a switch, and means over the others.
_KEPT_AT_SWITCH = 10
_TRAINING_MEANS = 40
# Nats a token. A model that ends this far above a uniform guess, or above the best that it had
# reached as an ordinary model, has diverged; noise and an unlucky batch stay well below.
_ABSURD = 1.0


def status_of(settings: Mapping[str, Setting], validation: Series, training: Series) -> Status:
    """How a run ended.

    Args:
        settings: of the run; its phases, ``total_steps`` and ``padded_vocab_size`` count.
        validation: next-token losses.
        training: training losses as logged.
    """
    if not (np.isfinite(validation.values).all() and np.isfinite(training.values).all()):
        return "diverged"
    # Before, the validation loss is that of a model that reads bags, and may rise.
    ordinary = validation.values[in_last_phase(phases_of(settings), validation.steps)]
    if ordinary.size:
        vocabulary = settings.get("padded_vocab_size")
        uniform_guess = log(vocabulary) if isinstance(vocabulary, int) else np.inf
        if ordinary[-1] > min(uniform_guess, ordinary.min()) + _ABSURD:
            return "diverged"
    last = int(validation.steps[-1]) if validation.steps.size else 0
    return "finished" if last >= int(settings.get("total_steps", last)) else "unfinished"


def phases_of(settings: Mapping[str, Setting]) -> tuple[Phase, ...]:
    """Phases of a run by its settings, with as many samples as steps."""
    if not is_superposed(settings):
        return lay_out(())
    bags = settings.get("bags", f"{settings['bag_size']}:{settings.get('switch_step', 0)}")
    pairs = (part.split(":") for part in str(bags).split("+"))
    variant = VARIANTS.get(str(settings.get("variant")), FULL)
    return lay_out([(int(size), int(steps)) for size, steps in pairs], variant)


def in_last_phase(phases: Sequence[Phase], steps: IntArray) -> npt.NDArray[np.bool_]:
    """Whether the last of so many steps was one of the last phase, [n]."""
    return steps > phases[-1].first_step


def superposition_settings(schedule: SuperpositionSchedule) -> dict[str, Setting]:
    """The settings of superposition that have an influence on a run with this schedule."""
    config = schedule.config
    if not config.enabled:
        return {"bag_size": 1}
    ratio = config.step_ratio or round(schedule.switch_step / schedule.total_steps, 6)
    found = {**config.method(), "step_ratio": ratio, "switch_step": schedule.switch_step}
    if config.target_weighting != "power-law":
        found.pop("power_law_exponent")
    if config.bag_sizes is None:
        found.pop("bag_sizes")
    if schedule.bags:
        found["bags"] = "+".join(f"{size}:{steps}" for size, steps in schedule.bags)
    return found


def as_one_model(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by which a model is the same as a GPTModel and as a HybridModel.

    The pattern of a HybridModel counts attention and MLP each as a layer, and has pipes between
    pipeline stages. One of attention and MLP in turns (``*-*-``, or ``*E*E`` of experts) is that of
    a GPTModel with half as many layers, whose weights and losses it has bit for bit
    (``tests/integration/test_gpt_to_hybrid.py``).

    Args:
        arguments: Megatron's, by name.
    """
    pattern = arguments.get("hybrid_layer_pattern")
    if not pattern:
        return dict(arguments)
    pattern = str(pattern).replace("|", "")
    layer = "*E" if arguments.get("num_experts") else "*-"
    layers, rest = divmod(len(pattern), len(layer))
    if rest or pattern != layer * layers or arguments.get("moe_layer_freq", 1) != 1:
        return {**arguments, "hybrid_layer_pattern": pattern}
    return {**arguments, "hybrid_layer_pattern": None, "num_layers": layers}


def describe_settings(arguments: Mapping[str, Any]) -> dict[str, Setting]:
    """The settings, apart from superposition, that have an influence on the loss.

    Args:
        arguments: Megatron's, by name; those that are missing or None are left out.
    """
    arguments = as_one_model(arguments)
    renamed = {"learning_rate": arguments.get("lr"), "total_steps": arguments.get("train_iters")}
    same = {name: arguments.get(name) for name in (*MODEL_SETTINGS, *_TRAINING_SETTINGS, "seed")}
    found = {**renamed, **same, "lr_decay_share": _schedule_share(arguments)}
    return {name: value for name, value in found.items() if value is not None}


def _schedule_share(arguments: Mapping[str, Any]) -> float | None:
    """Length of the learning rate's schedule in units of the run; None where they are equal."""
    for decay, length in (("lr_decay_iters", "train_iters"), ("lr_decay_samples", "train_samples")):
        if arguments.get(decay) and arguments.get(length):
            share = round(arguments[decay] / arguments[length], 6)
            return None if share == 1 else share
    return None


def describe_data(arguments: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Names the text, the tokenizer and the validation set of a run by Megatron's arguments."""
    # Text to train on and to validate on, and files that name them.
    given = [arguments.get(name) for name in _TEXT_ARGUMENTS]
    texts = [[paths] if isinstance(paths, str) else paths for paths in given if paths]
    names = [" ".join(Path(str(part)).name for part in parts) for parts in texts]
    model = arguments.get("tokenizer_model")
    sizes = [arguments.get(n) for n in ("eval_iters", "eval_global_batch_size", "seq_length")]
    # Of whole validation sets Megatron counts the steps of each.
    sizes = [sum(size) if isinstance(size, list) else size for size in sizes]
    found: dict[str, Any] = {
        "data_path": ", ".join(names) or None,
        "split": arguments.get("split"),
        "tokenizer_type": arguments.get("tokenizer_type"),
        "tokenizer_model": Path(str(model)).name if model else None,
        "sequence_length": arguments.get("seq_length"),
        "validation_tokens": None if None in sizes else prod(int(size) for size in sizes if size),
    }
    return {name: value for name, value in found.items() if value is not None}


def describe_numerics(
    arguments: Mapping[str, Any], machine: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What the arithmetic of a run was, apart from the bf16 of its settings.

    Two seeds of different arithmetic differ in more than their seed, by as much as seeds do.

    Args:
        arguments: Megatron's, by name; empty where they were not recorded.
        machine: as the run recorded it; None where it did not.
    """
    found: dict[str, str] = {}
    if machine is not None and "accelerator" in machine:
        found["device"] = "CPU" if machine["accelerator"] == "CPU" else "GPU"
    for name in ("torch", "megatron"):
        if version := (machine or {}).get(name):
            # A patch release mends and changes no kernels.
            found[name] = ".".join(str(version).split(".")[:2])
    if arguments:
        found["fp16"] = "on" if arguments.get("fp16") else OFF
        for name in ("fp8", "fp4"):
            parts = (
                (arguments[name], arguments.get(f"{name}_recipe")) if arguments.get(name) else ()
            )
            found[name] = " ".join(str(part) for part in parts if part) or OFF
    return found


def describe_machine(machine: Mapping[str, Any]) -> str:
    """Processor, cores and accelerator in one line."""
    parts = [str(machine.get("cpu") or "unknown processor")]
    if "cores" in machine:
        parts.append(f"{machine['cores']} cores")
    if machine.get("accelerator", "CPU") != "CPU":
        parts.append(str(machine["accelerator"]))
    return ", ".join(parts)


def thin_training_loss(series: Series, phases: Sequence[Phase]) -> tuple[IntArray, FloatArray]:
    """Keeps what is near a switch and averages the rest over neighbours, never across it.

    Returns:
        Steps and losses, each [m], with m at most 40 and 20 for each switch.
    """
    if not series.steps.size:
        return series.steps, series.values
    is_kept = np.zeros(len(series.steps), dtype=bool)
    for phase in phases[1:]:
        if switch := int(np.searchsorted(series.steps, phase.first_step, side="right")):
            is_kept[max(switch - _KEPT_AT_SWITCH, 0) : switch + _KEPT_AT_SWITCH] = True
    share = _TRAINING_MEANS / max(int((~is_kept).sum()), 1)
    stretches = np.split(np.arange(len(is_kept)), np.flatnonzero(np.diff(is_kept)) + 1)
    pieces = [
        piece
        for stretch in stretches
        for piece in _split(stretch, 1.0 if is_kept[stretch[0]] else share)
    ]
    steps = np.array([round(float(series.steps[piece].mean())) for piece in pieces])
    losses = np.array([float(series.values[piece].mean()) for piece in pieces])
    return steps.astype(np.int64), losses


def _split(indices: IntArray, share: float) -> Iterable[IntArray]:
    return np.array_split(indices, min(len(indices), max(int(len(indices) * share), 1)))
