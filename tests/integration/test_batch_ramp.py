"""Batch sizes that change during a run: by a schedule, through the switch, and at a resume."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.report.runs import read_run
from tests.corpus import write_corpus
from tests.integration.test_bad_input import assert_messages, only_error
from tests.runs import Check, SmallRun, assert_bit_equal, assert_faultless
from tests.survival import MAIN
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

LENGTH, BAG_SIZE = 32, 4
# Larger batches from sample 4 on, from the switch at sample 16 on, and from the first step after
# sample 27 on. The last batch reaches beyond the 40 samples asked for.
RAMP = f"0:2 {4 * LENGTH}:4, {16 * LENGTH / 1000}K:6 {27 * LENGTH}:8"
SIZES = [2, 2, 4, 4, 4, 6, 6, 8, 8]
TOTAL, SWITCH, SAMPLES = len(SIZES), 5, sum(SIZES)
TOKENS = LENGTH * (16 * BAG_SIZE + SAMPLES - 16)
IN_SAMPLES: dict[str, Any] = {
    "train_iters": None,
    "lr_warmup_iters": None,
    "lr_wsd_decay_iters": None,
    "train_samples": 40,
    "lr_warmup_samples": 4,
    "lr_wsd_decay_samples": 8,
}
RAMPED: dict[str, Any] = {
    **IN_SAMPLES,
    "global_batch_size": None,
    "micro_batch_size": 1,
    "step_batch_size_schedule": RAMP,
    "tst_bag_size": BAG_SIZE,
    "tst_steps": SWITCH,
}


@pytest.fixture(scope="module")
def reference(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> SmallRun:
    """One process in fp32 that reads its text to the last token, and was not interrupted."""
    folder = tmp_path_factory.mktemp("ramp")
    write_corpus(folder / "text", [1000, 7, TOKENS - 1007], vocabulary_size=256)
    write_corpus(folder / "other", [3000], vocabulary_size=256)
    per_split: dict[str, Any] = {
        "data_path": None,
        "split": None,
        "train_data_path": folder / "text",
        "valid_data_path": folder / "other",
        "test_data_path": folder / "other",
    }
    run = SmallRun(corpus, folder).with_(**RAMPED, **per_split, save_interval=2)
    environment = {"RECORD_READS": str(folder / "reads")}
    launcher.run(run.argv, run.log, main=MAIN, environment=environment)
    return run


def saves(run: SmallRun) -> list[int]:
    """Steps of the checkpoints that were written, in order."""
    log = run.log.read_text()
    assert "Overwriting old" not in log
    return [
        int(step)
        for step in re.findall(r"successfully saved checkpoint from iteration +(\d+)", log)
    ]


def test_each_token_is_read_once(reference: SmallRun) -> None:
    lines = (reference.folder / "reads" / "rank0").read_text().splitlines()
    reads = [json.loads(line) for line in lines]
    assert [read["index"] for read in reads] == list(range(SAMPLES))
    # The samples lie side by side in the stream: no token is left out and none comes twice.
    position = 0
    for read in sorted(reads, key=lambda read: read["begin"]):
        assert read["begin"] == position
        assert read["tokens"] == LENGTH * (BAG_SIZE if read["index"] < 16 else 1)
        position += read["tokens"]
    assert position == TOKENS


def test_text_read_is_accounted_for(reference: SmallRun) -> None:
    scalars = reference.scalars()
    assert sorted(scalars["lm loss"]) == list(range(1, TOTAL + 1))
    assert [scalars["batch-size"][step] for step in range(1, TOTAL + 1)] == SIZES
    data = equivalent = 0
    for step, size in enumerate(SIZES, start=1):
        bag_size = BAG_SIZE if step <= SWITCH else 1
        equivalent += size * LENGTH
        data += size * LENGTH * bag_size
        assert scalars["tst/bag size"][step] == bag_size
        assert scalars["tst/equivalent tokens"][step] == equivalent
        assert scalars["tst/data tokens"][step] == data
    assert data == TOKENS
    # The report has the schedule from tst_run.json, and compares it with what was logged.
    assert read_run(reference.folder).schedule.data_tokens(TOTAL) == TOKENS


def test_a_step_is_saved_once(reference: SmallRun) -> None:
    """Before another batch size, at the switch, by the interval, at the end, or several of them."""
    assert saves(reference) == [2, 4, SWITCH, 6, 7, 8, TOTAL]


def test_a_stopped_run_resumes_bit_equal(
    launcher: Launcher, reference: SmallRun, tmp_path: Path
) -> None:
    run = reference.with_(tmp_path)
    for stop in (2, SWITCH, 7, None):
        launcher.run(run.with_(exit_interval=stop).argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL), reference.checkpoint(TOTAL))
    assert run.scalars()["lm loss"] == reference.scalars()["lm loss"]
    assert run.scalars()["lm loss validation"] == reference.scalars()["lm loss validation"]


def test_other_numbers_of_processes(
    launcher: Launcher, reference: SmallRun, tmp_path: Path
) -> None:
    run = reference.with_(tmp_path, use_distributed_optimizer=True)
    for world_size, stop in ((2, 3), (1, 6), (2, None)):
        launcher.run(run.with_(exit_interval=stop).argv, run.log, world_size)
    expected, actual = reference.scalars(), run.scalars()
    assert actual["tst/data tokens"] == expected["tst/data tokens"]
    for tag in ("lm loss", "lm loss validation"):
        # fp32: the gradients of two processes are summed in another order.
        assert actual[tag] == pytest.approx(expected[tag], rel=1e-5)


@pytest.fixture(scope="module")
def trained(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Two of ten steps of a constant batch; the switch would be at sample 16."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("trained")).with_(
        train_iters=10, tst_bag_size=BAG_SIZE, tst_step_ratio=0.4, eval_iters=0
    )
    launcher.run(run.with_(exit_interval=2).argv, run.log)
    return run


def test_a_refused_batch_size_comes_with_the_command_that_works(
    launcher: Launcher, check: Check, trained: SmallRun, tmp_path: Path
) -> None:
    (message,) = check([trained.with_(global_batch_size=8)])
    found = re.search("had read 8 samples in 2 steps, .*: pass (--step.*) instead", message or "")
    assert found, message
    flags = dict(zip(*[iter(shlex.split(found[1]))] * 2, strict=True))
    assert flags == {
        "--step-batch-size-schedule": f"0:4 {8 * LENGTH}:8",
        "--train-samples": "40",
        "--lr-decay-samples": "40",
        "--lr-warmup-samples": "8",
        "--lr-wsd-decay-samples": "8",
        "--tst-steps": "3",
    }
    settings = {name.removeprefix("--"): value for name, value in flags.items()}
    removed = dict.fromkeys(("global_batch_size", "tst_step_ratio", *IN_SAMPLES))
    whole = trained.with_(tmp_path / "whole", **removed).with_(**settings)
    launcher.run(whole.argv, whole.log)
    resumed = trained.with_(tmp_path / "resumed", **removed).with_(**settings)
    launcher.run(resumed.with_(load=trained.folder / "checkpoints").argv, resumed.log)
    # 2 steps of 4 and 4 steps of 8.
    assert saves(whole) == [2, 3, 6]
    assert_bit_equal(resumed.checkpoint(6), whole.checkpoint(6))
    losses = whole.scalars()["lm loss"]
    assert resumed.scalars()["lm loss"] == {step: losses[step] for step in range(3, 7)}
    rates = whole.scalars()["learning-rate"]
    assert trained.scalars()["learning-rate"] == {step: rates[step] for step in (1, 2)}


SAME_RATE = "--train-samples 40 --lr-decay-samples 40 --lr-warmup-samples 8"

# How the two steps are continued, beside "0:4 256:8", as many samples and the switch at step 3.
RESUMES: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"step_batch_size_schedule": None, "global_batch_size": 4, "tst_steps": 4}, None),
    ({"step_batch_size_schedule": "0:4 256:4", "tst_steps": 4}, None),
    (
        {"step_batch_size_schedule": "0:2 128:4 512:16"},
        r"read 8 samples in 2 steps, and with --step-batch-size-schedule '0:2 128:4 512:16' it "
        r"would have been 4: pass --step-batch-size-schedule '0:4 256:4 512:16' .* --tst-steps 4 ",
    ),
    (
        {"tst_steps": None, "tst_step_ratio": 0.4},
        r"at sample 16 \(step 4\), .* at sample 8 \(step 2\): pass --tst-steps 3, or",
    ),
    (
        {"step_batch_size_schedule": "0:4 256:16", "tst_steps": 3},
        "no --tst-steps keeps the switch at sample 16, .* at that sample instead, threshold 512",
    ),
    (
        {"lr_warmup_samples": 4},
        f"--lr-warmup-samples 8, .* has --lr-warmup-samples 4, .*: pass {SAME_RATE}",
    ),
    (
        {"lr_wsd_decay_samples": 4},
        f"--lr-wsd-decay-samples 8, .* has --lr-wsd-decay-samples 4, .*: pass {SAME_RATE}",
    ),
    ({"train_samples": 80}, f"--train-samples 40 .* has --train-samples 80 .*: pass {SAME_RATE}"),
    ({"train_samples": 80, "override_opt_param_scheduler": True}, None),
    ({"step_batch_size_schedule": "0:2", "finetune": True}, None),
    ({"train_samples": None, "train_iters": 6}, "--train-iters 6 .* Pass --train-samples 40, "),
    ({"override_ckpt_iteration": 2}, "--override-ckpt-iteration 2 .* Remove it; --ckpt-step"),
    ({"step_batch_size_schedule": "64:4"}, "'64:4' cannot be used: .* Write pairs THRESHOLD:"),
]


def test_continuing_with_other_batch_sizes(check: Check, trained: SmallRun) -> None:
    in_samples = {
        **IN_SAMPLES,
        "lr_warmup_samples": 8,
        "global_batch_size": None,
        "step_batch_size_schedule": "0:4 256:8",
        "tst_step_ratio": None,
        "tst_steps": 3,
    }
    runs = [trained.with_(**{**in_samples, **settings}) for settings, _ in RESUMES]
    assert_messages(check(runs), [message for _, message in RESUMES])


def test_a_baseline_with_a_schedule_keeps_its_past_too(
    launcher: Launcher, check: Check, small_run: SmallRun
) -> None:
    run = small_run.with_(**IN_SAMPLES, eval_iters=0, exit_interval=2)
    launcher.run(run.argv, run.log)
    schedules = ("0:8", "0:4 256:8")
    others = [
        run.with_(global_batch_size=None, step_batch_size_schedule=schedule)
        for schedule in schedules
    ]
    expected = "had read 8 samples in 2 steps, and with --step-batch-size-schedule '0:8'"
    # Without a schedule Megatron decides.
    plain = run.with_(global_batch_size=8)
    assert_messages(check([*others, plain, run]), [expected, None, None, None])


def test_batch_sizes_that_megatron_would_end_at(launcher: Launcher, small_run: SmallRun) -> None:
    run = small_run.with_(**{**RAMPED, "micro_batch_size": 2}, eval_iters=0)
    run = run.with_(step_batch_size_schedule="0:2 128:3")
    started = launcher.start(run.argv, run.log)
    assert launcher.wait(started) == [2], started.text[-4000:]
    error = only_error(started.text)
    assert "the batch size 3 from step 2 on is not a multiple of 2, one micro-batch" in error


def test_a_smaller_batch_is_taken_at_a_resume(launcher: Launcher, small_run: SmallRun) -> None:
    run = small_run.with_(**IN_SAMPLES, eval_iters=0)
    launcher.run(run.with_(exit_interval=2).argv, run.log)
    ramp: dict[str, Any] = {"global_batch_size": None, "step_batch_size_schedule": "0:4 256:2"}
    launcher.run(run.with_(**ramp).argv, run.log)
    assert [run.scalars()["batch-size"][step] for step in (1, 2, 3, 18)] == [4, 4, 2, 2]


def test_a_batch_that_the_processes_cannot_share_becomes_smaller(
    launcher: Launcher, check: Check, small_run: SmallRun, tmp_path: Path
) -> None:
    """Six samples for two ranks that take two at once are four; the switch lies behind those."""
    # The same rate at each step: Megatron counts the schedule in batches of the size asked for.
    rates: dict[str, Any] = {"lr_decay_style": "constant", "lr_wsd_decay_iters": None}
    settings: dict[str, Any] = {**rates, "lr_warmup_iters": 0, "train_iters": 6, "eval_iters": 0}
    four = small_run.with_(tmp_path / "four", tst_bag_size=BAG_SIZE, tst_steps=3, **settings)
    launcher.run(four.argv, four.log, 2)
    smaller: dict[str, Any] = {
        "global_batch_size": 6,
        "eval_global_batch_size": 4,
        "decrease_batch_size_if_needed": True,
    }
    run = four.with_(tmp_path / "smaller", **smaller)
    for stop in (2, None):
        launcher.run(run.with_(exit_interval=stop).argv, run.log, 2)
    assert_bit_equal(run.checkpoint(6), four.checkpoint(6))
    for tag in ("lm loss", "tst/data tokens", "tst/bag size"):
        assert run.scalars()[tag] == four.scalars()[tag]
    assert_faultless(*sorted((run.folder / "checkpoints").glob("iter_*")))
    # One process takes all six.
    (refused,) = check([run])
    expected = "had read 24 samples in 6 steps, .* on these ranks it would have been 36: pass"
    assert re.search(expected, refused or ""), refused


def test_what_a_schedule_of_batch_sizes_needs(check: Check, reference: SmallRun) -> None:
    (message,) = check([reference.with_(seq_length=None)])
    assert "--step-batch-size-schedule" in (message or "")
    assert "--seq-length is missing" in (message or "")


def test_a_first_size_that_the_processes_cannot_evaluate_with(
    launcher: Launcher, reference: SmallRun, tmp_path: Path
) -> None:
    run = reference.with_(tmp_path / "run", micro_batch_size=4)
    started = launcher.start(run.argv, tmp_path / "log.txt", world_size=2)
    assert launcher.wait(started) == [2, 2]
    assert "Pass --eval-global-batch-size with a multiple of 8" in started.text
