"""Non-persistent checkpoints: a run goes on from the newest, and is compared with that one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.layouts import arguments_of
from tests.runs import Check, SmallRun, assert_bit_equal
from tests.survival import (
    MAIN,
    SETTINGS,
    SWITCH,
    TOTAL,
    kill,
    last_checkpoint,
    wait_until_stopped,
)
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

NON_PERSISTENT: dict[str, Any] = {
    "non_persistent_ckpt_type": "global",
    "non_persistent_save_interval": 1,
}


@pytest.fixture(scope="module")
def reference(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> SmallRun:
    """Two expert-parallel processes, which draw random numbers of their own, uninterrupted."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("persistent")).with_(
        **{**SETTINGS, **arguments_of("Qwen3-MoE", "EP 2, alltoall")},
        moe_router_force_load_balancing=True,
        micro_batch_size=1,
    )
    launcher.run(run.argv, run.log, 2)
    return run


def newest(run: SmallRun) -> list[str]:
    folders = (run.folder / "checkpoints" / "non_persistent").glob("iter_*")
    return sorted(folder.name for folder in folders)


def test_a_killed_run_resumes_bit_equal_from_the_newest(
    launcher: Launcher, check: Check, reference: SmallRun, tmp_path: Path
) -> None:
    run = reference.with_(tmp_path, **NON_PERSISTENT)
    saves = run.folder / "checkpoints"
    for stop, start in ((3, 0), (6, 2)):
        log = tmp_path / f"to {stop}.txt"
        environment = {"STOP_AFTER": str(stop)}
        started = launcher.start(run.argv, log, 2, main=MAIN, environment=environment)
        wait_until_stopped(started)
        kill(launcher, started)
        # One is removed before the next is saved.
        assert newest(run)[-1] == f"iter_{stop - 1:07d}"
        assert len(newest(run)) <= 2
        assert not start or f"at iteration {start}\n" in started.text
    assert last_checkpoint(run) == SWITCH

    # The settings that count are those of the checkpoint that Megatron loads, of step 5.
    begun = saves / "latest_checkpointed_iteration.txt"
    kept = begun.read_text()
    begun.unlink()
    other = run.with_(tst_bag_size=2)
    anew = run.with_(pretrained_checkpoint=reference.folder / "checkpoints")
    refused = check([run, other, anew])
    assert refused[0] is None
    assert "was trained with --tst-bag-size 4, and this command has 2" in (refused[1] or "")
    assert re.search("--pretrained-checkpoint .* leave it out .*/iter_0000005", refused[2] or "")
    begun.write_text(kept)

    finished = launcher.run(run.argv, tmp_path / "finished.txt", 2)
    assert "at iteration 5\n" in finished.text
    assert_bit_equal(run.checkpoint(TOTAL), reference.checkpoint(TOTAL))
    # It was read where it lies: the losses of all launches are those of the uninterrupted run.
    assert run.scalars()["lm loss"] == reference.scalars()["lm loss"]


def test_what_cannot_be_loaded_is_refused(
    check: Check, reference: SmallRun, tmp_path: Path
) -> None:
    load = tmp_path / "checkpoints"
    passing = load / "non_persistent"
    saved = reference.folder / "checkpoints"
    shutil.copytree(saved / "iter_0000003", load / "iter_0000003")
    shutil.copytree(saved / "iter_0000006", passing / "iter_0000006")
    (load / "latest_checkpointed_iteration.txt").write_text("3")
    tracker = passing / "latest_checkpointed_iteration.txt"
    tracker.write_text("6")
    run = reference.with_(load=load, **NON_PERSISTENT)
    back = run.with_(ckpt_step=3)
    elsewhere = run.with_(non_persistent_global_ckpt_dir=tmp_path / "none", tst_bag_size=2)
    messages = check([run, back, elsewhere, run.with_(ckpt_step=3, non_persistent_ckpt_type=None)])
    assert messages[0] is None
    assert re.search(
        rf"--ckpt-step 3 .* {passing}/iter_0000006 .* Remove {passing}", str(messages[1])
    )
    assert "--tst-bag-size 4" in str(messages[2])
    assert "--non-persistent-save-interval 1 does not work" in str(messages[3])
    (passing / "iter_0000006" / ".metadata").write_bytes(b"damaged")
    (damaged,) = check([run])
    assert "iter_0000006 is damaged" in str(damaged)
    assert f"remove {passing} to go on with the last persistent checkpoint" in str(damaged)
    shutil.rmtree(passing / "iter_0000006")
    (missing,) = check([run])
    assert f"{tracker} names the checkpoint iter_0000006, which is not there" in str(missing)
