"""Phase lengths and token accounting, against the published runs and as properties."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tst import BatchSizes, SuperpositionConfig, SuperpositionSchedule
from megatron_tst.settings.setting_fields import FLAGS, SettingError

SEQUENCE_LENGTH = 4096
BILLION = 10**9


def published(batch_tokens: int, bag_size: int, tst_steps: int, steps: int) -> Any:
    """Schedule of a published run, whose batch is stated in tokens."""
    return SuperpositionSchedule(
        SuperpositionConfig(bag_size=bag_size, steps=tst_steps or None),
        total_steps=steps,
        batch_sizes=BatchSizes.constant(batch_tokens // SEQUENCE_LENGTH),
        sequence_length=SEQUENCE_LENGTH,
    )


@pytest.mark.parametrize(
    ("batch_tokens", "bag_size", "tst_steps", "steps", "tst_billions", "billions", "last_digit"),
    [
        # arXiv 2605.06546, results of the 270M, 600M and 3B models
        (2**21, 1, 0, 20_000, 0, 42, 1),
        (2**21, 6, 6_000, 20_000, 75, 105, 1),
        (2**21, 1, 0, 100_000, 0, 209, 1),
        (2**21, 6, 30_000, 100_000, 377, 524, 1),
        (2**21, 1, 0, 36_000, 0, 75, 1),
        (2**21, 1, 0, 50_000, 0, 105, 1),
        # and of the 10B-A1B model
        (2**23, 1, 0, 125_000, 0, 1_050, 10),
        (2**23, 16, 12_483, 49_983, 1_680, 2_000, 10),
    ],
)
def test_data_tokens_of_published_runs(
    batch_tokens: int,
    bag_size: int,
    tst_steps: int,
    steps: int,
    tst_billions: int,
    billions: int,
    last_digit: int,
) -> None:
    schedule = published(batch_tokens, bag_size, tst_steps, steps)
    # The paper rounds some numbers and truncates others: one unit of the last digit printed.
    tolerance = last_digit * BILLION
    assert schedule.data_tokens(tst_steps) == pytest.approx(tst_billions * BILLION, abs=tolerance)
    assert schedule.data_tokens(steps) == pytest.approx(billions * BILLION, abs=tolerance)


def test_equivalent_and_recovery_tokens_of_the_3b_run() -> None:
    schedule = published(2**21, bag_size=6, tst_steps=6_000, steps=20_000)
    assert round(schedule.equivalent_tokens(20_000) / BILLION) == 42
    recovery = schedule.data_tokens(20_000) - schedule.data_tokens(6_000)
    assert round(recovery / BILLION) == 29


@pytest.mark.parametrize(
    ("step_ratio", "total_steps", "switch_step"),
    [(0.3, 20_000, 6_000), (0.3, 100_000, 30_000), (0.25, 1001, 250), (0.999, 10_000, 9_990)],
)
def test_ratio_is_rounded_to_a_step(step_ratio: float, total_steps: int, switch_step: int) -> None:
    config = SuperpositionConfig(bag_size=6, step_ratio=step_ratio)
    schedule = SuperpositionSchedule(config, total_steps, BatchSizes.constant(512), SEQUENCE_LENGTH)
    assert schedule.switch_step == switch_step
    assert schedule.phases[-1].first_sample == switch_step * 512


def test_phase_and_bag_size_change_exactly_at_the_switch() -> None:
    schedule = SuperpositionSchedule(
        SuperpositionConfig(bag_size=6, steps=30), 100, BatchSizes.constant(8), 128
    )
    assert [schedule.phase_at(step).name for step in (0, 29, 30, 99)] == [
        "superposition",
        "superposition",
        "recovery",
        "recovery",
    ]
    assert [schedule.bag_size_at(step) for step in (0, 29, 30, 99)] == [6, 6, 1, 1]


@pytest.mark.parametrize("variant", ["full", "input-only", "output-only"])
def test_phases_can_be_handed_to_other_processes(variant: str) -> None:
    config = SuperpositionConfig(bag_size=6, steps=30, variant=variant)
    schedule = SuperpositionSchedule(config, 100, BatchSizes.constant(8), 128)
    assert pickle.loads(pickle.dumps(schedule.phases)) == schedule.phases


def test_run_without_superposition_is_all_recovery() -> None:
    schedule = SuperpositionSchedule(
        SuperpositionConfig(bag_size=1, steps=30), 100, BatchSizes.constant(8), 128
    )
    assert (schedule.switch_step, schedule.phases[-1].first_sample) == (0, 0)
    assert (schedule.phase_at(0).name, schedule.bag_size_at(0)) == ("recovery", 1)
    assert schedule.data_tokens(100) == schedule.equivalent_tokens(100)


@pytest.mark.parametrize(
    ("phase_length", "total_steps", "named", "remedy"),
    [
        ({"step_ratio": 0.01}, 10, "--tst-step-ratio 0.01 of 10 steps", "raise it"),
        ({"step_ratio": 0.99}, 10, "--tst-step-ratio 0.99 of 10 steps", "lower it"),
        ({"steps": 10}, 10, "--tst-steps 10 of 10 steps", "lower it"),
        ({"steps": 11}, 10, "--tst-steps 11 of 10 steps", "lower it"),
    ],
)
def test_phase_without_a_step_is_refused(
    phase_length: dict[str, Any], total_steps: int, named: str, remedy: str
) -> None:
    config = SuperpositionConfig(bag_size=4, **phase_length)
    with pytest.raises(SettingError) as refusal:
        SuperpositionSchedule(config, total_steps, BatchSizes.constant(8), 128)
    message = refusal.value.worded(FLAGS)
    assert named in message
    assert remedy in message


@st.composite
def batch_sizes(draw: st.DrawFn) -> BatchSizes:
    """A constant size, or a ramp that the run may or may not reach the end of."""
    rest = draw(st.dictionaries(st.integers(1, 10**6), st.integers(1, 4096), max_size=4))
    return BatchSizes(((0, draw(st.integers(1, 4096))), *sorted(rest.items())))


@st.composite
def schedules(draw: st.DrawFn) -> SuperpositionSchedule:
    total_steps = draw(st.integers(2, 300))
    config = SuperpositionConfig(
        bag_size=draw(st.integers(2, 32)),
        steps=draw(st.integers(1, total_steps - 1)),
        variant=draw(st.sampled_from(["full", "input-only", "output-only"])),
    )
    return SuperpositionSchedule(
        config, total_steps, draw(batch_sizes()), draw(st.integers(1, 2**17))
    )


@given(schedules())
def test_data_tokens_are_the_sum_over_the_steps(schedule: SuperpositionSchedule) -> None:
    read = 0
    for step in range(schedule.total_steps):
        assert schedule.data_tokens(step) == read
        positions = schedule.batch_sizes.size_at(step) * schedule.sequence_length
        read += schedule.phase_at(step).tokens_per_position * positions
    assert schedule.data_tokens(schedule.total_steps) == read


@given(schedules())
def test_a_step_always_reads_at_least_its_latent_positions(
    schedule: SuperpositionSchedule,
) -> None:
    for step in range(schedule.total_steps):
        data = schedule.data_tokens(step + 1) - schedule.data_tokens(step)
        equivalent = schedule.equivalent_tokens(step + 1) - schedule.equivalent_tokens(step)
        assert data >= equivalent > 0


@given(schedules())
def test_output_only_reads_no_extra_text_and_bags_read_s_times_as_much(
    schedule: SuperpositionSchedule,
) -> None:
    switch = schedule.switch_step
    factor = {"full": schedule.config.bag_size, "input-only": schedule.config.bag_size}
    expected = factor.get(schedule.config.variant, 1) * schedule.equivalent_tokens(switch)
    assert schedule.data_tokens(switch) == expected


@given(step_ratio=st.floats(0.001, 0.999), total_steps=st.integers(1, 10_000))
def test_both_phases_have_a_step_or_the_run_is_refused(step_ratio: float, total_steps: int) -> None:
    config = SuperpositionConfig(bag_size=4, step_ratio=step_ratio)
    try:
        schedule = SuperpositionSchedule(config, total_steps, BatchSizes.constant(8), 128)
    except ValueError:
        # Refused only when the ratio is within half a step of either end.
        assert min(step_ratio, 1 - step_ratio) * total_steps <= 0.5 + 1e-9
    else:
        assert 0 < schedule.switch_step < total_steps


@pytest.mark.parametrize("variant", ["full", "input-only", "output-only"])
def test_published_formula_of_data_tokens(variant: str) -> None:
    # data = equivalent * (r * s + 1 - r), for the variants that read bags
    config = SuperpositionConfig(bag_size=6, step_ratio=0.3, variant=variant)
    schedule = SuperpositionSchedule(config, 1000, BatchSizes.constant(8), 128)
    ratio = schedule.data_tokens(1000) / schedule.equivalent_tokens(1000)
    assert ratio == pytest.approx(1.0 if variant == "output-only" else 0.3 * 6 + 0.7, rel=1e-12)
