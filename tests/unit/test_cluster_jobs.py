"""The jobs of examples/slurm, ngc and kubernetes, with stand-ins for the commands of clusters."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/pretrain/pretrain_gpt_3b.sh"
PATHS = {"DATA_PATH": "/data/corpus", "TOKENIZER": "/data/tokenizer", "OUTPUT_DIR": "/runs/3b"}


def run_slurm_job(
    folder: Path,
    task: str = "exit 0",
    minutes_left: float | None = 240,
    arguments: Sequence[str] = ("--tst-bag-size", "4"),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs the job; ``task`` is what srun does in place of running the task once."""
    # As Slurm 22.05 says it, in its own format and of a job without a limit.
    end = "NONE"
    if minutes_left is not None:
        end = f"{datetime.now() + timedelta(minutes=minutes_left):%Y-%m-%dT%H:%M:%S}"
    commands = {
        "scontrol": 'if [[ $1 == show ]]; then echo node7; echo node8; else echo "SCONTROL $*"; fi',
        "squeue": f"echo {end}",
        "srun": f'echo "SRUN $*"; {task}',
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "16",
        **PATHS,
        "OUTPUT_DIR": str(folder / "out"),
        **variables,
    }
    job = [str(ROOT / "examples/slurm/pretrain.sbatch"), SCRIPT, *arguments]
    return subprocess.run(
        ["bash", *job], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


# The task as Slurm would start it: what follows the arguments of srun.
RUN_TASK = (
    'while [[ $1 != bash ]]; do shift; done; export SLURM_PROCID=9 SLURM_LOCALID=1; "$@"; '
    'env | grep -E "^(MASTER|WORLD|EXIT)"'
)


def test_a_task_becomes_the_rank_that_slurm_says(tmp_path: Path) -> None:
    job = run_slurm_job(tmp_path, RUN_TASK, DRY_RUN="1")
    assert job.returncode == 0, job.stderr
    command = next(line for line in job.stdout.splitlines() if line.startswith("python "))
    words = shlex.split(command)
    assert words[1:3] == ["-m", "megatron_tst.pretrain"]
    assert words[-2:] == ["--tst-bag-size", "4"]
    # 240 minutes less the margin of 20, and a second or so that the start took.
    assert words[words.index("--exit-duration-in-mins") + 1] in ("219", "220")
    assert {"MASTER_ADDR=node7", "MASTER_PORT=20077", "WORLD_SIZE=16"} <= set(
        job.stdout.splitlines()
    )


@pytest.mark.parametrize(
    ("task", "code", "requeued"),
    [("exit 0", 0, False), ("exit 1", 1, False), ("exit 2", 2, False)],
)
def test_a_run_that_ended_is_not_repeated(
    tmp_path: Path, task: str, code: int, requeued: bool
) -> None:
    job = run_slurm_job(tmp_path, task)
    assert (job.returncode, "SCONTROL requeue 77" in job.stdout) == (code, requeued)


def save(folder: Path) -> str:
    """What a task does that saves a checkpoint below a folder."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    return f"mkdir -p {folder}; echo 40 >{tracker}"


@pytest.mark.parametrize(
    ("arguments", "variables", "saves"),
    [
        ((), {}, "out/checkpoints"),
        (("--save", "FOLDER/a"), {}, "a"),
        (("--save=FOLDER/a",), {}, "a"),
        # /runs is a folder of the container.
        ((), {"OUTPUT_DIR": "/runs/3b", "IMAGE": "image"}, "lustre/3b/checkpoints"),
    ],
)
def test_a_run_that_saved_at_the_limit_is_queued_again(
    tmp_path: Path, arguments: Sequence[str], variables: dict[str, Any], saves: str
) -> None:
    arguments = [word.replace("FOLDER", str(tmp_path)) for word in arguments]
    variables = {
        "EXIT_DURATION_MINS": "1",
        "MOUNTS": f"/data:/data,{tmp_path}/lustre:/runs:rw",
        "BASH_ENV": str(_clock(tmp_path)),
        **variables,
    }
    ended = run_slurm_job(tmp_path, save(tmp_path / saves), arguments=arguments, **variables)
    assert ended.returncode == 0, ended.stderr
    assert "SCONTROL requeue 77" in ended.stdout
    # The same job again: the run is finished, and its evaluation took that long.
    ended = run_slurm_job(tmp_path, "exit 0", arguments=arguments, **variables)
    assert (ended.returncode, "SCONTROL" in ended.stdout) == (0, False)


def _clock(folder: Path) -> Path:
    """Makes the job's shell believe that a wait takes an hour."""
    path = folder / "clock.sh"
    path.write_text('wait() { command wait "$@"; local code=$?; SECONDS=3600; return $code; }\n')
    return path


def test_a_run_that_hangs_at_the_limit_is_queued_again_if_it_has_saved(tmp_path: Path) -> None:
    hang = 'sleep 1; kill -USR1 "$PPID"; sleep 2'
    job = run_slurm_job(tmp_path, f"{save(tmp_path / 'out/checkpoints')}; {hang}")
    assert "SCONTROL requeue 77" in job.stdout
    assert "did not end before the time limit" in job.stdout
    job = run_slurm_job(tmp_path, hang)
    assert (job.returncode, "SCONTROL" in job.stdout) == (1, False)
    assert "no step was saved (last checkpoint: 40, in " in job.stderr


def test_a_job_that_may_not_be_queued_again_says_so(tmp_path: Path) -> None:
    """With ``--no-requeue``."""
    task = f"rm {tmp_path}/scontrol; {save(tmp_path / 'out/checkpoints')}"
    clock = str(_clock(tmp_path))
    job = run_slurm_job(tmp_path, task, EXIT_DURATION_MINS="1", BASH_ENV=clock)
    assert job.returncode == 2
    assert "error: Slurm does not queue the job again: submit it anew" in job.stderr


@pytest.mark.parametrize(
    ("minutes", "variables", "message"),
    [
        (15, {}, "error: the time limit leaves no minute before MARGIN_MINS=20: raise --time"),
        (240, {"MARGIN_MINS": "6"}, "error: the run would end 6 minutes before the time limit"),
        (240, {"MARGIN_MINS": "5"}, "raise MARGIN_MINS (5)"),
        (240, {"EXIT_DURATION_MINS": "235"}, "lower EXIT_DURATION_MINS (235)"),
        (4, {"EXIT_DURATION_MINS": "1"}, "or --time"),
        (240, {"MARGIN_MINS": "20m"}, "error: MARGIN_MINS is '20m': use whole minutes"),
        (240, {"MARGIN_MINS": "08"}, "error: MARGIN_MINS is '08'"),
        (240, {"EXIT_DURATION_MINS": "0"}, "error: EXIT_DURATION_MINS is '0'"),
        (240, {"OUTPUT_DIR": ""}, "error: OUTPUT_DIR is not set"),
        (240, {"OUTPUT_DIR": "/dev/null/3b"}, "error: OUTPUT_DIR=/dev/null/3b must be seen"),
    ],
)
def test_a_run_that_cannot_end_before_its_job_is_refused(
    tmp_path: Path, minutes: float, variables: dict[str, Any], message: str
) -> None:
    # Half a minute, as the job counts whole ones.
    job = run_slurm_job(tmp_path, minutes_left=minutes + 0.5, **variables)
    assert job.returncode == 2
    assert message in job.stderr
    assert "SRUN" not in job.stdout


def test_a_margin_beyond_the_warning_serves(tmp_path: Path) -> None:
    assert run_slurm_job(tmp_path, minutes_left=8.5, MARGIN_MINS="7").returncode == 0


def test_a_job_without_a_limit_lets_the_run_end(tmp_path: Path) -> None:
    job = run_slurm_job(tmp_path, RUN_TASK, minutes_left=None, DRY_RUN="1")
    assert job.returncode == 0, job.stderr
    assert "--exit-duration-in-mins" not in job.stdout


def test_a_job_ends_with_the_code_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    """Srun's is the largest one: of a rank that Slurm has ended."""
    task = "while [[ $1 != bash ]]; do shift; done; shift 2; export SLURM_PROCID=0 SLURM_LOCALID=0"
    fail = 'bash -c "$1" rank bash -c "exit'
    job = run_slurm_job(tmp_path, f'{task}; {fail} 3"; {fail} 143"; exit 143')
    assert job.returncode == 3
    assert "failed with exit code 3 and is not repeated" in job.stderr
    assert not any((tmp_path / "out").iterdir())


def test_a_container_is_passed_to_srun(tmp_path: Path) -> None:
    job = run_slurm_job(tmp_path, IMAGE="/images/tst.sqsh", MOUNTS="/data:/data")
    assert f"--container-image /images/tst.sqsh --container-mounts /data:/data,{ROOT}" in job.stdout
    job = run_slurm_job(tmp_path, IMAGE="/images/tst.sqsh")
    assert f"--container-image /images/tst.sqsh --container-mounts {ROOT}:{ROOT}" in job.stdout


SET_BY_THE_JOB = {"DATA_PATH", "TOKENIZER", "OUTPUT_DIR", "NNODES", "NODE_RANK", "DRY_RUN"} | {
    "MASTER_ADDR",
    "MASTER_PORT",
}


def documented_variables() -> set[str]:
    """Of the scripts of examples/pretrain."""
    _, table = (ROOT / "docs/cluster.md").read_text().split("| variable | default |", 1)
    rows = table.split("\n\n", 1)[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])}


def test_base_command_job() -> None:
    variables = {
        name: name.lower()
        for name in (
            "NGC_ORG",
            "NGC_TEAM",
            "ACE",
            "INSTANCE",
            "IMAGE",
            "DATASET_ID",
            "WORKSPACE_ID",
        )
    }
    submit = [str(ROOT / "examples/ngc/submit.sh"), SCRIPT, "--wandb-exp-name", "a b"]
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "REPLICAS": "8", **variables}
    printed = subprocess.run(submit, env=environment, capture_output=True, text=True, check=True)
    words = shlex.split(printed.stdout)
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options["--datasetid"] == "dataset_id:/data"
    assert options["--replicas"] == "8"
    # The command line is parsed twice: by the shell of the job and by the one that bcprun starts.
    inner = shlex.split(options["--commandline"])
    assert inner[:2] == ["bcprun", "--nnodes"]
    started = shlex.split(inner[-1])
    assert started[-3:] == [SCRIPT, "--wandb-exp-name", "a b"]
    assert "DATA_PATH=/data/corpus" in started
    for name in documented_variables() - SET_BY_THE_JOB:
        submitted = subprocess.run(
            submit, env={**environment, name: "1"}, capture_output=True, text=True, check=True
        )
        assert f"{name}=1" in submitted.stdout, name
    refused = subprocess.run(
        submit, env={**environment, "DRY_RUN": "true"}, capture_output=True, text=True
    )
    assert (refused.returncode, refused.stderr) == (2, "error: DRY_RUN is 'true': use 0 or 1\n")
    del environment["NGC_ORG"]
    refused = subprocess.run(submit, env=environment, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.startswith("error: NGC_ORG")) == (2, True)


@pytest.mark.parametrize(("replica", "rank"), [("Master", "0"), ("Worker", "3")])
def test_pytorch_job(tmp_path: Path, replica: str, rank: str) -> None:
    job = yaml.safe_load((ROOT / "examples/kubernetes/pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(spec["replicas"] for spec in replicas.values()) == 8
    (container,) = replicas[replica]["template"]["spec"]["containers"]
    # As the operator sets them for a pod.
    pod = {
        "RANK": rank,
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "tst-3b-master-0",
        "MASTER_PORT": "23456",
    }
    pod |= {variable["name"]: variable["value"] for variable in container["env"]}
    pod |= {"PATH": os.environ["PATH"], "DRY_RUN": "1"}
    command = [*container["command"], *container["args"]]
    ran = subprocess.run(command, env=pod, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(
        f"torchrun --nnodes 8 --node-rank {rank} --nproc-per-node 8 "
        "--master-addr tst-3b-master-0 --master-port 23456 "
    )
