"""Schedules of batch sizes: Megatron's own calculator is the reference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_tst import BatchSizes


def upstream(text: str, sequence_length: int) -> StepBatchsizeNumMicroBatchesCalculator:
    # Rank 1 does not log.
    return StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, text, sequence_length)


# Ways to write a number.
_WRITTEN = (str, lambda n: f"{n / 1000!r}K", lambda n: f"{n / 10**6!r}m", lambda n: f"{n}.7")


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, int]:
    """A value of the flag with suffixes and fractions, in any order, and a sequence length."""
    length = draw(st.sampled_from([1, 7, 32, 128]))
    samples = draw(st.lists(st.integers(1, 400), max_size=5, unique=True))
    tokens = [draw(st.integers(0, length - 1))]
    tokens += [length * first + draw(st.integers(0, length - 1)) for first in samples]
    pairs = [
        f"{draw(st.sampled_from(_WRITTEN))(first)}:{draw(st.sampled_from(_WRITTEN))(size)}"
        for first, size in zip(
            tokens, draw(st.lists(st.integers(1, 60), min_size=6, max_size=6)), strict=False
        )
    ]
    separator = draw(st.sampled_from([" ", ",", ", "]))
    return separator.join(draw(st.permutations(pairs))), length


def is_taken_upstream(text: str, length: int) -> bool:
    try:
        upstream(text, length)
    except (AssertionError, ValueError):
        return False
    return True


@given(texts())
def test_every_step_has_the_size_that_megatron_gives_it(case: tuple[str, int]) -> None:
    text, length = case
    # A suffix may round a threshold onto its neighbour, or a size to 0.
    if not is_taken_upstream(text, length):
        with pytest.raises(ValueError, match="cannot be used"):
            BatchSizes.parse(text, length)
        return
    sizes, calculator = BatchSizes.parse(text, length), upstream(text, length)
    samples = before = 0
    for step in range(500):
        calculator.update(samples, consistency_check=False)
        assert sizes.samples_at(step) == samples
        assert sizes.size_at(step) == calculator.get_current_global_batch_size()
        assert sizes.changes_at(step) == (step > 0 and sizes.size_at(step) != before)
        assert sizes.steps_to(samples) == step
        assert sizes.steps_to(samples + 1) == step + 1
        before = sizes.size_at(step)
        samples += before


@given(texts())
def test_the_text_of_a_schedule_means_the_schedule(case: tuple[str, int]) -> None:
    text, length = case
    if is_taken_upstream(text, length):
        sizes = BatchSizes.parse(text, length)
        assert BatchSizes.parse(sizes.text(length), length) == sizes


def test_a_long_run_costs_no_more_than_a_short_one() -> None:
    sizes = BatchSizes.parse("0:768 250B:1536 500B:3072 750B:6144", 4096)
    assert sizes.samples_at(10**12) > 6144 * 10**11
    assert sizes.steps_to(sizes.samples_at(10**12)) == 10**12
    assert len(sizes.stages) == 4


def test_an_entry_shorter_than_a_step_is_passed_over() -> None:
    sizes = BatchSizes(((0, 8), (9, 2), (12, 4)))
    assert sizes.stages == ((0, 0, 8), (2, 16, 4))
    assert [sizes.samples_at(step) for step in range(5)] == [0, 8, 16, 20, 24]


def test_stages_ahead_of_a_step() -> None:
    sizes = BatchSizes(((0, 2), (4, 4), (12, 8)))
    assert sizes.stages_from(0) == sizes.stages == ((0, 0, 2), (2, 4, 4), (4, 12, 8))
    assert sizes.stages_from(3) == ((3, 8, 4), (4, 12, 8))
    assert sizes.stages_from(9) == ((9, 52, 8),)


def test_the_largest_size_of_some_steps() -> None:
    sizes = BatchSizes(((0, 2), (4, 8), (20, 4)))
    assert [sizes.largest(*steps) for steps in ((0, 2), (0, 3), (3, 9), (4, 9))] == [2, 8, 8, 4]


def test_a_run_continued_with_other_sizes_keeps_its_past() -> None:
    past, plan = BatchSizes(((0, 2), (4, 4), (100, 8))), BatchSizes(((0, 3), (6, 6), (60, 12)))
    whole = past.continued_by(plan, 20)
    assert whole.entries == ((0, 2), (4, 4), (20, 6), (60, 12))
    assert BatchSizes.constant(4).continued_by(BatchSizes.constant(8), 12).entries == (
        (0, 4),
        (12, 8),
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no batch size is given for the start"),
        ("8", "an entry has no colon"),
        ("0:8 1000", "an entry has no colon"),
        ("0:8 1X:16", "could not convert"),
        ("0:8 inf:16", "infinity"),
        ("1000:8", "no batch size is given for the start"),
        ("-1:4 0:8", "no batch size is given for the start"),
        ("0:8 64:16 65:32", "two batch sizes start at sample 2"),
        ("0:0", "a batch size is 0"),
        ("0:8 1K:-4", "a batch size is -4"),
    ],
)
def test_malformed_schedules_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as refusal:
        BatchSizes.parse(text, 32)
    message = str(refusal.value)
    assert message.startswith(f"--step-batch-size-schedule {text!r} cannot be used: ")
    assert "Write pairs THRESHOLD:BATCH_SIZE" in message
