"""A run whose machine gets a newer torch in the middle of it; ``make test-versions`` runs it.

One of the two is that of ``.venv``, the other that of the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import TOTAL_STEPS, SmallRun, assert_bit_equal, assert_faultless
from tests.zygote import ROOT

PYTHONS = (str(ROOT / ".venv/bin/python"), sys.executable)


def version_of(python: str) -> tuple[int, ...]:
    ask = "import importlib.metadata as m; print(m.version('torch').split('+')[0])"
    found = subprocess.check_output([python, "-c", ask], text=True)
    return tuple(map(int, found.strip().split(".")))


def train(python: str, run: SmallRun) -> None:
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "megatron_tst.pretrain", *run.argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """To its end with the older one."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("trained")).with_(
        tst_bag_size=2, tst_steps=6, use_distributed_optimizer=True, save_interval=3
    )
    train(min(PYTHONS, key=version_of), run)
    return run


@pytest.mark.parametrize("step", [3, 6], ids=["in phase 1", "at the switch"])
def test_it_goes_on_bit_equal_with_the_newer(trained: SmallRun, tmp_path: Path, step: int) -> None:
    run = trained.with_(tmp_path, load=trained.folder / "checkpoints", ckpt_step=step)
    train(max(PYTHONS, key=version_of), run)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), trained.checkpoint(TOTAL_STEPS))
    assert_faultless(run.checkpoint_folder(TOTAL_STEPS))
