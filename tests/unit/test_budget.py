"""What a run reads of each corpus, against what its datasets read."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tst import BatchSizes, SuperpositionConfig, SuperpositionSchedule
from megatron_tst.data.blend import samples_by_corpus
from megatron_tst.data.budget import TrainText, data_budget, refuse_repetition
from megatron_tst.settings.config import DocumentBoundary
from megatron_tst.training.data_budget import check_data_budget
from tests.corpus import write_corpus
from tests.datasets import DOCUMENT_LENGTHS, TRAIN, VARIANTS, build, build_train, make_config

TOKENS = sum(DOCUMENT_LENGTHS)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget") / "text"
    write_corpus(path, DOCUMENT_LENGTHS)
    return path


def schedule(
    steps: int = 12,
    tst_steps: int = 4,
    bag_size: int = 3,
    variant: str = "full",
    boundary: DocumentBoundary = "cross",
) -> SuperpositionSchedule:
    """Two sequences of four positions a step."""
    config = SuperpositionConfig(
        bag_size=bag_size, steps=tst_steps, variant=variant, document_boundary=boundary
    )
    return SuperpositionSchedule(config, steps, BatchSizes.constant(2), 4)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_text_of_a_split_is_counted_as_upstream_splits(prefix: Path, share: float) -> None:
    documents = round(share * len(DOCUMENT_LENGTHS))
    lengths = DOCUMENT_LENGTHS[:documents]
    text = TrainText(str(prefix), share)
    assert text.tokens == sum(lengths)
    assert text.positions(1) == text.tokens
    assert text.positions(4) == sum(-(-length // 4) * 4 for length in lengths)


@pytest.mark.parametrize("variant", VARIANTS)
def test_need_is_what_the_dataset_reads(prefix: Path, variant: str) -> None:
    plan = schedule(variant=variant)
    dataset = build_train(prefix, 24, 3, variant, switch_sample=plan.phases[-1].first_sample)
    read = [dataset[place]["tokens"].numel() for place in range(24)]
    (budget,) = data_budget(plan, [TrainText(str(prefix))], [1.0])
    assert budget.phase_1 == sum(read[:8])
    assert budget.phase_2 == sum(read[8:])
    assert budget.phase_1_padding == 0
    assert budget.epochs == sum(read) / TOKENS


def test_padding_of_aligned_bags_is_no_text(prefix: Path) -> None:
    # One epoch of phase 1, so that the share of padding is that of the corpus.
    multiple = 3
    positions = sum(-(-length // multiple) * multiple for length in DOCUMENT_LENGTHS)
    plan = schedule(steps=16, tst_steps=positions // 24, boundary="align")
    (budget,) = data_budget(plan, [TrainText(str(prefix))], [1.0])
    dataset = build_train(
        prefix, 32, multiple, document_boundary="align", switch_sample=plan.phases[-1].first_sample
    )
    tokens = np.concatenate(
        [dataset[i]["tokens"].ravel() for i in range(plan.phases[-1].first_sample)]
    )
    assert budget.phase_1 + budget.phase_1_padding == len(tokens)
    # All but the last samples of the epoch.
    assert budget.phase_1 == pytest.approx((tokens >= 0).sum(), abs=24)
    assert budget.phase_1_padding > 5


@pytest.mark.parametrize(
    ("sizes", "in_bags_of_8"),
    # Documents of 17 tokens take 24 places in bags of 8, and 18 in bags of 2.
    [({"schedule": "8:100,2:400"}, 100), ({"bag_sizes": "8,2", "steps": 500}, None)],
)
def test_padding_is_counted_for_each_bag_size(
    tmp_path: Path, sizes: dict[str, Any], in_bags_of_8: int | None
) -> None:
    write_corpus(tmp_path / "text", [17] * 30)
    config = SuperpositionConfig(document_boundary="align", **sizes)
    plan = SuperpositionSchedule(config, 1000, BatchSizes.constant(4), 64)
    datasets = make_config(tmp_path / "text", superposition=config, phases=plan.stretches)
    args = Namespace(tst_max_epochs=1e9)
    found = check_data_budget(args, plan, datasets)
    for step in (100, 500, 1000):
        bags = [found.bag_size_at(each) for each in range(step)]
        steps_of = {size: bags.count(size) for size in (8, 2, 1)}
        assert in_bags_of_8 in (steps_of[8], None)
        text = 4 * 64 * (steps_of[8] * 8 * 17 / 24 + steps_of[2] * 2 * 17 / 18 + steps_of[1])
        assert found.data_tokens(step) == pytest.approx(text, abs=2)
    (budget,) = args.tst_data_budget
    assert found.data_tokens(500) == pytest.approx(budget["phase_1"], abs=2)


def test_a_blend_needs_its_weights_in_each_phase(prefix: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", [500])
    texts = [TrainText(str(prefix)), TrainText(str(tmp_path / "text"))]
    plan = schedule(steps=40, tst_steps=12)
    weights = [30.0, 70.0]
    in_phase_1 = samples_by_corpus(weights, plan.phases[-1].first_sample)
    in_both = samples_by_corpus(weights, 80)
    for i, budget in enumerate(data_budget(plan, texts, weights)):
        assert budget.phase_1 == pytest.approx(12 * in_phase_1[i], abs=2 * 12)
        assert budget.phase_2 == pytest.approx(4 * (in_both[i] - in_phase_1[i]), abs=2 * 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_drawn_sizes_are_counted_as_a_blend_reads_them(
    prefix: Path, tmp_path: Path, variant: str
) -> None:
    write_corpus(tmp_path / "text", [500])
    paths = [str(prefix), str(tmp_path / "text")]
    config = SuperpositionConfig(bag_sizes="2,3,5", steps=12, variant=variant)
    ramp = BatchSizes(((0, 1), (7, 3), (20, 2)))
    plan = SuperpositionSchedule(config, 20, ramp, 4, seed=3)
    samples = ramp.samples_at(20)
    for weights in ([1.0], [30.0, 70.0]):
        blend = paths[: len(weights)], weights if len(weights) > 1 else None
        settings = make_config(prefix, superposition=config, phases=plan.stretches, blend=blend)
        dataset = build(settings, [samples, 0, 0])[TRAIN]
        read = np.zeros((2, 2), dtype=int)
        for place in range(samples):
            corpus = int(dataset.dataset_index[place]) if len(weights) > 1 else 0
            in_bags = int(place < plan.phases[-1].first_sample)
            read[corpus, in_bags] += dataset[place]["tokens"].numel()
        texts = [TrainText(path) for path in paths[: len(weights)]]
        found = [(b.phase_2, b.phase_1) for b in data_budget(plan, texts, weights)]
        assert found == [tuple(row) for row in read[: len(weights)].tolist()]
        assert plan.data_tokens(20) == read.sum()


def refusal(plan: SuperpositionSchedule, prefix: Path) -> str:
    with pytest.raises(ValueError, match="--tst-max-epochs is 1") as error:
        refuse_repetition(plan, [TrainText(str(prefix))], [1.0], 1.0)
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "way_out"),
    [
        (SuperpositionConfig(bag_sizes="3,9", steps=12), "smaller bags in --tst-bag-sizes, or"),
        (SuperpositionConfig(schedule="3:6,9:6"), "smaller bags or fewer steps in --tst-schedule"),
    ],
)
def test_ways_out_of_several_sizes(prefix: Path, config: SuperpositionConfig, way_out: str) -> None:
    plan = SuperpositionSchedule(config, 20, BatchSizes.constant(2), 4)
    message = refusal(plan, prefix)
    assert f"Use {way_out}" in message
    assert "--tst-variant output-only reads no more tokens" in message
    assert "no gain of it is shown" in message


def fits(plan: SuperpositionSchedule, prefix: Path) -> bool:
    (budget,) = data_budget(plan, [TrainText(str(prefix))], [1.0])
    return budget.epochs <= 1


def number_after(flag: str, message: str) -> float:
    found = re.search(rf"{flag} (\d+(\.\d+)?)", message)
    assert found is not None, message
    return float(found[1])


@pytest.mark.parametrize("boundary", ["cross", "align"])
@pytest.mark.parametrize(("steps", "tst_steps", "bag_size"), [(20, 8, 4), (25, 6, 6), (20, 4, 16)])
def test_the_settings_that_fit_are_the_largest(
    prefix: Path, steps: int, tst_steps: int, bag_size: int, boundary: DocumentBoundary
) -> None:
    plan = schedule(steps, tst_steps, bag_size, boundary=boundary)
    message = refusal(plan, prefix)
    (budget,) = data_budget(plan, [TrainText(str(prefix))], [1.0])
    assert f"of {TOKENS:,}." in message
    assert f"{budget.needed:,} tokens ({budget.phase_1:,} in phase 1)" in message
    largest = int(number_after("--tst-bag-size", message))
    longest = int(number_after("--tst-steps", message))
    for more in (0, 1):
        for config in (
            replace(plan.config, bag_size=largest + more),
            replace(plan.config, steps=longest + more),
        ):
            assert fits(replace(plan, config=config), prefix) == (more == 0)
    assert "--tst-variant output-only reads no more tokens" in message
    allowed = number_after("or --tst-max-epochs", message)
    refuse_repetition(plan, [TrainText(str(prefix))], [1.0], allowed)


def test_a_ratio_is_answered_with_a_ratio_that_fits(prefix: Path) -> None:
    config = SuperpositionConfig(bag_size=4, step_ratio=0.4)
    plan = SuperpositionSchedule(config, 20, BatchSizes.constant(2), 4)
    ratio = number_after("--tst-step-ratio", refusal(plan, prefix))
    good = replace(plan, config=replace(config, step_ratio=ratio))
    bad = replace(plan, config=replace(config, step_ratio=ratio + 1 / 20))
    assert fits(good, prefix)
    assert not fits(bad, prefix)


def test_text_that_is_too_short_for_any_run(prefix: Path) -> None:
    assert "Even without bags its tokens would not suffice" in refusal(schedule(60), prefix)
    message = refusal(schedule(60, variant="output-only"), prefix)
    assert "Even without bags" in message


def test_an_epoch_that_is_read_to_its_last_token_is_no_repetition(tmp_path: Path) -> None:
    plan = schedule(steps=12, tst_steps=4, bag_size=3)
    needed = plan.data_tokens(12)
    for tokens, is_enough in ((needed, True), (needed - 1, False)):
        path = tmp_path / str(tokens)
        write_corpus(path, [tokens])
        if is_enough:
            refuse_repetition(plan, [TrainText(str(path))], [1.0], 1.0)
        else:
            refusal(plan, path)
