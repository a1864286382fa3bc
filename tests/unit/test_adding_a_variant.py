"""What CONTRIBUTING says of adding a weighting and an objective, done with two toys."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tst.ops.objectives import LOSSES, superposition_loss
from megatron_tst.report.describing import superposition_settings
from megatron_tst.report.labels import superposition_label
from megatron_tst.settings.arguments import (
    add_superposition_arguments,
    superposition_config_from_args,
)
from megatron_tst.settings.batch_sizes import BatchSizes
from megatron_tst.settings.config import OBJECTIVES, WEIGHTINGS, Objective, SuperpositionConfig
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.study.study_file import read_study
from tests.studies import study_content, write_study

TOY: dict[str, Any] = {
    "bag_size": 4,
    "step_ratio": 0.5,
    "target_weighting": "falling",
    "objective": "first",
}


def first_target_loss(
    logits: Tensor, target_bags: Tensor, weights: Any, tp_group: Any, ignore_index: int
) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, target_bags[..., 0], reduction="none")


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weighting that falls in a straight line, and the loss of the first target."""
    monkeypatch.setitem(WEIGHTINGS, "falling", lambda i, exponent: 10.0 - i)
    monkeypatch.setitem(OBJECTIVES, "first", Objective(takes_weights=True))
    monkeypatch.setitem(LOSSES, "first", first_target_loss)


def test_the_command_line_takes_them() -> None:
    parser = add_superposition_arguments(argparse.ArgumentParser())
    flags = [(f"--tst-{name.replace('_', '-')}", str(value)) for name, value in TOY.items()]
    args = parser.parse_args([part for flag in flags for part in flag])
    config = superposition_config_from_args(args)
    assert config == SuperpositionConfig(**TOY)
    assert config.target_weights() == pytest.approx([9 / 30, 8 / 30, 7 / 30, 6 / 30])


def test_a_study_takes_them(tmp_path: Path) -> None:
    content = study_content(tmp_path / "corpus", arms=[TOY], controls=False)
    (run,) = read_study(write_study(tmp_path / "study.yaml", content)).runs()
    assert run.name.endswith("-s4-r0.5-falling-first-seed0")
    assert run.settings.superposition == SuperpositionConfig(**TOY)


def test_reports_name_them() -> None:
    schedule = SuperpositionSchedule(SuperpositionConfig(**TOY), 10, BatchSizes.constant(1), 8)
    settings = superposition_settings(schedule)
    assert superposition_label(settings) == "s=4 r=0.5 falling first"


def test_the_loss_is_computed() -> None:
    logits, targets = torch.randn(3, 16), torch.randint(16, (3, 4))
    expected = torch.nn.functional.cross_entropy(logits, targets[:, 0], reduction="none")
    loss = superposition_loss(logits, targets, "first", torch.ones(4))
    assert torch.equal(loss, expected)


def test_every_objective_is_computed() -> None:
    assert LOSSES.keys() == OBJECTIVES.keys()
