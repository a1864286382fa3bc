"""Plain Megatron, in a process without this project, continues what superposition began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import SmallRun, assert_bit_equal, assert_faultless
from tests.stock_alone import copy_to
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

# Saving takes most of the time: nothing between the switch and the end is saved.
EARLIER, SWITCH, LAST = 4, 5, 8
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    # Whose state is then saved by parameter: the buffers have gaps that hold anything.
    "distributed": {
        "use_distributed_optimizer": True,
        "dist_ckpt_optim_fully_reshardable": True,
        "mtp_num_layers": 1,
    },
    # As Megatron's pretrain_hybrid.py trains it.
    "hybrid": {"num_layers": None, "hybrid_layer_pattern": "*-*-"},
}
SUPERPOSED: dict[str, Any] = {"tst_bag_size": 4, "tst_steps": SWITCH}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stock")


@pytest.fixture(scope="module")
def superposed(launcher: Launcher, corpus: Path, folder: Path) -> dict[str, SmallRun]:
    """Runs with superposition from the first to the last step, by name."""
    runs = {}
    for name, settings in RUNS.items():
        run = SmallRun(corpus, folder / name)
        # Dropout, so that a random state that does not carry over would show.
        run = run.with_(
            bf16=True, hidden_dropout=0.1, train_iters=LAST, eval_interval=LAST, **settings
        )
        runs[name] = run
        interval = EARLIER if name == "plain" else LAST
        launcher.run(run.with_(**SUPERPOSED, save_interval=interval).argv, run.log)
    return runs


def write_cache(launcher: Launcher, run: SmallRun, step: int, cache: Path) -> str:
    """What the tool says."""
    checkpoint = run.folder / "checkpoints" / f"iter_{step:07d}"
    argv = ["--checkpoint", str(checkpoint), "--data-cache-path", str(cache)]
    main = "megatron_tst.commands.write_stock_data_cache:main"
    return launcher.run(argv, cache.with_suffix(".txt"), main=main).text


@pytest.fixture(scope="module")
def stock(launcher: Launcher, superposed: dict[str, SmallRun], folder: Path) -> dict[str, SmallRun]:
    """Plain runs from the switch, and one from an earlier step, in one separate process."""
    runs = {}
    for name, step in (*((name, SWITCH) for name in RUNS), ("plain", EARLIER)):
        run, target = superposed[name], folder / f"{name} from {step}"
        target.mkdir()
        cache = target / "data"
        said = write_cache(launcher, run, step, cache)
        assert f"--ckpt-step {step} --data-cache-path {cache}" in said
        assert ("phase 1 was to last 5 steps and ends after 4" in said) == (step == EARLIER)
        assert "INFO:" not in said
        runs[target.name] = run.with_(
            target,
            ckpt_step=step,
            load=run.folder / "checkpoints",
            # Saving takes longer than training here.
            save=target / "checkpoints" if step == SWITCH else None,
            tensorboard_dir=target / "tensorboard",
            data_cache_path=cache,
        )
    cases = [{"argv": run.argv, "log": str(run.log)} for run in runs.values()]
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONPATH", None)
    subprocess.run(
        [sys.executable, copy_to(folder), folder / "cases.json"],
        env=environment,
        cwd=folder,
        check=False,
    )
    return runs


def assert_was_alone(run: SmallRun) -> None:
    assert "modules of this project: []" in run.log.read_text(), run.log.read_text()[-6000:]


@pytest.mark.parametrize("name", RUNS)
def test_from_the_switch_on_losses_and_weights_are_those_of_our_phase_2(
    superposed: dict[str, SmallRun], stock: dict[str, SmallRun], name: str
) -> None:
    ours, plain = superposed[name], stock[f"{name} from {SWITCH}"]
    assert_was_alone(plain)
    expected, actual = ours.scalars(), plain.scalars()
    steps = range(SWITCH + 1, LAST + 1)
    ahead = {"mtp_1 loss", "mtp_1_acceptance_rate"} & expected.keys()
    assert bool(ahead) == ("mtp_num_layers" in RUNS[name])
    for scalar in ("lm loss", "grad-norm", "learning-rate", *ahead):
        assert actual[scalar] == {step: expected[scalar][step] for step in steps}
    assert_faultless(plain.checkpoint_folder(LAST), ours.checkpoint_folder(LAST))
    # Weights, moments and master weights.
    assert_bit_equal(plain.checkpoint(LAST), ours.checkpoint(LAST))


def test_nothing_was_added_to_the_data_cache(stock: dict[str, SmallRun]) -> None:
    """Megatron would build an order of its own for arguments that it has no index for."""
    for run in stock.values():
        text = run.log.read_text()
        assert "Build and save" not in text
        descriptions = list((run.folder / "data").glob("*-GPTDataset-train-description.txt"))
        assert len(descriptions) == 1


def test_an_earlier_checkpoint_goes_on(
    superposed: dict[str, SmallRun], stock: dict[str, SmallRun]
) -> None:
    plain = stock[f"plain from {EARLIER}"]
    assert_was_alone(plain)
    losses = plain.scalars()["lm loss"]
    assert sorted(losses) == list(range(EARLIER + 1, LAST + 1))
    assert losses[LAST] < losses[EARLIER + 1]


def test_checkpoints_that_the_tool_refuses(
    launcher: Launcher, superposed: dict[str, SmallRun], stock: dict[str, SmallRun], tmp_path: Path
) -> None:
    ours, plain = superposed["plain"], stock[f"plain from {SWITCH}"]
    there = tmp_path / "there"
    there.mkdir()
    cases = [
        (ours.folder / "checkpoints" / f"iter_{SWITCH:07d}", there, "exists: choose a folder that"),
        (ours.folder / "checkpoints", tmp_path / "new", "is the end of its run"),
        (plain.folder / "checkpoints", tmp_path / "new", "was made without superposition"),
        (ours.folder, tmp_path / "new", "holds no torch_dist checkpoint"),
    ]
    for number, (checkpoint, cache, message) in enumerate(cases):
        argv = ["--checkpoint", str(checkpoint), "--data-cache-path", str(cache)]
        log, main = tmp_path / f"{number}.txt", "megatron_tst.commands.write_stock_data_cache:main"
        started = launcher.start(argv, log, main=main)
        assert launcher.wait(started) == [2], started.text
        assert message in started.text.splitlines()[-1]
        assert not (tmp_path / "new").exists()
