"""What is kept of a run, and the table of results: what goes in comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_tst.report.describing import describe_data, status_of, thin_training_loss
from megatron_tst.report.events import Series
from megatron_tst.report.results import RunResult, read_result
from megatron_tst.report.results_table import read_results, write_results
from megatron_tst.settings.phases import lay_out
from tests.unit.run_folders import BASELINE, TST, baseline_loss, make_run, tst_loss, write_info


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    root = tmp_path_factory.mktemp("runs")
    baseline = make_run(root / "baseline", BASELINE, baseline_loss)
    tst = make_run(root / "tst", TST, tst_loss)
    return [read_result(baseline), read_result(tst, name="s4-r0.25-seed7")]


def test_a_folder_becomes_a_result(results: list[RunResult]) -> None:
    baseline, tst = results
    assert (baseline.name, baseline.status, baseline.bag_size) == ("baseline", "finished", 1)
    assert tst.name == "s4-r0.25-seed7"
    # 25 steps of 16 positions read 4 tokens a position; 75 read one.
    assert (tst.equivalent_tokens[-1], tst.data_tokens[-1]) == (1600, 25 * 64 + 75 * 16)
    assert tst.settings["step_ratio"] == 0.25
    assert tst.switch_step == 25
    # Weights of targets that a run does not have are no difference between runs.
    assert not {"variant", "power_law_exponent"} & set(baseline.settings)
    assert tst.offset_losses.size == 4
    assert baseline.offset_losses.size == 0


def test_a_run_that_diverged_at_once_is_kept(tmp_path: Path) -> None:
    write_info(tmp_path, TST)
    with pytest.raises(ValueError, match="has no values of"):
        read_result(tmp_path)
    silent = read_result(tmp_path, status="diverged")
    assert (silent.status, silent.steps.size, silent.training_steps.size) == ("diverged", 0, 0)
    write_results([silent], tmp_path / "results.csv")
    (again,) = read_results(tmp_path / "results.csv")
    assert (again.status, again.settings) == ("diverged", silent.settings)


def test_a_run_may_end_before_its_time_was_logged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TST, tst_loss, leave_out="tst/seconds")
    early = read_result(run, status="diverged")
    assert early.steps.size
    assert np.isnan(early.seconds).all()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_table_gives_back_what_was_written(
    results: list[RunResult], tmp_path: Path, suffix: str
) -> None:
    nothing = np.zeros(0)
    silent = replace(
        results[0],
        name="diverged before its first validation",
        status="diverged",
        commit="1234567",
        loss_impl="triton",
        data={**results[0].data, "split": "98"},
        steps=nothing.astype(np.int64),
        equivalent_tokens=nothing.astype(np.int64),
        data_tokens=nothing.astype(np.int64),
        validation_loss=nothing,
        seconds=nothing,
    )
    written = [*results, silent]
    path = tmp_path / "new" / f"results.{suffix}"
    write_results(written, path)
    assert [path.name for path in path.parent.iterdir()] == [path.name]
    for before, after in zip(written, read_results(path), strict=True):
        assert (before.name, before.status) == (after.name, after.status)
        assert (before.machine, before.commit) == (after.machine, after.commit)
        assert before.loss_impl == after.loss_impl
        assert before.settings == after.settings
        assert before.data == after.data
        for curve in ("steps", "equivalent_tokens", "data_tokens", "training_steps"):
            assert np.array_equal(getattr(before, curve), getattr(after, curve))
        for curve in ("validation_loss", "seconds", "training_loss", "offset_losses"):
            # Six significant digits.
            assert getattr(after, curve) == pytest.approx(getattr(before, curve), rel=1e-5)


def test_two_runs_of_one_name_are_refused(results: list[RunResult], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several runs are called baseline"):
        write_results([results[0], results[0]], tmp_path / "results.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "no column run, status"),
        ("run,status,quantity,step,loss,equivalent_tokens,data_tokens,seconds\n", "no run"),
        (
            "run,status,quantity,step,loss,equivalent_tokens,data_tokens,seconds\n"
            "x,,validation loss,1,2,3,4,5\n",
            "run x has no row with its status",
        ),
        (
            "run,status,quantity,step,loss,equivalent_tokens,data_tokens,seconds\n"
            "x,finished,validation loss,1,high,3,4,5\n",
            "run x, validation loss, step 1: loss is 'high'",
        ),
    ],
)
def test_another_table_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(path)


@pytest.mark.parametrize(
    ("losses", "status"),
    [
        ([5.0, 4.0, 3.0], "finished"),
        ([5.0, 4.0], "unfinished"),
        ([5.0, float("nan")], "diverged"),
        ([5.0, 3.0, 4.5], "diverged"),  # more than a nat above its best
        ([6.5, 6.6, 6.7], "diverged"),  # more than a nat above ln 256 = 5.55
        ([9.0, 4.0, 3.9], "finished"),  # phase 1 does not count
    ],
)
def test_status_of_a_run(losses: list[float], status: str) -> None:
    settings = {"bag_size": 2, "total_steps": 30, "switch_step": 10, "padded_vocab_size": 256}
    steps = np.arange(10, 10 * len(losses) + 1, 10)
    validation = Series(steps, np.array(losses))
    assert status_of(settings, validation, Series(steps, np.ones(len(losses)))) == status


def test_a_training_loss_that_is_not_a_number_is_divergence() -> None:
    steps = np.array([10, 20])
    training = Series(steps, np.array([3.0, float("inf")]))
    assert status_of({}, Series(steps, np.array([3.0, 3.0])), training) == "diverged"


def test_thinning_keeps_the_switch_and_averages_the_rest() -> None:
    steps = np.arange(1, 1001)
    series = Series(steps, np.where(steps <= 300, 8.0, 4.0) + (steps == 301))
    thin_steps, thin_losses = thin_training_loss(series, lay_out([(2, 300)]))
    assert len(thin_steps) <= 60
    assert set(range(291, 311)) <= set(thin_steps.tolist())
    assert np.all(np.diff(thin_steps) > 0)
    # No mean runs across the switch.
    assert np.all(thin_losses[thin_steps <= 300] == 8.0)
    assert thin_losses[thin_steps == 301] == 5.0
    assert np.all(thin_losses[thin_steps > 301] == 4.0)


@pytest.mark.parametrize("switch_step", [0, 5, 30])
def test_a_short_run_is_not_thinned(switch_step: int) -> None:
    steps = np.arange(1, 31)
    thin_steps, _ = thin_training_loss(
        Series(steps, steps.astype(float)), lay_out([(2, switch_step)])
    )
    assert thin_steps.tolist() == steps.tolist()


def test_data_is_named_without_folders() -> None:
    arguments = {
        "data_path": ["0.3", "/somewhere/corpus-a", "0.7", "/elsewhere/corpus-b"],
        "split": "98,2,0",
        "tokenizer_model": "/home/me/tokenizer",
        "seq_length": 128,
        "eval_iters": 10,
        "eval_global_batch_size": 4,
    }
    assert describe_data(arguments) == {
        "data_path": "0.3 corpus-a 0.7 corpus-b",
        "split": "98,2,0",
        "tokenizer_model": "tokenizer",
        "sequence_length": 128,
        "validation_tokens": 5120,
    }
    # Text of splits, and steps of each of two whole sets.
    paths = {"data_path": None, "train_data_path": ["/a/one"], "valid_data_path": ["/b/two"]}
    found = describe_data({**arguments, **paths, "eval_iters": [3, 4]})
    assert (found["data_path"], found["validation_tokens"]) == ("one, two", 3584)
