"""The job of examples/slurm, and arrays of studies, on a real Slurm."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_tst.report.results_table import read_results
from tests.integration.test_preprocessing import EXAMPLE, files_of, reference, web_text
from tests.network_namespaces import INTERFACE, Node
from tests.runs import SmallRun
from tests.shipped_script import SAVE_INTERVAL, SCRIPT, TINY, TOTAL, assert_same_run, variables
from tests.slurm_cluster import Slurm, slurm, why_unavailable
from tests.studies import study_content, write_study
from tests.survival import last_checkpoint

ROOT = Path(__file__).parents[2]
JOB = ROOT / "examples/slurm/pretrain.sbatch"
OPTIONS = ["--gpus-per-node", "0", "--ntasks-per-node", "1"]
STOP_AFTER = 6
# What the script starts as python: the same entry point, whose ranks stop themselves after a step.
PYTHON = f"""\
#!/bin/sh
shift 2
exec {sys.executable} -c '
import sys
from megatron_tst import cpu
cpu.activate()
from tests.survival import main
sys.exit(main())' "$@"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    reason = why_unavailable()
    if reason:
        pytest.skip(f"needs Slurm: {reason}")
    with slurm(5) as made:
        yield made


def job_variables(run: SmallRun, **more: str) -> dict[str, str]:
    """The environment that a job of the shipped script is submitted with."""
    programs = run.folder / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(PYTHON)
    (programs / "python").chmod(0o755)
    given = variables(run)
    return {
        **given,
        "PATH": f"{programs}:{given['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "STOP_AFTER": str(STOP_AFTER),
        **more,
    }


def wait_until_stopped(cluster: Slurm, job: str, ranks: int) -> None:
    """Waits for the ranks to have stopped themselves."""

    def stopped() -> int:
        names = hosts(cluster, job)
        return sum(stopped_processes(node) for node in cluster.nodes if node.name in names)

    cluster.wait_until(lambda: stopped() == ranks, job=job)


def stopped_processes(node: Node) -> int:
    """How many of a node's have been stopped; none of a lost node."""
    found = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(node.first_process).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += process.status() == psutil.STATUS_STOPPED
    return found


def submit(cluster: Slurm, run: SmallRun, *arguments: str | Path, **more: str) -> str:
    """Submits the shipped script as a job that writes into the folder of the run."""
    command: list[str | Path] = [*OPTIONS, *arguments, "--output", run.log, JOB, SCRIPT, *TINY]
    return cluster.submit(*command, environment=job_variables(run, **more))


def wait_for_restart(cluster: Slurm, job: str) -> None:
    """Waits until a job is queued again, and does without most of Slurm's delay of two minutes.

    A node starts no job in the second in which it was told to end it.
    """
    cluster.wait_until(
        lambda: (found := cluster.job(job))["JobState"] == "PENDING" and found["Restarts"] == "1",
        job=job,
    )
    cluster.run("scontrol", "update", f"jobid={job}", "starttime=now+2")


def hosts(cluster: Slurm, job: str) -> list[str]:
    listed = cluster.job(job)["NodeList"]
    if listed in ("", "(null)"):
        return []
    return cluster.run("scontrol", "show", "hostnames", listed).stdout.split()


@dataclass
class LimitedJob:
    """A job on two nodes, one of them drained, that is to end after a minute."""

    job: str
    run: SmallRun
    drained: str
    started: float


@pytest.fixture(scope="module")
def limited_job(
    cluster: Slurm, one_node_run: SmallRun, tmp_path_factory: pytest.TempPathFactory
) -> LimitedJob:
    """Its ranks stop themselves: other tests need not wait for the minute to be over.

    Slurm's limit is an hour, as those may take long on a busy machine.
    """
    run = SmallRun(one_node_run.corpus, tmp_path_factory.mktemp("limited"))
    job = submit(cluster, run, "--nodes", "2", "--time", "60", EXIT_DURATION_MINS="1")
    cluster.wait_until(lambda: "using world size: 2" in cluster.log(job), job=job)
    started = time.monotonic()
    wait_until_stopped(cluster, job, 2)
    drained = hosts(cluster, job)[0]
    cluster.run("scontrol", "update", f"nodename={drained}", "state=drain", "reason=test")
    return LimitedJob(job, run, drained, started)


@pytest.mark.slow
def test_a_drained_node_keeps_its_job(cluster: Slurm, limited_job: LimitedJob) -> None:
    assert cluster.job(limited_job.job)["JobState"] == "RUNNING"
    shown = cluster.run("sinfo", "--noheader", "--nodes", limited_job.drained, "--format", "%T")
    assert shown.stdout.strip() == "draining"


@pytest.mark.slow
def test_a_job_outlives_its_node_and_saves_when_it_is_cancelled(
    cluster: Slurm, corpus: Path, tmp_path: Path
) -> None:
    run = SmallRun(corpus, tmp_path)
    # The background writers of checkpoints would get scancel's signal too.
    job = submit(cluster, run, "--time", "60", ASYNC_SAVE="0")
    wait_until_stopped(cluster, job, 1)
    (name,) = hosts(cluster, job)
    lost = next(node for node in cluster.nodes if node.name == name)
    os.kill(lost.first_process, signal.SIGKILL)
    # What Slurm's own health check does after SlurmdTimeout, five minutes by default.
    cluster.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")
    wait_for_restart(cluster, job)
    wait_until_stopped(cluster, job, 1)
    assert hosts(cluster, job) != [name]
    assert cluster.log(job).count(f"successfully loaded checkpoint from {run.folder}") == 1
    assert last_checkpoint(run) == SAVE_INTERVAL
    cluster.run("scancel", job)
    cluster.wait_until(lambda: "CG" not in cluster.run("squeue", "--noheader").stdout, job=job)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert last_checkpoint(run) in range(STOP_AFTER, TOTAL)


def submit_shell(cluster: Slurm, folder: Path, code: str, *arguments: str, **more: str) -> str:
    """Submits the job with lines of shell in the place of the shipped script."""
    script = folder / "script.sh"
    script.write_text(f"set -eu\n{code}\n")
    output = ["--output", str(folder / "log.txt")]
    command = [*OPTIONS, *output, *arguments, str(JOB), "bash", str(script)]
    environment = {"PATH": os.environ["PATH"], "OUTPUT_DIR": str(folder / "out"), **more}
    return cluster.submit(*command, environment=environment)


@pytest.mark.parametrize(
    ("failure", "code"),
    [("exit 1", "1:0"), ("exit 2", "2:0"), ("kill -KILL $$", "137:0"), ("kill -TERM $$", "143:0")],
)
def test_a_job_ends_with_the_code_of_the_rank_that_failed_first(
    cluster: Slurm, tmp_path: Path, failure: str, code: str
) -> None:
    lines = f"if [ $RANK = 0 ]; then exec sleep 100; fi; sleep 1; {failure}"
    job = submit_shell(cluster, tmp_path, lines, "--nodes", "2", "--time", "60")
    ended = cluster.wait(job, "FAILED", "COMPLETED")
    assert (ended["ExitCode"], ended["Restarts"]) == (code, "0"), cluster.log(job)
    assert f"failed with exit code {code.split(':')[0]}" in cluster.log(job)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("40", (19, 20)), ("1:00:30", (40, 41)), ("1-1", (1479, 1480)), ("UNLIMITED", None)],
)
def test_the_run_is_told_when_the_job_ends(
    cluster: Slurm, tmp_path: Path, limit: str, minutes: tuple[int, int] | None
) -> None:
    told = 'echo "told ${EXIT_DURATION_MINS:-nothing}"'
    # A user's own format of times does not matter.
    job = submit_shell(cluster, tmp_path, told, "--time", limit, SLURM_TIME_FORMAT="relative")
    assert cluster.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", cluster.log(job)
    expected = [f"told {number}\n" for number in minutes or ["nothing"]]
    assert any(words in cluster.log(job) for words in expected)


@pytest.mark.parametrize(
    ("limit", "variables", "message"),
    [
        ("4", {}, "the time limit leaves no minute before MARGIN_MINS=20: raise --time"),
        ("60", {"MARGIN_MINS": "6"}, "raise MARGIN_MINS (6)"),
        ("60", {"EXIT_DURATION_MINS": "58"}, "or lower EXIT_DURATION_MINS (58)"),
    ],
)
def test_a_run_that_would_not_end_before_the_warning_is_refused(
    cluster: Slurm, tmp_path: Path, limit: str, variables: dict[str, str], message: str
) -> None:
    job = submit_shell(cluster, tmp_path, "echo started", "--time", limit, **variables)
    ended = cluster.wait(job, "COMPLETED", "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0"), cluster.log(job)
    assert message in cluster.log(job)
    assert "started" not in cluster.log(job)


@pytest.mark.slow
def test_a_job_that_hangs_is_repeated_once_for_each_checkpoint(
    cluster: Slurm, tmp_path: Path
) -> None:
    """Slurm looks every half a minute whom to warn, so that the first warning is sent by hand."""
    tracker = tmp_path / "out/checkpoints/latest_checkpointed_iteration.txt"
    lines = f"mkdir -p {tracker.parent}; echo 7 >{tracker}; exec sleep 300"
    limits = ["--time", "30", "--signal", "B:USR1@1795"]
    job = submit_shell(cluster, tmp_path, lines, *limits)
    cluster.wait_until(lambda: tracker.exists() and tracker.read_text() == "7\n", job=job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_restart(cluster, job)
    assert "the job is queued again and resumes from checkpoint 7" in cluster.log(job)
    ended = cluster.wait(job, "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("1:0", "1")
    assert "no step was saved (last checkpoint: 7, in " in cluster.log(job)


@pytest.mark.slow
def test_a_study_runs_as_an_array(cluster: Slurm, corpus: Path, tmp_path: Path) -> None:
    study, output = write_study(tmp_path / "study.yaml", study_content(corpus)), tmp_path / "out"
    command = [sys.executable, "tools/run_study.py", str(study), "--output", str(output)]
    slurm_options = ["--slurm", "timeout_min=10", "cpus_per_task=1"]
    submitted = cluster.run(*command, *slurm_options).stdout
    assert "2 runs submitted" in submitted
    jobs = [line.split()[0] for line in submitted.splitlines()[:2]]
    for job in jobs:
        cluster.wait(job, "COMPLETED", "FAILED")
    listed = cluster.run(*command, "--list").stdout
    assert listed.count("finished") == 2, listed
    # Submitting again submits what is left: nothing.
    assert "0 runs submitted" in cluster.run(*command, *slurm_options).stdout
    cluster.run(*command, "--collect")
    assert {result.status for result in read_results(output / "results.csv")} == {"finished"}


@pytest.mark.slow
def test_datatrove_tokenizes_in_an_array(cluster: Slurm, tmp_path: Path) -> None:
    """Two tasks, and a job that waits for them and joins their parts."""
    folder, tokenizer = web_text(tmp_path / "in")
    prefix = tmp_path / "corpus"
    paths: list[str | Path] = [
        "--input",
        folder,
        "--output-prefix",
        prefix,
        "--tokenizer",
        tokenizer,
    ]
    options = ["--slurm", "--partition", "main", "--tasks", "2", "--time", "01:00:00"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    cluster.run(sys.executable, EXAMPLE, "dclm", *paths, *options, environment=environment)
    cluster.wait_until(prefix.with_suffix(".idx").exists)
    assert files_of(prefix) == reference(folder, tokenizer, tmp_path / "reference")


@pytest.mark.slow
def test_a_job_goes_on_on_other_nodes_after_its_time_limit(
    cluster: Slurm, limited_job: LimitedJob, one_node_run: SmallRun
) -> None:
    """The bits are those of an undisturbed run."""
    job, run = limited_job.job, limited_job.run
    # The ranks see after this step that the minute is over.
    time.sleep(max(0, limited_job.started + 60 - time.monotonic()))
    assert cluster.job(job)["JobState"] == "RUNNING"
    cluster.run("scancel", "--signal=CONT", job)
    wait_for_restart(cluster, job)
    assert last_checkpoint(run) == STOP_AFTER
    assert "the time is over; the job is queued again" in cluster.log(job)
    ended = cluster.wait(job, "COMPLETED", "FAILED")
    assert ended["ExitCode"] == "0:0", cluster.log(job)[-4000:]
    assert limited_job.drained not in hosts(cluster, job)
    assert_same_run(run, one_node_run)
