"""A run survives what happens to long runs: it continues bit-equal, or says why it cannot."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Check, SmallRun, assert_bit_equal
from tests.survival import (
    MAIN,
    SETTINGS,
    SWITCH,
    TOTAL,
    error_lines,
    kill_while_saving,
    last_checkpoint,
    let_go,
    overwrite_weight,
    wait_until_stopped,
)
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

# Its state is saved by weight: by bucket, the file holds memory between the weights that was never
# written, and no two checkpoints are equal.
DISTRIBUTED_OPTIMIZER: dict[str, Any] = {
    "use_distributed_optimizer": True,
    "dist_ckpt_optim_fully_reshardable": True,
}
ASYNC_SAVE: dict[str, Any] = {
    "async_save": True,
    "use_persistent_ckpt_worker": True,
    "async_strategy": "mcore",
}


@pytest.fixture(scope="module")
def single(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """One process that was not interrupted."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("single")).with_(**SETTINGS)
    launcher.run(run.argv, run.log)
    return run


@pytest.fixture(scope="module")
def pair(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Two data-parallel processes that were not interrupted."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("pair"))
    run = run.with_(**SETTINGS, **DISTRIBUTED_OPTIMIZER, bf16=True)
    launcher.run(run.argv, run.log, world_size=2)
    return run


def assert_same_end(run: SmallRun, reference: SmallRun) -> None:
    assert_bit_equal(run.checkpoint(TOTAL), reference.checkpoint(TOTAL))


def test_the_other_rank_ends_when_one_is_killed(
    launcher: Launcher, pair: SmallRun, tmp_path: Path
) -> None:
    run = pair.with_(tmp_path)
    for killed, step, saved in ((1, 2, None), (0, 5, SWITCH)):
        environment = {"STOP_AFTER": str(step)}
        started = launcher.start(run.argv, run.log, 2, main=MAIN, environment=environment)
        wait_until_stopped(started)
        started.kill(killed)
        let_go(started)
        # It takes a fraction of a second: gloo sees the connection close. A peer that hangs without
        # dying is what --distributed-timeout-minutes is for.
        codes = launcher.wait(started)
        assert codes[killed] == -signal.SIGKILL
        assert codes[1 - killed] == 1
        line = started.text.splitlines()[-1]
        expected = f"ended: rank {1 - killed}, step {step + 1}: another rank is gone"
        assert line.startswith(expected), line
        assert (run.folder / "checkpoints").exists() == (saved is not None)
        assert saved is None or last_checkpoint(run) == saved
    launcher.run(run.argv, run.log, 2)
    assert_same_end(run, pair)


def test_a_run_killed_while_saving_continues_from_the_checkpoint_before(
    launcher: Launcher, single: SmallRun, tmp_path: Path
) -> None:
    run = single.with_(tmp_path, save_interval=1)
    stop = {"STOP_IN_SAVE": "3"}
    started = launcher.start(run.argv, run.log, main=MAIN, environment=stop)
    kill_while_saving(launcher, started, run.folder / "checkpoints", 3)
    assert last_checkpoint(run) == 2
    resumed = launcher.run(run.argv, tmp_path / "resumed.txt")
    assert "at iteration 2\n" in resumed.text
    assert_same_end(run, single)


def test_sigterm_to_one_rank_saves_and_exits(
    launcher: Launcher, pair: SmallRun, tmp_path: Path
) -> None:
    run = pair.with_(tmp_path, exit_signal_handler=True)
    environment = {"STOP_AFTER": "2"}
    started = launcher.start(run.argv, run.log, 2, main=MAIN, environment=environment)
    wait_until_stopped(started)
    started.kill(1, signal.SIGTERM)
    let_go(started)
    assert launcher.wait(started) == [0, 0]
    # One step later when another thread takes the signal and the main thread is faster.
    assert last_checkpoint(run) in (2, 3)
    launcher.run(run.argv, run.log, 2)
    assert_same_end(run, pair)


def test_a_run_whose_time_is_over_saves_and_exits(
    launcher: Launcher, single: SmallRun, tmp_path: Path
) -> None:
    run = single.with_(tmp_path)
    limited = run.with_(exit_duration_in_mins=60)
    environment = {"STARTED_SECONDS_AGO": "3601"}
    launcher.run(limited.argv, run.log, main=MAIN, environment=environment)
    assert last_checkpoint(run) == 1
    # With an hour left it runs to its end.
    launcher.run(limited.argv, run.log)
    assert_same_end(run, single)


def test_asynchronous_saves(launcher: Launcher, pair: SmallRun, tmp_path: Path) -> None:
    run = pair.with_(tmp_path, **ASYNC_SAVE, save_interval=2)
    stop = {"STOP_IN_SAVE": str(SWITCH)}
    started = launcher.start(run.argv, run.log, 2, main=MAIN, environment=stop)
    kill_while_saving(launcher, started, run.folder / "checkpoints", SWITCH)
    assert "scheduled an async checkpoint save" in started.text
    assert last_checkpoint(run) == 2
    resumed = launcher.run(run.argv, tmp_path / "resumed.txt", 2)
    assert "at iteration 2\n" in resumed.text
    assert_same_end(run, pair)


def test_asynchronous_saves_need_their_worker(check: Check, single: SmallRun) -> None:
    (message,) = check([single.with_(async_save=True)])
    assert message is not None
    assert message.startswith("--async-save without --use-persistent-ckpt-worker ")


def test_a_full_disk(launcher: Launcher, single: SmallRun, tmp_path: Path) -> None:
    run = single.with_(tmp_path)
    shard = single.folder / "checkpoints" / f"iter_{SWITCH:07d}" / "__0_0.distcp"
    # A limit on the size of files fails a write as a full disk does, and needs no privilege.
    limit = {
        "LIMIT_FILES_AFTER": str(SWITCH + 1),
        "FILE_BYTES": str(shard.stat().st_size * 9 // 10),
    }
    started = launcher.start(run.argv, run.log, main=MAIN, environment=limit)
    assert launcher.wait(started) == [1]
    line = started.text.splitlines()[-1]
    checkpoints = re.escape(str(run.folder / "checkpoints"))
    expected = rf"error: rank 0, step 6: the checkpoint in --save {checkpoints} .* full disk \(.* G"
    assert re.match(expected, line), line
    assert last_checkpoint(run) == SWITCH
    launcher.run(run.argv, run.log)
    assert_same_end(run, single)


@pytest.mark.parametrize(
    ("value", "world_size", "message"),
    [
        (float("nan"), 1, "found NaN in local forward loss calculation"),
        # Finite logits and a finite loss; the squares of the gradients are not.
        (1e25, 2, "found Inf in local grad norm"),
    ],
    ids=["loss", "gradient"],
)
def test_a_number_that_is_not_finite_ends_the_run(
    launcher: Launcher,
    single: SmallRun,
    pair: SmallRun,
    tmp_path: Path,
    value: float,
    world_size: int,
    message: str,
) -> None:
    """In the first step after a start, where Megatron by default does not look."""
    reference = single if world_size == 1 else pair
    # The check of a checkpoint would find the weight before the first step.
    run = reference.with_(tmp_path, save_interval=1, tst_verify_checkpoint="off")
    good = reference.folder / "checkpoints" / "iter_0000003"
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(good, checkpoints / good.name)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    overwrite_weight(checkpoints / good.name, "decoder.final_layernorm.weight", value)
    started = launcher.start(run.argv, run.log, world_size)
    codes = launcher.wait(started)
    assert all(codes)
    lines = [line for line in error_lines(started) if message in line]
    assert lines, started.text[-4000:]
    assert re.match(r"error: rank [01], step 4: ", lines[0])
    assert [path.name for path in checkpoints.glob("iter_*")] == [good.name]
    assert last_checkpoint(run) == 3
