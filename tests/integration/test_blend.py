"""Training on a blend, as Megatron's users write it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.runs import TOTAL_STEPS, Check, SmallRun, assert_bit_equal
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

SWITCH, BAG_SIZE = 5, 4


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shorter than its share of the run: it is read more than once."""
    prefix = tmp_path_factory.mktemp("other") / "text"
    write_corpus(prefix, [50] * 50, vocabulary_size=256)
    return prefix


@pytest.fixture(scope="module")
def reference(
    launcher: Launcher,
    corpus: Path,
    other_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> SmallRun:
    run = SmallRun(corpus, tmp_path_factory.mktemp("blend")).with_(
        data_path=[75, other_corpus, 25, other_corpus.with_name("second")],
        tst_bag_size=BAG_SIZE,
        tst_steps=SWITCH,
        tst_max_epochs=2,
        save_interval=3,
    )
    write_corpus(other_corpus.with_name("second"), [90] * 50, vocabulary_size=256)
    launcher.run(run.argv, run.log)
    return run


def test_a_blend_resumes_bit_equal_at_both_sides_of_the_switch(
    launcher: Launcher, reference: SmallRun, tmp_path: Path
) -> None:
    for stop in (3, 9):
        run = reference.with_(tmp_path / str(stop))
        launcher.run(run.with_(exit_interval=stop).argv, run.log)
        launcher.run(run.argv, run.log)
        assert_bit_equal(run.checkpoint(TOTAL_STEPS), reference.checkpoint(TOTAL_STEPS))


def test_a_blend_does_not_depend_on_the_processes(
    launcher: Launcher, reference: SmallRun, tmp_path: Path
) -> None:
    run = reference.with_(tmp_path)
    shutil.copytree(reference.folder / "cache", run.folder / "cache")
    launcher.run(run.argv, run.log, world_size=2)
    # fp32: the gradients of two processes are summed in another order.
    assert run.scalars()["lm loss"] == pytest.approx(reference.scalars()["lm loss"], rel=1e-5)
    assert run.scalars()["tst/data tokens"] == reference.scalars()["tst/data tokens"]


def test_files_of_arguments_mean_the_same_blend(
    launcher: Launcher, reference: SmallRun, tmp_path: Path
) -> None:
    blend = [str(part) for part in reference.overrides["data-path"]]
    listed = tmp_path / "blend.txt"
    listed.write_text(" ".join(blend))
    run = reference.with_(tmp_path / "listed", data_path=None, data_args_path=listed)
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), reference.checkpoint(TOTAL_STEPS))

    per_split = tmp_path / "per_split.json"
    per_split.write_text(json.dumps({"train": blend, "valid": blend[1:2], "test": blend[1:2]}))
    run = reference.with_(
        tmp_path / "per split", data_path=None, per_split_data_args_path=per_split, split=None
    )
    launcher.run(run.argv, run.log)
    losses = run.scalars()["lm loss"]
    assert losses[1] == pytest.approx(reference.scalars()["lm loss"][1], rel=1e-2)
    assert losses[TOTAL_STEPS] < losses[1]


def test_corpora_without_weights_weigh_what_they_hold(
    launcher: Launcher, reference: SmallRun, tmp_path: Path
) -> None:
    _, first, _, second = reference.overrides["data-path"]
    # An odd number of words: Megatron takes them for paths.
    third = first.with_name("third")
    write_corpus(third, [40] * 25, vocabulary_size=256)
    run = reference.with_(tmp_path, data_path=[first, second, third])
    launcher.run(run.argv, run.log)
    by_size = [2500, first, 4500, second, 1000, third]
    same = reference.with_(tmp_path / "weighed", data_path=by_size)
    launcher.run(same.argv, same.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), same.checkpoint(TOTAL_STEPS))


def test_other_weights_and_foreign_corpora_are_refused(
    check: Check, reference: SmallRun, corpus: Path, tmp_path: Path
) -> None:
    _, first, _, second = reference.overrides["data-path"]
    foreign = tmp_path / "foreign"
    for suffix in (".bin", ".idx"):
        shutil.copy(second.with_suffix(suffix), foreign.with_suffix(suffix))
    for prefix, fingerprint in ((first, "a" * 64), (foreign, "b" * 64)):
        prefix.with_suffix(".json").write_text(json.dumps({"tokenizer_sha256": fingerprint}))
    other_weights, other_type, other_tokenizer = check(
        [
            reference.with_(data_path=[50, first, 50, second]),
            reference.with_(data_path=[50, first, 50, corpus], load=None),
            reference.with_(data_path=[50, first, 50, foreign], load=None),
        ]
    )
    first.with_suffix(".json").unlink()
    for message, expected in (
        (
            other_weights,
            r"--data-path with the weights \[\[75\.0, 25\.0\]\], .* \[\[50\.0, 50\.0\]\]",
        ),
        (other_type, "the token type uint16, and .* with int32: run tst preprocess"),
        (other_tokenizer, "the tokenizer b{16}, and .* with a{16}: run tst preprocess"),
    ):
        assert re.search(expected, message or ""), message
