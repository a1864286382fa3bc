"""Whether a checkpoint's counts of steps, samples and tokens agree with each other."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_tst.checkpoint.tracker import RELEASE
from megatron_tst.settings.arguments import superposition_schedule_from_args
from megatron_tst.settings.batch_arguments import batch_sizes_from_args
from megatron_tst.settings.phases import (
    is_superposed,
    phase_name,
    recorded_phases,
    switches_name,
)


@dataclass
class Accounting:
    """What was compared.

    Attributes:
        summary: where the run was.
        compared: number of comparisons.
        faults: sentences on what cannot be.
        notes: sentences on what is unusual and may be meant.
    """

    summary: str
    compared: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require(self, is_right: bool, fault: str) -> None:
        """Counts a comparison, and a fault where it fails."""
        self.compared += 1
        if not is_right:
            self.faults.append(fault)


def check_accounting(name: str, common: Mapping[str, Any]) -> Accounting:
    """Compares the counts of a checkpoint.

    Args:
        name: of its folder.
        common: what it has besides tensors.
    """
    args: Namespace = common["args"]
    step = common.get("iteration")
    result = Accounting(f"step {step}")
    if name == RELEASE:
        result.summary = "a release without optimizer: training starts at step 0 from it"
        return result
    if not isinstance(step, int):
        result.require(False, f"the checkpoint is of step {step}, which is no number")
        return result
    _check_name(result, name, f"iter_{step:07d}")
    _check_optimizer_steps(result, common, step, args)
    settings = getattr(args, "tst_settings", None) or {}
    if is_superposed(settings):
        _check_superposition(result, args, settings, step)
    else:
        _look_at_samples(result, args, step)
    written_by = getattr(args, "tst_torch_version", None)
    if written_by:
        result.summary += f", written by torch {written_by}"
    return result


def _check_name(result: Accounting, name: str, expected: str) -> None:
    """Compares what a folder is called with what Megatron calls it; others may be its user's."""
    if re.fullmatch(r"iter_\d+", name):
        result.require(
            name == expected, f"the folder is {name}, and the checkpoint in it is {expected}"
        )
    else:
        result.notes.append(
            f"the folder is called {name}: Megatron loads it where it is called {expected}"
        )


def param_groups(state: Any) -> Iterator[dict[str, Any]]:
    """The groups of parameters of an optimizer's state, however deep they lie in it."""
    if isinstance(state, dict):
        groups = state.get("param_groups")
        if isinstance(groups, list):
            yield from (group for group in groups if isinstance(group, dict))
        for value in state.values():
            yield from param_groups(value)


def _check_optimizer_steps(
    result: Accounting, common: Mapping[str, Any], step: int, args: Namespace
) -> None:
    groups = param_groups(common.get("optimizer"))
    counts = {int(group["step"]) for group in groups if group.get("step") is not None}
    if not counts:
        return
    may_differ = bool(getattr(args, "override_ckpt_iteration", None))
    result.require(
        max(counts) <= step or may_differ,
        f"the optimizer counts {max(counts)} steps, and the checkpoint is of step {step}",
    )
    if max(counts) < step:
        result.notes.append(
            f"the optimizer counts {max(counts)} of {step} steps: others were skipped, or came "
            "before it was started anew"
        )


def _check_superposition(
    result: Accounting, args: Namespace, settings: Mapping[str, Any], step: int
) -> None:
    # An earlier version may have saved other settings.
    try:
        schedule = superposition_schedule_from_args(args)
        samples = args.consumed_train_samples
        phases = recorded_phases(settings)
    except (AttributeError, KeyError, ValueError) as error:
        result.notes.append(f"its --tst-* values cannot be compared ({error})")
        return
    sizes = " and ".join(str(phase.bag_size) for phase in phases[:-1])
    if schedule.config.bag_sizes is not None:
        sizes = schedule.config.bag_sizes.replace(",", " or ")
    result.summary = (
        f"step {step} of {schedule.total_steps}, {phase_name(phases, step)}, "
        f"{switches_name(phases)}, bags of {sizes}, {samples:,} samples, "
        f"{schedule.data_tokens(step):,} data tokens"
    )
    expected = schedule.batch_sizes.samples_at(step)
    result.require(
        samples == expected,
        f"{samples} samples were read in {step} steps, and its batch sizes make that {expected}",
    )
    for unit in ("step", "sample"):
        was, now = (
            " and ".join(str(getattr(phase, f"first_{unit}")) for phase in one[1:])
            for one in (phases, schedule.phases)
        )
        result.require(
            was == now,
            f"its switch is recorded at {unit} {was}, and its --tst-* values put it at {unit} "
            f"{now}",
        )


def _look_at_samples(result: Accounting, args: Namespace, step: int) -> None:
    samples = getattr(args, "consumed_train_samples", None)
    if samples is None:
        return
    result.summary = f"step {step}, without superposition, {samples:,} samples"
    # Megatron lets the batch size grow, and change at a resume.
    try:
        expected = batch_sizes_from_args(args).samples_at(step)
    except (AttributeError, TypeError, ValueError):
        return
    result.compared += 1
    if samples != expected:
        result.notes.append(
            f"{samples} samples were read in {step} steps, and --global-batch-size makes that "
            f"{expected}: right if it was another one before"
        )
