"""Superposition settings: defaults, weights, and a refusal that helps for every bad value."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from itertools import pairwise
from math import exp, isclose, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tst import SuperpositionConfig
from megatron_tst.settings.config import WEIGHTINGS
from megatron_tst.settings.setting_fields import FLAGS, SettingError


def config(**settings: Any) -> SuperpositionConfig:
    """A valid configuration of bag size 4 with the given settings in place of the defaults."""
    if "schedule" in settings:
        return SuperpositionConfig(**settings)
    length = {} if {"steps", "step_ratio"} & settings.keys() else {"step_ratio": 0.3}
    return SuperpositionConfig(**{"bag_size": 4} | length | settings)


@pytest.mark.parametrize(
    ("settings", "flag", "value", "remedy"),
    [
        ({"bag_size": 0}, "--tst-bag-size", "0", "use 1 to turn superposition off"),
        ({"bag_size": -2}, "--tst-bag-size", "-2", "use 1 to turn superposition off"),
        ({"variant": "both"}, "--tst-variant", "'both'", "full, input-only, output-only"),
        ({"objective": "ce"}, "--tst-objective", "'ce'", "mce, mce-sum, bce, hinge"),
        ({"reset_at_switch": "all"}, "--tst-reset-at-switch", "'all'", "none, embeddings"),
        ({"target_weighting": "1/i"}, "--tst-target-weighting", "'1/i'", "uniform, power-law"),
        ({"step_ratio": 0.3, "steps": 7}, "--tst-step-ratio", "0.3", "pass one of them"),
        ({"step_ratio": 0.3, "steps": 7}, "--tst-steps", "7", "pass one of them"),
        ({"step_ratio": 0.0}, "--tst-step-ratio", "0.0", "between 0 and 1"),
        ({"step_ratio": 1.0}, "--tst-step-ratio", "1.0", "between 0 and 1"),
        ({"step_ratio": nan}, "--tst-step-ratio", "nan", "between 0 and 1"),
        ({"steps": 0}, "--tst-steps", "0", "use --tst-bag-size 1"),
        ({"steps": None}, "--tst-bag-size", "4", "pass --tst-step-ratio"),
        ({"schedule": "8:0.1,4"}, "--tst-schedule", "'8:0.1,4'", "write bag size:share"),
        ({"schedule": ""}, "--tst-schedule", "''", "write bag size:share"),
        ({"schedule": "8:-0.1"}, "--tst-schedule", "'8:-0.1'", "write bag size:share"),
        ({"schedule": "8:0.1,1:0.2"}, "--tst-schedule", "'8:0.1,1:0.2'", "are 2 or more"),
        ({"schedule": "8:.1,8:.1"}, "--tst-schedule", "'8:.1,8:.1'", "bag size 8 follows itself"),
        ({"schedule": "8:0.1,4:5"}, "--tst-schedule", "'8:0.1,4:5'", "mixes shares with whole"),
        ({"schedule": "8:0.1,4:0.0"}, "--tst-schedule", "'8:0.1,4:0.0'", "above 0"),
        ({"schedule": "8:0,4:3"}, "--tst-schedule", "'8:0,4:3'", "above 0"),
        ({"schedule": "8:0.6,4:0.4"}, "--tst-schedule", "'8:0.6,4:0.4'", "add up to 1, keep"),
        ({"schedule": "8:3", "bag_sizes": "2,4"}, "--tst-bag-sizes", "2,4", "pass one of them"),
        ({"bag_sizes": "2", "bag_size": 1}, "--tst-bag-sizes", "'2'", "one as --tst-bag-size"),
        ({"bag_sizes": "4,4", "bag_size": 1}, "--tst-bag-sizes", "'4,4'", "each once"),
        ({"bag_sizes": "1,4", "bag_size": 1}, "--tst-bag-sizes", "'1,4'", "2 or more"),
        ({"bag_sizes": "2:1,4", "bag_size": 1}, "--tst-bag-sizes", "'2:1,4'", "or none of them"),
        ({"bag_sizes": "2:0,4:1", "bag_size": 1}, "--tst-bag-sizes", "'2:0,4:1'", "above 0"),
        ({"bag_sizes": "2-4", "bag_size": 1}, "--tst-bag-sizes", "'2-4'", "with commas"),
        ({"bag_sizes": "2,8", "bag_size": 4}, "--tst-bag-size", "4", "pass one of them"),
        (
            {"bag_sizes": "2,4", "bag_size": 1, "step_ratio": None},
            *("--tst-bag-sizes", "2,4", "pass --tst-step-ratio"),
        ),
        ({"schedule": "8:3", "bag_size": 8}, "--tst-bag-size", "8", "pass one of them"),
        ({"schedule": "8:3", "step_ratio": 0.3}, "--tst-step-ratio", "0.3", "pass one of them"),
        ({"schedule": "8:3", "steps": 5}, "--tst-schedule", "8:3", "pass one of them"),
        ({"power_law_exponent": nan}, "--tst-power-law-exponent", "nan", "a finite number"),
        ({"power_law_exponent": 11.0}, "--tst-power-law-exponent", "11.0", "between -10 and 10"),
        (
            {"objective": "bce", "target_weighting": "power-law"},
            "--tst-target-weighting",
            "power-law",
            "use uniform",
        ),
        (
            {"objective": "hinge", "target_weighting": "exponential"},
            "--tst-target-weighting",
            "exponential",
            "use uniform",
        ),
    ],
)
def test_bad_value_is_refused_with_flag_value_and_remedy(
    settings: dict[str, Any], flag: str, value: str, remedy: str
) -> None:
    with pytest.raises(SettingError) as refusal:
        config(**settings)
    message = refusal.value.worded(FLAGS)
    assert f"{flag} {value}" in message or f"{flag} is {value}" in message
    assert remedy in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bag_size": 2.5}, "bag_size is 2.5: use a whole number."),
        ({"bag_size": True}, "bag_size is True: use a whole number."),
        ({"bag_size": None}, "bag_size is None: use a whole number."),
        ({"steps": "7"}, "steps is '7': use a whole number."),
        ({"step_ratio": "0.3"}, "step_ratio is '0.3': use a number."),
        ({"power_law_exponent": None}, "power_law_exponent is None: use a number."),
        ({"variant": ["full"]}, r"variant is \['full'\]: use text."),
        ({"steps": 0}, "steps is 0: .* use bag_size=1 for a run"),
        (
            {"objective": "bce", "target_weighting": "power-law"},
            "target_weighting=power-law has no meaning with objective=bce",
        ),
    ],
)
def test_python_is_told_of_its_arguments_and_of_other_types(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        config(**settings)


def test_braces_in_a_value_are_text() -> None:
    with pytest.raises(SettingError, match=r"variant is '\{steps\}': choose") as refusal:
        config(variant="{steps}")
    assert refusal.value.worded(FLAGS).startswith("--tst-variant is '{steps}': choose")


def test_numbers_of_numpy_are_numbers() -> None:
    settings = config(bag_size=np.int64(4), step_ratio=np.float64(0.25))
    assert settings == config(bag_size=4, step_ratio=0.25)


def test_default_is_an_ordinary_run() -> None:
    default = SuperpositionConfig()
    assert not default.enabled
    assert not default.superposes_input
    assert not default.superposes_output


def test_bag_size_one_needs_no_phase_length_but_accepts_one() -> None:
    # The baseline arm of a comparison differs from the other arm in --tst-bag-size alone.
    assert not SuperpositionConfig(bag_size=1, step_ratio=0.3).enabled


@pytest.mark.parametrize(
    ("variant", "input_side", "output_side"),
    [("full", True, True), ("input-only", True, False), ("output-only", False, True)],
)
def test_variant_selects_the_superposed_sides(
    variant: str, input_side: bool, output_side: bool
) -> None:
    settings = config(variant=variant)
    assert (settings.superposes_input, settings.superposes_output) == (input_side, output_side)


@pytest.mark.parametrize(
    ("settings", "weighting"),
    [
        ({"bag_size": 2}, "uniform"),
        ({"bag_size": 7}, "uniform"),
        ({"bag_size": 8}, "power-law"),
        ({"bag_size": 16}, "power-law"),
        ({"bag_size": 16, "objective": "mce-sum"}, "power-law"),
        ({"bag_size": 16, "objective": "bce"}, "uniform"),
        ({"bag_size": 16, "objective": "hinge"}, "uniform"),
        ({"bag_size": 16, "target_weighting": "uniform"}, "uniform"),
        ({"bag_size": 2, "target_weighting": "power-law"}, "power-law"),
    ],
)
def test_weighting_defaults_to_the_published_choice(
    settings: dict[str, Any], weighting: str
) -> None:
    assert config(**settings).target_weighting == weighting


@pytest.mark.parametrize(
    ("weighting", "raw"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("power-law", [1, 1 / 2, 1 / 3, 1 / 4]),
        ("exponential", [exp(-1), exp(-2), exp(-3), exp(-4)]),
        ("first-token", [1, 0, 0, 0]),
    ],
)
def test_weights_follow_their_law(weighting: str, raw: list[float]) -> None:
    weights = config(target_weighting=weighting).target_weights()
    assert weights == pytest.approx([weight / sum(raw) for weight in raw], rel=1e-12)


def test_exponent_sets_the_power_law() -> None:
    weights = config(target_weighting="power-law", power_law_exponent=1.25).target_weights()
    assert weights[3] / weights[0] == pytest.approx(4**-1.25, rel=1e-12)


@given(
    bag_size=st.integers(2, 1024),
    weighting=st.sampled_from(sorted(WEIGHTINGS)),
    exponent=st.floats(0, 10),
)
def test_weights_sum_to_one_and_never_rise(bag_size: int, weighting: str, exponent: float) -> None:
    weights = config(
        bag_size=bag_size, target_weighting=weighting, power_law_exponent=exponent
    ).target_weights()
    assert len(weights) == bag_size
    # 1024 additions of double precision numbers.
    assert isclose(sum(weights), 1.0, rel_tol=1e-12)
    assert all(earlier >= later >= 0.0 for earlier, later in pairwise(weights))


def test_resolved_replaces_the_ratio_by_steps_and_keeps_the_rest() -> None:
    settings = config(bag_size=16, step_ratio=0.25, variant="input-only")
    resolved = settings.resolved(switch_step=250)
    assert (resolved.step_ratio, resolved.steps) == (None, 250)
    assert resolved.resolved(switch_step=250) == resolved
    unchanged = settings.to_dict().keys() - {"step_ratio", "steps"}
    assert all(resolved.to_dict()[name] == settings.to_dict()[name] for name in unchanged)


def test_resolved_of_an_ordinary_run_has_no_phase_length() -> None:
    resolved = SuperpositionConfig(bag_size=1, step_ratio=0.3).resolved(switch_step=0)
    assert (resolved.step_ratio, resolved.steps) == (None, None)


def test_dict_holds_resolved_values_and_restores_the_settings() -> None:
    settings = config(bag_size=8)
    assert settings.to_dict()["target_weighting"] == "power-law"
    assert SuperpositionConfig(**settings.to_dict()) == settings


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        config().bag_size = 2  # type: ignore[misc]


def test_settings_and_schedule_import_neither_torch_nor_megatron() -> None:
    # Launch scripts plan runs on login nodes, where neither is installed.
    program = (
        "import sys\n"
        "from megatron_tst import BatchSizes, SuperpositionConfig, SuperpositionSchedule\n"
        "s = SuperpositionConfig(4, 0.3)\n"
        "SuperpositionSchedule(s, 10, BatchSizes.constant(8), 128).data_tokens(10)\n"
        "print(*sorted({'torch', 'megatron', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
