"""Studies of real training runs: side by side, interrupted, taken up again, diverged, submitted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_tst.common.progress import INTERVAL_VARIABLE
from megatron_tst.report.compared_settings import SUPERPOSITION_SETTINGS, differing
from megatron_tst.report.labels import superposition_label
from megatron_tst.report.results_table import read_results
from megatron_tst.study.slurm import submit
from megatron_tst.study.study_file import read_study
from megatron_tst.study.study_folder import open_study
from tests.corpus import write_corpus
from tests.studies import study_content, write_study
from tests.zygote import ROOT

pytestmark = pytest.mark.slow

BASELINE, TST = "tiny-10steps-lr0.001-baseline-seed0", "tiny-10steps-lr0.001-s2-r0.3-seed0"
SEVERAL = "tiny-10steps-lr0.001-s4r0.1s2r0.2-seed0"


def run_study(study: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/run_study.py", str(study), "--output", str(output), *options]
    return subprocess.run(
        command,
        env={**os.environ, INTERVAL_VARIABLE: "0.5"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def records(output: Path) -> dict[str, dict[str, Any]]:
    paths = output.glob("runs/*/run.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def wait_for(condition: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_study_runs_every_arm_once_and_collects_it(corpus: Path, tmp_path: Path) -> None:
    # The last but one diverges and the last cannot be started.
    content = study_content(corpus)
    content["arms"].append({"schedule": "4:0.1,2:0.2"})
    content["models"]["odd batch"] = {**content["models"]["tiny"], "micro-batch-size": 3}
    content["arms"] += [{"learning_rate": 1e38}, {"model": "odd batch"}]
    study, output = write_study(tmp_path / "study.yaml", content), tmp_path / "out"
    done = run_study(study, output, "--jobs", "2")
    assert done.returncode == 1, done.stderr
    assert "5 runs: 3 finished, 1 diverged, 1 failed" in done.stdout
    # How the study and its runs stand, where there is no terminal.
    assert "\n5 runs: 2 running, 3 waiting, time left unknown\n" in done.stdout
    assert f"\n{BASELINE}: step 0 of 10, loss -\n" in done.stdout
    assert "failed: odd batch-10steps-lr0.001-baseline-seed0: error: " in done.stderr
    found = records(output)
    assert [found[name]["state"] for name in (BASELINE, TST, SEVERAL)] == ["finished"] * 3
    assert found[TST]["settings"]["bag_size"] == 2
    cores = [found[name]["cores"] for name in (BASELINE, TST)]
    assert not set(cores[0]) & set(cores[1])

    results = {result.name: result for result in read_results(output / "results.csv")}
    assert set(results) == {BASELINE, TST, SEVERAL, "tiny-10steps-lr1e+38-baseline-seed0"}
    assert results["tiny-10steps-lr1e+38-baseline-seed0"].status == "diverged"
    assert [results[name].status for name in (BASELINE, TST)] == ["finished"] * 2
    # Folders, ports and what else differs from run to run is no setting.
    differences = differing([results[name].settings for name in (BASELINE, TST)])
    assert set(differences) <= set(SUPERPOSITION_SETTINGS)
    # 10 steps of 2 x 32 tokens, evaluated after the 6th and the last; twice the text in 3 of them.
    assert results[BASELINE].data_tokens.tolist() == [384, 640]
    assert results[TST].data_tokens.tolist() == [576, 832]
    assert results[TST].equivalent_tokens.tolist() == [384, 640]
    # Four times the text in the first step and twice in the next two.
    assert results[SEVERAL].data_tokens.tolist() == [704, 960]
    assert results[SEVERAL].equivalent_tokens.tolist() == [384, 640]
    assert superposition_label(results[SEVERAL].settings) == "s=4,2 r=0.3"

    before = {name: record["seconds"] for name, record in found.items()}
    times = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/run.json")}
    write_study(study, {**content, "arms": content["arms"][:4]})
    again = run_study(study, output)
    assert again.returncode == 0, again.stderr
    assert "4 runs: 3 finished, 1 diverged" in again.stdout
    assert times == {path: path.stat().st_mtime_ns for path in times}, before


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"weihgt-decay": 0.1}, "unrecognized arguments: --weihgt-decay 0.1"),
        ({"clip-grad": "much"}, "argument --clip-grad: invalid float value: 'much'"),
    ],
)
def test_an_argument_that_megatron_does_not_take_is_named(
    corpus: Path, tmp_path: Path, entry: dict[str, Any], said: str
) -> None:
    content = study_content(corpus)
    content["arguments"] |= entry
    refused = run_study(write_study(tmp_path / "study.yaml", content), tmp_path / "out")
    assert refused.returncode == 2
    assert refused.stderr == f"error: arguments, or models.tiny: {said}.\n"
    assert not (tmp_path / "out").exists()


def test_a_study_whose_text_does_not_suffice_runs_nothing(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "short", [100] * 60, vocabulary_size=200)
    content = study_content(corpus, seeds=[0, 1])
    content["arguments"]["data-path"] = str(tmp_path / "short")
    content["defaults"]["total_steps"] = 40
    content["arms"] = [{}, {"bag_size": [2, 6], "step_ratio": 0.3}]
    study, output = write_study(tmp_path / "study.yaml", content), tmp_path / "out"
    refused = run_study(study, output, "--jobs", "2")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    # 64 tokens in 28 steps, and 384 in 12, of the 54 documents before the split.
    assert "2 of 6 runs would be refused, tiny-40steps-lr0.001-s6-r0.3-seed0, " in line
    assert "6,400 tokens (4,608 in phase 1) of 5,400" in line
    assert not output.exists()
    # As the message says; also of a study that has begun.
    content["seeds"], arms = [0], content["arms"]
    content["arms"] = arms[:1]
    write_study(study, content)
    assert run_study(study, output).returncode == 0
    content["arms"] = arms
    content["arguments"]["tst-max-epochs"] = 1.19
    write_study(study, content)
    done = run_study(study, output, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert "3 runs: 3 finished" in done.stdout
    results = read_results(output / "results.csv")
    assert [result.data_tokens[-1] for result in results] == [2560, 3328, 6400]


def test_a_study_goes_on_elsewhere_from_its_table(corpus: Path, tmp_path: Path) -> None:
    content = study_content(corpus)
    study, here = write_study(tmp_path / "study.yaml", content), tmp_path / "here"
    assert run_study(study, here, "--jobs", "2").returncode == 0
    write_study(study, {**content, "seeds": [0, 1]})
    table, there = here / "results.csv", tmp_path / "there"
    options = ["--earlier", str(table)]
    listed = run_study(study, there, "--list", *options)
    assert listed.stdout.splitlines()[:3] == [
        f"finished  {BASELINE}",
        f"finished  {TST}",
        f"waiting   {BASELINE[:-1]}1",
    ]
    assert listed.stdout.endswith(f"4 runs, 40 steps\n2 of them are in {table}\n")
    done = run_study(study, there, "--jobs", "2", *options)
    assert done.returncode == 0, done.stderr
    assert "2 runs: 2 finished" in done.stdout
    assert set(records(there)) == {f"{name[:-1]}1" for name in (BASELINE, TST)}
    results = read_results(there / "results.csv")
    assert [r.name[-5:] for r in results] == ["seed0", "seed0", "seed1", "seed1"]
    # Nothing is lost on the way, and the next machine goes on from this table.
    assert (there / "results.csv").read_text().startswith(table.read_text())
    third = tmp_path / "third"
    last = run_study(study, third, "--earlier", str(there / "results.csv"))
    assert (last.returncode, last.stdout.splitlines()[0]) == (0, "0 runs: none left")
    assert (third / "results.csv").read_bytes() == (there / "results.csv").read_bytes()


def test_hours_are_the_flops_of_all_runs_at_the_speed_that_is_assumed(tmp_path: Path) -> None:
    study = ROOT / "examples/studies/gpu.yaml"
    options = ["--list", "--gpu", "H100", "--mfu", "0.15", "--vocabulary", "16384"]
    listed = run_study(study, tmp_path / "none", *options)
    assert listed.returncode == 0, listed.stderr
    said = listed.stdout.splitlines()[-1]
    # What docs/studies.md shows.
    assert f"\n> {said}\n" in (ROOT / "docs/studies.md").read_text()
    # By hand: eight layers, attention and SwiGLU; the output layer; causal scores.
    weights = 8 * (4 * 512**2 + 3 * 512 * 1408) + 512 * 16384
    token = 6 * weights + 6 * 8 * 512 * 1024
    tokens = sum(run.settings.total_steps for run in read_study(study).runs()) * 256 * 1024
    assert float(said.split()[0]) == pytest.approx(token * tokens, rel=0.02)
    assert (
        f"{float(said.split()[0]) / (0.15 * 989e12) / 3600:.0f}" == f"{float(said.split()[2]):.0f}"
    )
    unknown = run_study(study, tmp_path / "none", "--list", "--gpu", "H1", "--mfu", "0.15")
    assert (unknown.returncode, unknown.stderr) == (
        2,
        "error: --gpu is 'H1': use A100, H100, H200, B200, GB200.\n",
    )
    alone = run_study(study, tmp_path / "none", "--list", "--gpu", "H100")
    assert (alone.returncode, "--gpu and --mfu go together" in alone.stderr) == (2, True)


def test_an_interrupted_study_goes_on(corpus: Path, tmp_path: Path) -> None:
    content = study_content(corpus, checkpoints=4, arms=[{"total_steps": 1000}])
    study, output = write_study(tmp_path / "study.yaml", content), tmp_path / "out"
    command = [sys.executable, "tools/run_study.py", str(study), "--output", str(output)]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    (folder,) = [output / "runs" / "tiny-1000steps-lr0.001-baseline-seed0"]
    runner = start()
    # Torchrun and its rank, so that the runner has its process; training would begin much later.
    # Before the record there are children too, such as git's.
    wait_for((folder / "run.json").exists)
    wait_for(lambda: len(psutil.Process(runner.pid).children(recursive=True)) >= 2)
    runner.send_signal(signal.SIGINT)
    assert b"the same command goes on" in runner.communicate(timeout=60)[1]
    assert runner.returncode == 130
    assert records(output)[folder.name]["state"] == "waiting"

    runner = start()
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    wait_for(tracker.exists)
    # So that the run is not over before it is killed.
    subprocess.run(["pkill", "-STOP", "-f", str(folder)], check=True)
    # A runner that is killed leaves its run behind, which nobody may start a second time.
    runner.kill()
    runner.wait()
    refused = run_study(study, output)
    assert refused.returncode == 2
    assert "another process runs this study or one of its runs" in refused.stderr
    nothing = run_study(study, output, "--collect")
    assert nothing.returncode == 2
    assert "no run in" in nothing.stderr
    left = json.loads((folder / "run.json").read_text())
    assert left["state"] == "running"
    subprocess.run(["pkill", "-KILL", "-f", str(folder)], check=True)

    last = run_study(study, output)
    assert last.returncode == 0, last.stderr
    assert "loaded checkpoint" in (folder / "log.txt").read_text(errors="replace")
    (result,) = read_results(output / "results.csv")
    assert (result.status, int(result.steps[-1])) == ("finished", 1000)
    assert result.steps.tolist() == sorted(set(result.steps.tolist()))


def test_a_study_runs_as_jobs_of_submitit(corpus: Path, tmp_path: Path) -> None:
    content = study_content(corpus, arms=[{}])
    study, output = write_study(tmp_path / "study.yaml", content), tmp_path / "out"
    config = read_study(study)
    with open_study(config, output):
        jobs = submit(config, output, None, {"timeout_min": 5}, cluster="local")
    assert [name for name, _ in jobs] == [BASELINE]
    wait_for(lambda: records(output).get(BASELINE, {}).get("state") == "finished")
    with open_study(config, output):
        assert submit(config, output, None, {"timeout_min": 5}, cluster="local") == []
    collected = run_study(study, output, "--collect")
    assert collected.stdout.strip() == str(output / "results.csv")
    assert [result.name for result in read_results(output / "results.csv")] == [BASELINE]


def test_an_array_is_submitted_with_the_parameters_given(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script that sbatch is given; there is no Slurm here, so that it ends there."""
    recorder = tmp_path / "bin" / "sbatch"
    recorder.parent.mkdir()
    recorder.write_text(
        f'#!/bin/sh\ncp "$1" {tmp_path}/script\necho "sbatch: no cluster" >&2\nexit 1\n'
    )
    recorder.chmod(0o755)
    (recorder.parent / "srun").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{recorder.parent}:{os.environ['PATH']}")
    study = write_study(tmp_path / "study.yaml", study_content(corpus))
    options = ["timeout_min=7", "slurm_partition=b200", "gpus_per_node=1"]
    done = run_study(study, tmp_path / "out", "--jobs", "1", "--slurm", *options)
    assert done.returncode == 2
    assert "error: --slurm: " in done.stderr
    assert "no cluster" in done.stderr
    script = (tmp_path / "script").read_text()
    for line in ("--array=0-1%1", "--time=7", "--partition=b200", "--gpus-per-node=1"):
        assert f"#SBATCH {line}" in script
