"""A run is started again with other settings of the evaluation, or when it is done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.runs import TOTAL_STEPS, SmallRun
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

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
    settings: dict[str, Any] = {"tst_bag_size": 4, "tst_steps": 5}
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
    expected = f"validation loss at iteration {TOTAL_STEPS} on validation set | lm loss value: "
    value = float(started.text.split(expected)[1].split()[0])
    assert value == pytest.approx(losses[VALIDATION][TOTAL_STEPS], rel=1e-6)
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
