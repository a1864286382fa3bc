"""A run is started again: with another evaluation, when it is done, or before its first step."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import write_corpus
from tests.runs import TOTAL_STEPS, Check, SmallRun, assert_bit_equal
from tests.zygote import Launcher, Run

pytestmark = pytest.mark.slow

SUPERPOSED: dict[str, Any] = {"tst_bag_size": 4, "tst_steps": 5}
VALIDATION = "lm loss validation"


@pytest.fixture(scope="module", params=["superposition", "blend"])
def run(
    request: pytest.FixtureRequest,
    launcher: Launcher,
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> SmallRun:
    """Evaluated at 4, 8 and at the end; checkpoints at 4, 9 and at the end among others.

    Of a blend Megatron plans exactly the samples that it reads, with superposition or without.
    """
    folder = tmp_path_factory.mktemp("run")
    settings = SUPERPOSED
    if request.param == "blend":
        for suffix in (".bin", ".idx"):
            shutil.copyfile(f"{corpus}{suffix}", folder / f"other{suffix}")
        settings = {"data_path": [60, corpus, 40, folder / "other"]}
    run = SmallRun(corpus, folder).with_(**settings)
    launcher.run(run.with_(save_interval=4, exit_interval=9).argv, run.log)
    launcher.run(run.argv, run.log)
    return run


def continued(
    launcher: Launcher, run: SmallRun, folder: Path, step: int, **settings: Any
) -> dict[int, float]:
    """The validation losses of a run that goes on from a checkpoint with other settings."""
    other = run.with_(folder, load=run.folder / "checkpoints", ckpt_step=step, **settings)
    shutil.copytree(run.folder / "cache", folder / "cache")
    launcher.run(other.argv, other.log)
    return other.scalars().get(VALIDATION, {})


def test_settings_of_the_evaluation_may_change_at_a_resume(
    launcher: Launcher, run: SmallRun, tmp_path: Path
) -> None:
    expected = run.scalars()[VALIDATION]
    assert sorted(expected) == [4, 8, TOTAL_STEPS]
    later = continued(launcher, run, tmp_path / "later", 4, eval_interval=2, start_eval_at_iter=8)
    assert sorted(later) == [8, 10, TOTAL_STEPS]
    assert [later[step] for step in (8, TOTAL_STEPS)] == [expected[8], expected[TOTAL_STEPS]]
    # Another number of samples: those of a run that evaluated like this from its beginning.
    shorter = continued(launcher, run, tmp_path / "shorter", 9, eval_iters=1)
    never_resumed = run.with_(tmp_path / "never resumed", eval_iters=1)
    launcher.run(never_resumed.argv, never_resumed.log)
    assert shorter == {TOTAL_STEPS: never_resumed.scalars()[VALIDATION][TOTAL_STEPS]}
    assert shorter[TOTAL_STEPS] != expected[TOTAL_STEPS]
    assert continued(launcher, run, tmp_path / "off", 9, eval_iters=0) == {}


def evaluated(started: Run) -> float:
    """The loss that the evaluation after training prints."""
    printed = f"validation loss at iteration {TOTAL_STEPS} on validation set | lm loss value: "
    return float(started.text.split(printed)[1].split()[0])


def files(folder: Path) -> dict[Path, int]:
    """When each file was written, but the event files: each start makes one."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in paths if "tfevents" not in path.name}


def test_a_run_that_is_done_is_evaluated_again_and_writes_nothing_twice(
    launcher: Launcher, run: SmallRun, tmp_path: Path
) -> None:
    before, losses = files(run.folder), run.scalars()
    started = launcher.run(run.argv, tmp_path / "log.txt")
    assert f"the run is done: --load {run.folder / 'checkpoints'} has done 12 of 12" in started.text
    assert evaluated(started) == pytest.approx(losses[VALIDATION][TOTAL_STEPS], rel=1e-6)
    assert files(run.folder) == before
    newest = max((run.folder / "tensorboard").glob("*tfevents*"), key=lambda p: p.stat().st_mtime)
    logged = tmp_path / "tensorboard"
    logged.mkdir()
    shutil.copy(newest, logged)
    assert SmallRun(run.corpus, tmp_path).scalars() == {}

    # Killed between its last checkpoint and its last evaluation.
    shutil.rmtree(logged)
    launcher.run(run.with_(tensorboard_dir=logged).argv, tmp_path / "log.txt")
    assert SmallRun(run.corpus, tmp_path).scalars()[VALIDATION] == {
        TOTAL_STEPS: losses[VALIDATION][TOTAL_STEPS]
    }
    assert files(run.folder) == before


@pytest.fixture(scope="module")
def sets(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SmallRun, list[Path]]:
    """A run with superposition that evaluates two whole sets, of 8 samples and of 4."""
    folder = tmp_path_factory.mktemp("sets")
    names = [folder / name for name in ("train", "long", "short")]
    for name, lengths in zip(names, ([90] * 50, [257], [129]), strict=True):
        write_corpus(name, lengths, vocabulary_size=256)
    settings: dict[str, Any] = {"multiple_validation_sets": True, "full_validation": True}
    run = SmallRun(corpus, folder).with_(
        **SUPERPOSED,
        **settings,
        **{"data_path": None, "split": None, "train_data_path": names[0]},
        valid_data_path=names[1:],
        validation_set_names=["long", "short"],
    )
    launcher.run(run.argv, run.log)
    return run, names


def test_whole_validation_sets_are_evaluated_and_other_text_without_training(
    launcher: Launcher, sets: tuple[SmallRun, list[Path]], tmp_path: Path
) -> None:
    run, (_, *valid) = sets
    losses = run.scalars()
    for path, samples in zip(valid, (8, 4), strict=True):
        whole = losses[f"{VALIDATION}-{path.name}"]
        assert sorted(whole) == [4, 8, TOTAL_STEPS]
        # Other text than that of the run, which is not built an index of text to train on.
        alone = run.with_(
            tmp_path / path.name,
            **{"skip_train": True, "load": run.folder / "checkpoints", "eval_iters": samples // 4},
            **{"data_path": path, "split": "0,100,0", "train_data_path": None},
            **dict.fromkeys(
                [
                    *("multiple_validation_sets", "full_validation"),
                    *("validation_set_names", "valid_data_path"),
                ]
            ),
        )
        started = launcher.run(alone.argv, alone.log)
        # One sample at a time, or two: other sums in fp32.
        assert evaluated(started) == pytest.approx(whole[TOTAL_STEPS], rel=1e-5)
        assert not list((alone.folder / "cache").glob("*-train*"))


def test_what_cannot_be_evaluated_or_resumed_is_refused(
    check: Check, launcher: Launcher, sets: tuple[SmallRun, list[Path]], small_run: SmallRun
) -> None:
    plain, both = small_run.with_(**SUPERPOSED), sets[0].with_(load=None)
    launcher.run(
        small_run.with_(fp16=True, exit_interval=2, eval_interval=100).argv,
        small_run.log,
        main="tests.stock_gpt:main",
    )
    parallel: dict[str, Any] = {"tensor_model_parallel_size": 2}
    cases: list[tuple[SmallRun, str | None]] = [
        (plain.with_(load=None, ckpt_format="torch"), "--ckpt-format torch does not work with"),
        (plain.with_(load=None, full_validation=True), "without --multiple-validation-sets"),
        (plain.with_(load=None, multiple_validation_sets=True), "without --full-validation"),
        (both.with_(multiple_validation_sets=None, full_validation=None), "names the sets of"),
        (both.with_(**parallel), "expect --eval-micro-batch-size 2: pass"),
        (both.with_(**parallel, eval_micro_batch_size=1), None),
        (small_run.with_(fp16=True), "iter_0000002 holds no state of the optimizer, because"),
        (small_run.with_(fp16=True, no_load_optim=True), None),
    ]
    messages = check([run for run, _ in cases])
    for (_, expected), message in zip(cases, messages, strict=True):
        assert (message is None) == (expected is None), message
        assert expected is None or re.search(expected, message or ""), message

    late = [
        (both.with_(validation_set_names=["one"]), "does not name each of the validation sets"),
        (
            plain.with_(
                load=None, full_validation=True, multiple_validation_sets=True, split="80,10,10"
            ),
            "does not work with test data",
        ),
    ]
    for run, expected in late:
        started = launcher.start(run.argv, run.log)
        assert launcher.wait(started) == [2]
        assert expected in started.text


def test_an_fp16_run_goes_on_from_before_its_first_step(
    launcher: Launcher, small_run: SmallRun, tmp_path: Path
) -> None:
    """Its first steps are skipped, until the loss scale fits."""
    whole = small_run.with_(
        **SUPERPOSED, fp16=True, initial_loss_scale=2**21, hysteresis=1, eval_iters=0
    )
    launcher.run(whole.argv, whole.log)
    scales = list(whole.scalars()["loss-scale"].values())
    assert scales[0] > scales[1] > scales[2] > scales[3]
    stopped = whole.with_(tmp_path / "stopped")
    launcher.run(stopped.with_(exit_interval=2).argv, stopped.log)
    launcher.run(stopped.argv, stopped.log)
    assert_bit_equal(stopped.checkpoint(TOTAL_STEPS), whole.checkpoint(TOTAL_STEPS))
