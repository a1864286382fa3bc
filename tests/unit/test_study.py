"""Study files: the grid, the command lines, what is refused; folders and slots."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.commands.run_study import main
from megatron_tst.study.display import running_lines, summary
from megatron_tst.study.execution import Execution, Slot, slots_of_this_machine
from megatron_tst.study.run_folder import LogReader, RunFolder, State
from megatron_tst.study.runner import Progress
from megatron_tst.study.settings import RunSettings
from megatron_tst.study.slurm import parse_slurm_options
from megatron_tst.study.study_file import read_study
from megatron_tst.study.study_folder import open_study
from tests.studies import study_content, write_study

CORPUS = Path("corpus")
ROOT = Path(__file__).parents[2]
STUDIES, MAKEFILE = ROOT / "examples/studies", ROOT / "Makefile"


def read(tmp_path: Path, **changes: Any):
    return read_study(write_study(tmp_path / "study.yaml", study_content(CORPUS, **changes)))


def option(arguments: tuple[str, ...], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_a_grid_has_every_combination_once_and_the_first_seed_of_all_first(tmp_path: Path) -> None:
    arms = [
        {},
        {"bag_size": [2, 4], "step_ratio": [0.2, 0.3]},
        {"bag_size": 4, "step_ratio": 0.3, "seeds": [0, 5]},
        {"learning_rate": ["1e-3", 2e-3], "seeds": 1},
    ]
    runs = read(tmp_path, arms=arms, seeds=[0, 1], controls=False).runs()
    names = [run.name for run in runs]
    assert len(names) == len(set(names)) == 2 + 8 + 1 + 1
    assert [run.settings.seed for run in runs] == [0] * 5 + [1] * 6 + [5]
    assert names[0] == "tiny-10steps-lr0.001-baseline-seed0"
    assert "tiny-10steps-lr0.001-s4-r0.3-seed5" in names
    assert "tiny-10steps-lr0.002-baseline-seed1" in names


def test_every_length_that_is_compared_has_its_control(tmp_path: Path) -> None:
    arms = [
        {"total_steps": [10, 20], "bag_size": 2, "step_ratio": 0.3},
        {"learning_rate": 2e-3, "bag_size": [2, 4], "step_ratio": 0.3, "seeds": [1]},
        {"total_steps": 20},
    ]
    study = read(tmp_path, arms=arms)
    names = [run.name for run in study.runs()]
    assert study.controls == 2
    assert len(names) == len(set(names)) == 7
    assert "tiny-10steps-lr0.001-baseline-seed0" in names
    assert "tiny-10steps-lr0.002-baseline-seed1" in names
    without = read(tmp_path, arms=arms, controls=False)
    assert without.controls == 0
    assert set(names) - {run.name for run in without.runs()} == {
        "tiny-10steps-lr0.001-baseline-seed0",
        "tiny-10steps-lr0.002-baseline-seed1",
    }


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_study_of_the_repository_is_read_and_finds_the_text_that_make_prepares(
    path: Path,
) -> None:
    study = read_study(path)
    runs = study.runs()
    assert len({run.name for run in runs}) == len(runs)
    # Written down, so that the file shows all that is run.
    assert study.controls == 0
    texts = dict(re.findall(r"^TEXT_OF_(\w+) := (\S+)$", MAKEFILE.read_text(), re.MULTILINE))
    prepared = f"runs/studies/text/{texts.get(path.stem, 'python-packages')}"
    for run in runs:
        assert option(run.arguments, "--data-path") == prepared
        assert option(run.arguments, "--tokenizer-model").startswith(prepared)


def test_the_command_line_of_a_run(tmp_path: Path) -> None:
    arm = {
        "bag_size": 4,
        "step_ratio": 0.3,
        "variant": "input-only",
        "objective": "mce-sum",
        "reset_at_switch": "optimizer",
        "target_weighting": "power-law",
        "power_law_exponent": 1.25,
        "total_steps": 200,
        "seeds": [3],
    }
    (run,) = read(tmp_path, arms=[arm], checkpoints=4, controls=False).runs()
    expected = {
        "--num-layers": "1",
        "--train-iters": "200",
        "--lr": "0.001",
        "--lr-warmup-iters": "20",
        "--lr-wsd-decay-iters": "40",
        "--seed": "4",
        "--eval-interval": "101",
        # 500 tokens are 3.9 batches of 4 x 32.
        "--eval-iters": "4",
        "--eval-global-batch-size": "4",
        "--save-interval": "50",
        "--tst-bag-size": "4",
        "--tst-step-ratio": "0.3",
        "--tst-variant": "input-only",
        "--tst-objective": "mce-sum",
        "--tst-reset-at-switch": "optimizer",
        "--tst-target-weighting": "power-law",
        "--tst-power-law-exponent": "1.25",
    }
    assert {name: option(run.arguments, name) for name in expected} == expected
    assert "--swiglu" in run.arguments
    assert "True" not in run.arguments
    assert run.name == (
        "tiny-200steps-lr0.001-s4-r0.3-input-only-power-law-p1.25-mce-sum-optimizer-seed3"
    )


def test_names_tell_all_settings_apart() -> None:
    common: dict[str, Any] = {"model": "m", "total_steps": 10, "learning_rate": 1e-3, "seed": 0}
    changes: list[Mapping[str, Any]] = [
        {"bag_size": 2},
        {"bag_size": 1, "step_ratio": None, "schedule": "4:0.3,2:0.1"},
        {"bag_size": 1, "step_ratio": None, "schedule": "2:0.1,4:0.3"},
        {"bag_size": 1, "bag_sizes": "2,4"},
        {"bag_size": 1, "bag_sizes": "2:1,4:2"},
        {"step_ratio": 0.31},
        {"variant": "output-only"},
        {"target_weighting": "exponential"},
        {"power_law_exponent": 2.0},
        {"objective": "bce"},
        {"reset_at_switch": "embeddings"},
        {"document_boundary": "align"},
        {"seed": 1},
        {"learning_rate": 1.5e-3},
        {"total_steps": 11},
        {"model": "n"},
    ]
    base = {**common, "bag_size": 4, "step_ratio": 0.3}
    names = {RunSettings.of(**{**base, **change}).name for change in changes}
    assert len(names - {RunSettings.of(**base).name}) == len(changes)


def test_several_bag_sizes_on_the_command_line(tmp_path: Path) -> None:
    arms = [{"bag_sizes": ["2,4", "4:1,2:3"], "step_ratio": 0.3}, {"schedule": "4:0.1,2:0.2"}]
    drawn, weighted, schedule = read(tmp_path, arms=arms, controls=False).runs()
    for run, sizes in ((drawn, "2,4"), (weighted, "4:1,2:3")):
        assert option(run.arguments, "--tst-bag-sizes") == sizes
        assert option(run.arguments, "--tst-step-ratio") == "0.3"
    assert drawn.name == "tiny-10steps-lr0.001-s2or4-r0.3-seed0"
    assert option(schedule.arguments, "--tst-schedule") == "4:0.1,2:0.2"
    assert "--tst-step-ratio" not in schedule.arguments


@pytest.mark.parametrize(
    "twin",
    [
        {"bag_size": 2, "step_ratio": 0.3, "target_weighting": "uniform"},
        {"bag_size": 2, "step_ratio": 0.3, "target_weighting": [None, "uniform"]},
        {"bag_size": 2, "step_ratio": 0.3, "power_law_exponent": [1.5, 2]},
        {"schedule": "2:0.3"},
        {"schedule": [" 2:3"]},
        {"bag_size": 2, "step_ratio": [0.3, "3e-1"], "seeds": [0, 0]},
    ],
)
def test_what_two_entries_have_in_other_words_runs_once(
    tmp_path: Path, twin: dict[str, Any]
) -> None:
    arms = [{}, {"bag_size": 2, "step_ratio": 0.3}, twin]
    names = [run.name for run in read(tmp_path, arms=arms).runs()]
    assert names == ["tiny-10steps-lr0.001-baseline-seed0", "tiny-10steps-lr0.001-s2-r0.3-seed0"]


def test_several_bag_sizes_in_other_words_run_once(tmp_path: Path) -> None:
    arms = [
        {"schedule": ["4:0.2,2:0.2", "4:0.2, 2:0.2", "4:2,2:2"]},
        {"bag_sizes": ["2,4", "4, 2"], "step_ratio": 0.3},
        {"bag_size": 8, "step_ratio": 0.3, "target_weighting": [None, "power-law", "uniform"]},
    ]
    assert [run.name for run in read(tmp_path, arms=arms, controls=False).runs()] == [
        f"tiny-10steps-lr0.001-{arm}-seed0"
        for arm in ("s4r0.2s2r0.2", "s2or4-r0.3", "s8-r0.3", "s8-r0.3-uniform")
    ]


def test_a_model_may_be_called_by_a_number(tmp_path: Path) -> None:
    model = study_content(CORPUS)["models"]["tiny"]
    (run,) = read(tmp_path, models={442: model}, arms=[{"model": 442}]).runs()
    assert run.name == "442-10steps-lr0.001-baseline-seed0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule: 2:0.3", r"schedule is 120\.3 as YAML reads it: write text, in quotes"),
        ("bag_size: 2, bag_size: 4", r"bag_size is there twice.* line \d+"),
        ("bag_size: {{ bags }}", r"a mapping is no key: write text with .* in quotes.* line \d+"),
        ("? [a, b] : c", r"a list or a mapping is no key.* line \d+"),
    ],
)
def test_what_yaml_reads_otherwise_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write_study(tmp_path / "study.yaml", study_content(CORPUS))
    content = path.read_text()
    start = content.index("arms:")
    end = content.index("\n", content.index("step_ratio"))
    path.write_text(f"{content[:start]}arms: [{{{text}}}]{content[end:]}")
    with pytest.raises(ValueError, match=message):
        read_study(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arm": []}, ["unknown key 'arm'", "arms"]),
        ({"arms": []}, ["arms is empty"]),
        ({"arms": [{"bagsize": 2}]}, ["arms, entry 1", "unknown key 'bagsize'", "bag_size"]),
        ({"arms": [{}, {"bag_size": 4}]}, ["arms, entry 2", "step_ratio"]),
        ({"arms": [{"bag_size": []}]}, ["bag_size is an empty list"]),
        ({"arms": [{"bag_size": 2.5, "step_ratio": 0.3}]}, ["bag_size is 2.5", "whole number"]),
        ({"arms": [{"bag_size": True, "step_ratio": 0.3}]}, ["bag_size is True"]),
        ({"arms": [{"bag_size": 2, "step_ratio": 1.5}]}, ["step_ratio is 1.5", "use bag_size: 1"]),
        ({"arms": [{"bag_size": 2, "step_ratio": 0.01}]}, ["switch at step 0"]),
        ({"arms": [{"step_ratio": 0.3}]}, ["bag_size is 1", "step_ratio", "ignored"]),
        (
            {"arms": [{"bag_size": 2, "step_ratio": 0.3, "objective": "mse"}]},
            ["objective is 'mse'", "mce-sum"],
        ),
        ({"arms": [{"schedule": "4:0.1,4:0.1"}]}, ["schedule is '4:0.1,4:0.1'", "follows itself"]),
        ({"arms": [{"bag_sizes": "2,4"}]}, ["bag_sizes is 2,4 but phase 1 has no length"]),
        ({"arms": [{"bag_sizes": "2,x", "step_ratio": 0.3}]}, ["bag_sizes is '2,x'"]),
        ({"arms": [{"bag_sizes": "2,4", "schedule": "4:0.1"}]}, ["both set bag sizes"]),
        ({"arms": [{"schedule": "4:0.1", "bag_size": 2}]}, ["schedule: 4:0.1 and bag_size: 2"]),
        ({"arms": [{"schedule": 120.3}]}, ["schedule is 120.3", 'in quotes, as in schedule: "8']),
        ({"arms": [{"bag_sizes": [2, 4], "step_ratio": 0.3}]}, ["bag_sizes is 2", '"2,4"']),
        ({"arms": [{"variant": 1, "bag_size": 2, "step_ratio": 0.3}]}, ["variant is 1", "text"]),
        (
            {"arms": [{"bag_size": 2, "step_ratio": [0.3, 0.31]}]},
            ["s2-r0.3-seed0 and ", "step_ratio 0.3 and 0.31 of 10 steps", "step, 3", "leave one"],
        ),
        (
            {"arms": [{"learning_rate": [1e-3, 0.00100000001]}]},
            ["two runs are called tiny-10steps-lr0.001-baseline-seed0", "0.001 and 0.00100000001"],
        ),
        (
            {
                "arms": [
                    {
                        "bag_size": 2,
                        "step_ratio": 0.3,
                        "target_weighting": "power-law",
                        "power_law_exponent": [1.5, 1.5000001],
                    }
                ]
            },
            ["two runs are called", "power_law_exponent 1.5 and 1.5000001"],
        ),
        ({"arguments": {"seq-length": "128k"}}, ["seq-length is '128k'", "whole number"]),
        ({"arms": [{"learning_rate": float("inf")}]}, ["learning_rate is inf"]),
        ({"arms": [{"learning_rate": "fast"}]}, ["learning_rate is 'fast'", "a number"]),
        ({"arms": [{"learning_rate": 0}]}, ["learning_rate is 0", "above 0"]),
        ({"arms": [{"total_steps": 0}]}, ["total_steps is 0"]),
        ({"arms": [{"model": "huge"}]}, ["'huge'", "under models (tiny)"]),
        ({"defaults": {"model": "tiny", "total_steps": 10}}, ["no learning_rate", "defaults"]),
        ({"schedule": {"warmup_share": 2, "decay_share": 0.1}}, ["warmup_share is 2", "most 1"]),
        ({"validation": {"times": 2, "tokens": 500}}, ["validation has no batch_size"]),
        ({"processes": 3}, ["validation.batch_size is 4", "multiple of processes, 3"]),
        ({"models": {"tiny": {"lr": 0.1}}}, ["models.tiny has lr", "learning_rate"]),
        ({"arguments": {"tst-bag-size": 2}}, ["arguments has tst-bag-size", "keys of an arm"]),
        ({"arguments": {"bf16": False}}, ["arguments.bf16 is False", "no entry"]),
        ({"arguments": {"bf16": True}}, ["no seq-length"]),
        ({"seeds": [-1]}, ["seed is -1"]),
        ({"controls": "no"}, ["controls is 'no'", "true or false"]),
    ],
)
def test_a_bad_study_file_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    path = write_study(tmp_path / "study.yaml", study_content(CORPUS, **changes))
    assert main([str(path), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("arms: [")
    with pytest.raises(ValueError, match=r"study\.yaml: .*line 1"):
        read_study(path)


def test_a_study_may_grow_but_not_change(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with open_study(read(tmp_path), folder):
        pass
    larger = {**study_content(CORPUS)["models"], "more": {"num-layers": 2}}
    with open_study(read(tmp_path, models=larger, seeds=[0, 1], arms=[{}]), folder):
        pass
    other = {"times": 2, "tokens": 1000, "batch_size": 4}
    with pytest.raises(ValueError, match=r"another study, which differs in validation\.tokens: "):
        open_study(read(tmp_path, validation=other), folder).__enter__()
    models = {**larger, "more": {"num-layers": 3}}
    with pytest.raises(ValueError, match=r"differs in models\.more\.num-layers: "):
        open_study(read(tmp_path, models=models), folder).__enter__()


def test_a_folder_has_one_runner_at_a_time(tmp_path: Path) -> None:
    study = read(tmp_path)
    with (
        open_study(study, tmp_path / "out"),
        pytest.raises(ValueError, match="another process runs this study"),
    ):
        open_study(study, tmp_path / "out").__enter__()


def test_a_study_is_listed_while_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, folder = read(tmp_path), tmp_path / "out"
    with open_study(study, folder):
        assert main([str(tmp_path / "study.yaml"), "--output", str(folder), "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "waiting   tiny-10steps-lr0.001-baseline-seed0",
        "waiting   tiny-10steps-lr0.001-s2-r0.3-seed0",
        "2 runs, 20 steps",
    ]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"--output .*out is a file: name a folder\."):
        open_study(read(tmp_path), tmp_path / "out").__enter__()


def test_a_log_is_read_while_it_is_written(tmp_path: Path) -> None:
    reader = LogReader(tmp_path / "log.txt")
    reader.poll()
    assert (reader.step, reader.loss, reader.validation) == (0, None, None)
    line = " [date] iteration       12/    40 | consumed samples: 96 | lm loss: 3.25E+00 |\n"
    end = (
        "validation loss at iteration 20 | lm loss value: 2.5E+00 | lm loss PPL: 1.2E+01 |\n"
        " iteration 21/ 40"
    )
    reader.path.write_text(line)
    reader.poll()
    assert (reader.step, reader.loss, reader.validation) == (12, 3.25, None)
    reader.path.write_text(line + end)
    reader.poll()
    assert (reader.step, reader.loss, reader.validation) == (20, 3.25, 2.5)


@pytest.mark.parametrize(
    ("log", "diverged", "last"),
    [
        (b"error: rank 0, step 9: Unexpected result nan on rank 0.\nmore\n", True, "error: rank 0"),
        (b"error: rank 0, step 9: found Inf in local grad norm\n", True, "error: rank 0"),
        (b"error: rank 0, step 9: disk full in /nano/info\n", False, "error: rank 0"),
        (b"warning: nan\nKilled\n", False, "Killed"),
    ],
)
def test_a_diverged_run_is_told_from_a_broken_one(
    tmp_path: Path, log: bytes, diverged: bool, last: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.log.write_bytes(b"x" * 100_000 + b"\n" + log)
    assert folder.has_diverged() is diverged
    assert folder.last_words().startswith(last)


class Sleeping(Execution):
    """A run whose process does nothing."""

    def command(self) -> list[str]:
        return ["sleep", "60"]


def test_a_run_that_died_unseen_is_waiting_when_it_is_stopped(tmp_path: Path) -> None:
    run = Sleeping("run", RunFolder(tmp_path / "run"), [], 10)
    run.start(Slot())
    assert run._process is not None
    run._process.kill()
    run._process.wait()
    run.stop()
    assert run.folder.state() == "waiting"
    # Its lock is free again.
    again = Sleeping("run", RunFolder(tmp_path / "run"), [], 10)
    again.start(Slot())
    again.stop()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that :mod:`time` says, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def log_step(run: Execution, step: int) -> None:
    with run.folder.log.open("a") as log:
        log.write(f" [date] iteration {step}/ 1000 | lm loss: 3.25E+00 |\n")
    assert run.poll() == "running"


def test_the_time_left_is_that_of_new_steps(tmp_path: Path, clock: list[float]) -> None:
    """A run that goes on at step 500, a new one of another model, and two that wait for them."""
    models = {"old": "a", "new": "b", "next": "a", "last": "b"}
    runs = [Sleeping(n, RunFolder(tmp_path / n), [], 1000, model=m) for n, m in models.items()]
    old, new = runs[:2]
    old.folder.checkpoints.mkdir(parents=True)
    (old.folder.checkpoints / "latest_checkpointed_iteration.txt").write_text("500")
    # What was done after the checkpoint is lost.
    old.folder.log.write_text(" [date] iteration 900/ 1000 | lm loss: 3.0E+00 |\n")
    states: dict[str, State] = {
        "old": "running",
        "new": "running",
        "next": "waiting",
        "last": "waiting",
    }
    progress = Progress(runs, states, running=[old, new], slots=2)
    try:
        for run in (old, new):
            run.start(Slot())
            run.poll()
        assert (old.log.step, new.log.step) == (500, 0)
        clock[0] += 100
        log_step(old, 510)
        # One line: it holds the start-up.
        assert progress.seconds_left is None
        clock[0] += 20
        log_step(old, 520)
        # 2 s a step; "new" has no pace, has that of "old", and should have started by now.
        assert progress.seconds_left_of(old) == 960
        assert progress.seconds_left_of(new) == 2000
        log_step(new, 10)
        clock[0] += 5
        log_step(new, 20)
        # 0.5 s a step, and 5 s have passed since the last line of "old".
        assert [progress.seconds_left_of(run) for run in (old, new)] == [955, 490]
        # Start-ups took 100 and 120 s. "next" follows "new", "last" follows "old".
        assert [progress.seconds_left_of(run) for run in runs[2:]] == [2110, 610]
        assert progress.seconds_left == 490 + 2110
        lines = running_lines(progress)
        assert [line.rpartition(", ")[2] for line in lines] == [
            "about 16 min left",
            "about 8 min left",
        ]
        assert summary(progress).endswith("2 running, 2 waiting, about 43 min left")
    finally:
        for run in (old, new):
            run.stop()


def test_slots_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    by_cores = slots_of_this_machine(3, 2)
    assert [slot.cores for slot in by_cores] == [(0, 1), (2, 3), (4, 5)]
    assert [slot.threads for slot in by_cores] == [1, 1, 1]
    assert [slot.threads for slot in slots_of_this_machine(1, 2)] == [4]
    assert len(slots_of_this_machine(None, 2)) == 4
    with pytest.raises(ValueError, match="--jobs is 5: 5 runs of 2 processes need 10 cores"):
        slots_of_this_machine(5, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,GPU-a,GPU-b")
    by_gpus = slots_of_this_machine(None, 2)
    assert [slot.gpus for slot in by_gpus] == [("2", "3"), ("GPU-a", "GPU-b")]
    assert [slot.cores for slot in by_gpus] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    with pytest.raises(ValueError, match="need 6 GPUs, and this machine has 4"):
        slots_of_this_machine(3, 2)


def test_slurm_parameters() -> None:
    found = parse_slurm_options(["slurm_partition=b200", "timeout_min=90"])
    assert found == {"slurm_partition": "b200", "timeout_min": 90}
    with pytest.raises(ValueError, match="timeout_min"):
        parse_slurm_options([])
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_slurm_options(["timeout_min"])
