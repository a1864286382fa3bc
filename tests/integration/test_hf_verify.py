"""Exports against Megatron's own computation, and the memory that they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hf_verification import LARGE, OLDER, SWAPS, VERIFIED
from tests.zygote import Launcher


@pytest.fixture(scope="module")
def found(
    launcher: Launcher,
    checkpoints: Path,
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """What tests.hf_verification finds."""
    work = tmp_path_factory.mktemp("verification")
    arguments = [str(checkpoints), str(tokenizer), str(work / "results.json")]
    launcher.run(arguments, work / "log.txt", main="tests.hf_verification:main")
    return json.loads((work / "results.json").read_text())


@pytest.mark.parametrize("variant", VERIFIED)
def test_an_export_computes_what_the_checkpoint_computes(found: Any, variant: str) -> None:
    # fp32 in another order, logits of order 1.
    assert found["differences"][variant] <= 1e-5


@pytest.mark.parametrize("variant", OLDER)
def test_a_checkpoint_of_an_older_release_is_verified(found: Any, variant: str) -> None:
    assert found["older"][variant] <= 1e-5


@pytest.mark.parametrize("swap", SWAPS)
def test_two_exchanged_weights_are_found(found: Any, swap: str) -> None:
    # The tolerance of the tool is 1e-3.
    assert found["swaps"][swap] > 1e-2


def test_the_command_verifies(found: Any) -> None:
    intact, rounded, damaged = (found["commands"][n] for n in ("intact", "rounded", "damaged"))
    assert intact[0] == rounded[0] == 0
    assert "within the tolerance of 0.001" in intact[1]
    assert "within the tolerance of 0.5" in rounded[1]
    # Megatron's weights are rounded as well, so that rounding does not hide a mistake.
    assert float(rounded[1].split("logits: ")[1].split(",")[0]) <= 1e-5
    assert damaged[0] == 1
    assert "ABOVE the tolerance of 0.001" in damaged[1]
    assert "do not use it" in damaged[1]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_verification_says_that_there_was_none(
    found: Any, name: str, code: int
) -> None:
    assert found["commands"][name][0] == code
    last = found["commands"][name][1].splitlines()[-1]
    assert last.startswith("interrupted: ")
    assert last.endswith(f"/{name} was written and not verified")


def test_the_model_of_a_gpu_run_is_built_on_a_cpu(found: Any) -> None:
    """Transformer Engine, fp8, graphs and 64 GPUs are how a run computed, not what."""
    attention = 64 * (4 + 2 * 2) * 16 + 64 * 64 + 2 * 16
    # One is shared.
    experts = 8 * 64 + 9 * 3 * 64 * 32
    assert found["gpu run"] == 4 * (attention + experts + 2 * 64) + 64 + 250 * 64


def test_an_export_holds_neither_the_model_nor_a_stack_of_layers(found: Any) -> None:
    gates_and_ups = LARGE.layers * 2 * LARGE.ffn * LARGE.hidden * 4
    assert found["peak bytes"] < gates_and_ups / 2
