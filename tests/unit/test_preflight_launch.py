"""What the preflight makes of launch scripts and files, of which it must start nothing."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_tst.common.errors import UsageError
from megatron_tst.preflight.launch_command import read_launch
from tests.preflight_checked import Checked

ROOT = Path(__file__).parents[2]
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
LAUNCHERS = (
    "srun mpirun mpiexec sbatch salloc bcprun ngc docker podman apptainer singularity enroot ssh "
    "kubectl conda"
)
PYTHON_LAUNCHERS = "torchrun deepspeed accelerate python"


class Cluster:
    """Programs of a login node that leave a mark where one of them is started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv/bin"
        self._mark = folder / "started"
        self.bin.mkdir(parents=True)
        # python3 is a real one, which scripts ask something.
        for name in (*LAUNCHERS.split(), *PYTHON_LAUNCHERS.split()):
            text = f'#!/bin/sh\necho {name} "$@" >>{shlex.quote(str(self._mark))}\n'
            if name in PYTHON_LAUNCHERS.split():
                text = f"#!{sys.executable}\nimport sys\n{self.marking}"
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    @property
    def marking(self) -> str:
        """The line of a Python program that leaves the mark."""
        return f"import sys; print(*sys.argv, file=open({str(self._mark)!r}, 'a'))\n"

    def script(self, text: str, name: str = "train.sh") -> Path:
        file = self.folder / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
        return file

    @property
    def started(self) -> str:
        return self._mark.read_text() if self._mark.exists() else ""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.delenv(CONNECTIONS, raising=False)
    cluster = Cluster(tmp_path)
    path = [str(cluster.bin), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    monkeypatch.chdir(tmp_path)
    return cluster


def arguments_of(path: Path, extra: Sequence[str] = ()) -> list[str]:
    return read_launch(path, extra).arguments


@pytest.mark.parametrize(
    "launch",
    [
        "srun --nodes=8 bash inner.sh",
        "srun -N 8 --ntasks-per-node 1 -l ./inner.sh",
        "srun -J pretrain env LEVEL=info bash -l inner.sh",
        "mpirun -np 8 --mca btl tcp --allow-run-as-root -x LEVEL=info bash inner.sh",
        "srun bash <inner.sh",
        "bash inner.sh",
    ],
)
def test_a_shell_behind_a_launcher_is_read_up_to_its_launch(cluster: Cluster, launch: str) -> None:
    inner = 'torchrun --node-rank "${SLURM_PROCID:-0}" pretrain_gpt.py --num-layers 2'
    cluster.script(f"{inner}\necho inner >>started", "inner.sh")
    script = cluster.script(f"HOST=$(srun -N 1 hostname)\n{launch}\necho outer >>started")
    assert arguments_of(script) == ["--num-layers", "2"]
    assert cluster.started == ""


@pytest.mark.parametrize(
    "launch",
    [
        "source venv/bin/activate\ntorchrun pretrain_gpt.py --seed 1",
        "source venv/bin/activate\nexec torchrun pretrain_gpt.py --seed 1",
        '"$PWD/venv/bin/torchrun" pretrain_gpt.py --seed 1',
        'exec "$PWD/venv/bin/torchrun" pretrain_gpt.py --seed 1',
        "PATH=$PWD/venv/bin:$PATH torchrun pretrain_gpt.py --seed 1",
        'A=1 "$PWD/venv/bin/torchrun" pretrain_gpt.py --seed 1',
        'env A=1 "$PWD/venv/bin/torchrun" pretrain_gpt.py --seed 1',
        'run() { "$@"; }\nrun "$PWD/venv/bin/torchrun" pretrain_gpt.py --seed 1',
        'ln -s venv "my venv"\nD="my venv/bin"\n"$D/torchrun" pretrain_gpt.py --seed 1',
        'stdbuf -oL timeout 9 "$PWD/venv/bin/torchrun" pretrain_gpt.py --seed 1',
        'time A=1 "$PWD/venv/bin/torchrun" pretrain_gpt.py --seed 1',
        'COMMAND="A=1 $PWD/venv/bin/torchrun pretrain_gpt.py --seed 1"\neval "$COMMAND"',
        'sh -c "venv/bin/torchrun pretrain_gpt.py --seed 1"',
        "export PYTHONPATH=$PWD:$PYTHONPATH\nvenv/bin/torchrun pretrain_gpt.py --seed 1",
        "PYTHONPATH=$PWD python3 -c \"import os; os.system('venv/bin/torchrun pretrain_gpt.py "
        "--seed 1')\"",
        "venv/bin/python3.12 -c \"import os; os.execv('venv/bin/torchrun', "
        "['x', 'pretrain_gpt.py', '--seed', '1'])\"",
        'COMMAND=("$PWD/venv/bin/accelerate" launch pretrain_gpt.py --seed 1)\n"${COMMAND[@]}"',
        "venv/bin/python3.12 -m torch.distributed.run pretrain_gpt.py --seed 1",
        "venv/bin/python3.12 -W ignore venv/bin/torchrun pretrain_gpt.py --seed 1",
        # As Python 3.6 to 3.9, which know less of their command.
        "venv/bin/python3.12 -S -c 'import sys; del sys.orig_argv; import sitecustomize' "
        "pretrain_gpt.py --seed 1",
        "nice venv/bin/python3.12 -u pretrain_gpt.py --seed 1",
        'COMMAND="$PWD/venv/bin/python -u pretrain_gpt.py --seed 1"\neval "$COMMAND"',
        'nohup "$PWD/venv/bin/torchrun" pretrain_gpt.py --seed 1 >log 2>&1 &\nwait',
        "python3.12 -m megatron_tst.pretrain --seed 1",
    ],
)
def test_launchers_of_another_path_are_not_started(cluster: Cluster, launch: str) -> None:
    (cluster.bin / "activate").write_text(f"PATH={cluster.bin}:$PATH\n")
    (cluster.bin / "python3.12").symlink_to(sys.executable)
    (cluster.folder / "pretrain_gpt.py").write_text(cluster.marking)
    assert arguments_of(cluster.script(launch)) == ["--seed", "1"]
    assert cluster.started == ""


@pytest.mark.parametrize(
    "launch",
    [
        "srun --nodes=8 ./train",
        "srun --nodes 8 python train.py",
        "srun bash absent.sh",
        "srun bash inner.sh",
        "srun enroot import image",
        "srun -n1 conda run -n tok python tools/preprocess_data.py",
        "srun docker pull image",
        "torchrun --nproc-per-node 8 train.py",
        "python -m torch.distributed.run train.py",
        "python -W ignore -um torch.distributed.run train.py",
        "deepspeed train.py",
        "sbatch job.sh",
        "docker run --gpus all image bash inner.sh",
        "apptainer exec --nv image.sif bash inner.sh",
        "ngc batch run --commandline x",
        "bcprun --nnodes 8 --cmd x",
        "tst study study.yaml",
    ],
)
def test_what_could_be_training_is_refused_by_its_line(cluster: Cluster, launch: str) -> None:
    (cluster.bin / "train").symlink_to("python")
    cluster.script("python train.py", "inner.sh")
    is_python = launch in ("srun bash inner.sh", "srun --nodes 8 python train.py")
    refused = "python train.py" if is_python else launch
    with pytest.raises(UsageError, match=rf"calls {refused}.*names no program pretrain") as found:
        arguments_of(cluster.script(launch))
    assert "pass the script that it starts" in str(found.value)
    assert cluster.started == ""


@pytest.mark.parametrize(
    "launch",
    [
        "sbatch --wrap 'srun python pretrain_gpt.py --seed 1'",
        "sbatch --wrap='python -u pretrain_gpt.py --seed 1'",
        "docker run -v $PWD/pretrain_gpt.py:/w/pretrain_gpt.py image torchrun /w/pretrain_gpt.py "
        "--seed 1",
        "singularity exec --nv image.sif python /w/pretrain_gpt.py --seed 1",
        "ssh node1 'cd /w && torchrun pretrain_gpt.py --seed 1 >log 2>&1'",
    ],
)
def test_a_program_behind_other_launchers_is_found(cluster: Cluster, launch: str) -> None:
    assert arguments_of(cluster.script(launch)) == ["--seed", "1"]
    assert cluster.started == ""


@pytest.mark.parametrize("options", ["", "set -m", "trap 'echo trap >>started' EXIT TERM"])
@pytest.mark.parametrize(
    "launch",
    [
        "torchrun pretrain_gpt.py --seed 1",
        "(torchrun pretrain_gpt.py --seed 1; echo group >>started) & wait",
        "setsid -w bash -c 'torchrun pretrain_gpt.py --seed 1; echo session >>started'",
        "torchrun pretrain_gpt.py --seed 1 | tee log",
    ],
)
def test_a_script_ends_at_its_first_launch(cluster: Cluster, options: str, launch: str) -> None:
    later = "echo later >>started\ntorchrun pretrain_gpt.py --seed 2\nsbatch next.sh"
    assert arguments_of(cluster.script(f"{options}\n{launch}\n{later}")) == ["--seed", "1"]
    assert cluster.started == ""


def test_a_script_works_as_without_stand_ins(cluster: Cluster) -> None:
    script = cluster.script(
        'set -euo pipefail\nmkdir -p a && cd "$_"\n[[ abc =~ (b) ]]\nA=("x y" ${BASH_REMATCH[1]})\n'
        "false || CODE=$?\nfalse | true || CODES=${PIPESTATUS[*]}\n"
        "PREFIX=$(python3 -c 'import sys; print(sys.prefix)')\n"
        'exec > >(cat)\necho pretrain_gpt.py "${PWD##*/}" "${A[1]}" $CODE $CODES $PREFIX'
    )
    assert arguments_of(script) == ["a", "b", "1", "1", "0", sys.prefix]


def test_what_is_no_launch_runs_as_without_stand_ins(cluster: Cluster) -> None:
    (cluster.folder / "own").mkdir()
    (cluster.folder / "own/sitecustomize.py").write_text("import sys\nsys.own = 1\n")
    question = "import os, sys; print(sys.own, os.environ['PYTHONPATH'].count('own'))"
    script = cluster.script(
        f"export PYTHONPATH=$PWD/own\nA=$({shlex.quote(sys.executable)} -c {question!r})\n"
        f"echo import sys > tool.py\necho 'print(*sys.argv[1:])' >> tool.py\n"
        f"B=$(env A=1 {shlex.quote(sys.executable)} -u tool.py 'x y' <tool.py)\n"
        "torchrun pretrain_gpt.py $A $B"
    )
    assert arguments_of(script) == ["1", "1", "x", "y"]


@pytest.mark.parametrize(
    "text",
    [
        f"env {sys.executable} -c 'print(1)'\nN=$(env FOO=1 bash -c 'echo $FOO')",
        "set -eu\nread_it() { local tmp; tmp=$(mktemp); trap 'rm -f \"$tmp\"' RETURN\n"
        'echo 1 >"$tmp"; N=$(cat "$tmp"); }\nother() { :; }\nread_it; other',
        "set -x\n: ${N:=1}",
    ],
)
def test_a_script_may_use_what_bash_has(cluster: Cluster, text: str) -> None:
    script = cluster.script(f"{text}\ntorchrun pretrain_gpt.py --seed $N")
    assert arguments_of(script) == ["--seed", "1"]


def test_the_error_of_a_script_with_a_trace_is_shown(cluster: Cluster) -> None:
    script = cluster.script("set -x\ntrue\n: ${DATA:?must be set}\ntorchrun pretrain_gpt.py")
    with pytest.raises(UsageError, match=r"DRY_RUN=1: .*DATA: must be set\. Set the variables"):
        arguments_of(script)


@pytest.mark.parametrize("text", ["echo first; echo last >&2; echo out", "echo first; echo last"])
def test_the_last_words_of_a_script_that_launches_nothing(cluster: Cluster, text: str) -> None:
    with pytest.raises(UsageError, match=r"launches no program .* It ended with: last$"):
        arguments_of(cluster.script(f"set -x\n{text}"))


@pytest.mark.parametrize(
    "launch",
    [
        "srun bash -c 'source env.sh; python pretrain_gpt.py --lr $LR'",
        "srun --export=ALL,LR=1e-3 bash -lc 'python pretrain_gpt.py --lr $LR'",
        "mpirun -x LR=1e-3 -np 8 sh -c 'python pretrain_gpt.py --lr $LR'",
        "mpirun -genv LR 1e-3 bash inner.sh",
        "mpirun --use-hwthread-cpus -np 8 bash inner.sh",
        "srun --immediate bash inner.sh",
        "srun --bcast --test-only --interactive bash inner.sh",
        "srun bash -euo pipefail -c '. ./env.sh; ./inner.sh'",
        "srun bash -o pipefail inner.sh",
        "srun ./wrap.sh pretrain_gpt.py --lr 1e-3",
        # What cannot run here is read as it stands.
        "srun bash -c 'cd /absent && python pretrain_gpt.py --lr 1e-3'",
        "srun absent/zsh -c 'python pretrain_gpt.py --lr 1e-3'",
        "srun bash -c 'python prepare.py; python pretrain_gpt.py --lr 1e-3'",
        "srun --container-image x bash -c 'touch started; python pretrain_gpt.py --lr 1e-3'",
    ],
)
def test_the_variables_of_a_shell_behind_a_launcher(cluster: Cluster, launch: str) -> None:
    (cluster.folder / "env.sh").write_text("export LR=1e-3\n")
    cluster.script('python pretrain_gpt.py --lr "${LR:-1e-3}"', "inner.sh")
    cluster.script('exec python "$@"', "wrap.sh")
    assert arguments_of(cluster.script(launch)) == ["--lr", "1e-3"]
    assert cluster.started == ""


@pytest.mark.parametrize(
    "launch",
    [
        "srun -J pretrain --nodes 8 python pretrain_gpt.py",
        "torchrun --rdzv-id pretrain_3b --rdzv-backend c10d pretrain_gpt.py",
        'torchrun --log-dir "/logs/my pretrain runs" pretrain_gpt.py',
        "srun -m cyclic torchrun -m megatron_tst.pretrain",
        "torchrun --module megatron_tst.pretrain",
        "python -um megatron_tst.pretrain",
        "torchrun --no-python tst pretrain",
        'python -u "/my runs/llama_pretrain.py"',
    ],
)
def test_values_of_a_launcher_are_no_program(cluster: Cluster, launch: str) -> None:
    for file in (cluster.script(f"{launch} --seed 1"), cluster.folder / "command"):
        if file.name == "command":
            file.write_text(f"{launch} --seed 1\n")
        assert arguments_of(file) == ["--seed", "1"]


def test_a_python_program_with_a_value_named_pretrain_runs(cluster: Cluster) -> None:
    (cluster.folder / "count.py").write_text("print(len('abc'))\n")
    script = cluster.script(
        "N=$(python3 count.py --folder runs/my.pretrain)\ntorchrun pretrain_gpt.py --num-layers $N"
    )
    assert arguments_of(script) == ["--num-layers", "3"]


@pytest.mark.parametrize("value", ["pretrain", "pretrain_small", "pretrain_gpt.py"])
def test_a_file_of_arguments_keeps_what_stands_before_a_value(tmp_path: Path, value: str) -> None:
    file = tmp_path / "arguments"
    file.write_text(f"--num-layers 2\n--wandb-exp-name {value} # name\n--hidden-size 8 \\\n--bf16")
    words = ["--num-layers", "2", "--wandb-exp-name", value, "--hidden-size", "8", "--bf16", "--x"]
    assert arguments_of(file, ["--x"]) == words


def test_ends_of_lines_are_those_of_a_shell(tmp_path: Path) -> None:
    file = tmp_path / "command"
    command = (
        "export LEVEL=info\ntorchrun --nproc-per-node 8 pretrain_gpt.py \\\n  --num-layers 2 \\\n"
        "  --data-path 'a b' --name run#3 --pattern 'M|M' --seed 2 > log 2>&1\necho done\n"
    )
    words = shlex.split("--num-layers 2 --data-path 'a b' --name run#3 --pattern 'M|M' --seed 2")
    for text in (command, command.replace("\n", "\r\n")):
        file.write_text(text, newline="")
        assert arguments_of(file) == words
    # A comment has no next line: what stands there is not lost with it.
    file.write_text("--num-layers 2 \\\n# --bf16 \\\n--seed 3\n")
    assert arguments_of(file) == ["--num-layers", "2", "--seed", "3"]
    file.write_text('torchrun pretrain_gpt.py --num-layers "$(cat layers)"')
    with pytest.raises(UsageError, match=r"\$\(cat layers\) among the arguments"):
        arguments_of(file)


def test_a_command_that_is_printed_over_several_lines_is_read(cluster: Cluster) -> None:
    script = cluster.script("printf '%s\\n' Command: 'torchrun pretrain_gpt.py \\' '  --seed 1'")
    assert arguments_of(script) == ["--seed", "1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cd /opt/m && torchrun {} 2>&1 | tee /logs/pretrain.log", []),
        ("torchrun {} --wandb-exp-name 'a; b'; echo done", ["--wandb-exp-name", "a; b"]),
        ("(torchrun {} --seed 2 >log &>more) &", ["--seed", "2"]),
        ("torchrun \\\n {} \\\n --bf16\necho done", ["--bf16"]),
    ],
)
def test_the_rest_of_a_text_for_a_shell_is_no_argument(
    cluster: Cluster, text: str, words: list[str]
) -> None:
    text = text.format("pretrain_gpt.py --num-layers 2")
    script = cluster.script(f"srun --container-image x bash -c {shlex.quote(text)}")
    assert arguments_of(script) == ["--num-layers", "2", *words]


@pytest.mark.parametrize(
    ("launch", "value"),
    [
        ("torchrun pretrain_gpt.py", {}),
        (f"export {CONNECTIONS}=1\nsrun python pretrain_gpt.py", {CONNECTIONS: "1"}),
        (f"{CONNECTIONS}=8 torchrun pretrain_gpt.py", {CONNECTIONS: "8"}),
        (f"srun --export=ALL,{CONNECTIONS}=1 python pretrain_gpt.py", {CONNECTIONS: "1"}),
        (f"srun bash -c 'export {CONNECTIONS}=1; python pretrain_gpt.py'", {CONNECTIONS: "1"}),
        (f"docker run -e {CONNECTIONS}=1 image python pretrain_gpt.py", {CONNECTIONS: "1"}),
        (f"export {CONNECTIONS}=1\ndocker run image python pretrain_gpt.py", None),
        (f"mpirun -genv {CONNECTIONS} 1 python pretrain_gpt.py", {CONNECTIONS: "1"}),
        (f"mpirun -n 8 -env {CONNECTIONS} 1 bash -c 'python pretrain_gpt.py'", {CONNECTIONS: "1"}),
        ("srun bash -c '. ./env.sh; python pretrain_gpt.py'", {CONNECTIONS: "1"}),
        ("srun --container-image x python pretrain_gpt.py", None),
        ("srun --container-image=x bash inner.sh", None),
        ("apptainer exec x python pretrain_gpt.py", None),
        ("singularity exec x python pretrain_gpt.py", None),
        ("srun enroot start x python pretrain_gpt.py", None),
        ("echo torchrun pretrain_gpt.py", None),
    ],
)
def test_the_environment_of_a_launch(
    cluster: Cluster, launch: str, value: dict[str, str] | None
) -> None:
    (cluster.folder / "env.sh").write_text(f"export {CONNECTIONS}=1\n")
    cluster.script("python pretrain_gpt.py", "inner.sh")
    assert read_launch(cluster.script(launch)).environment == value


@pytest.mark.parametrize(
    ("variables", "added", "export", "level", "words"),
    [
        (
            {},
            "--context-parallel-size 2",
            "",
            "error",
            f"{CONNECTIONS} is not set in the launch, and Megatron ends without a 1 with "
            "--context-parallel-size 2 at compute capability 9.0 (--compute-capability): "
            f"export {CONNECTIONS}=1.",
        ),
        ({}, "--context-parallel-size 2", f"export {CONNECTIONS}=1", "", ""),
        (
            {"FSDP": "1"},
            "",
            f"export {CONNECTIONS}=1",
            "error",
            f"{CONNECTIONS} is 1 in the launch, and Megatron ends over it with --use-torch-fsdp2: "
            "unset it.",
        ),
        (
            {},
            "--context-parallel-size 2",
            None,
            "note",
            f"{CONNECTIONS} was assumed to be 1, without which --context-parallel-size 2",
        ),
    ],
)
def test_the_queues_of_kernels_that_megatron_asserts(
    cluster: Cluster,
    variables: dict[str, str],
    added: str,
    export: str | None,
    level: str,
    words: str,
) -> None:
    argv = Checked(cluster.folder).script(
        "270m", VARIANT="baseline", PRECISION="bf16", CUDA_GRAPHS="0", **variables
    )
    words_of_launch = shlex.join([*argv, "--num-layers", "2", *added.split()])
    if export is None:
        launch = cluster.folder / "arguments"
        launch.write_text(words_of_launch)
    else:
        launch = cluster.script(f"{export}\ntorchrun pretrain_gpt.py {words_of_launch}")
    asked = [str(launch), "--world-size", "8", "--compute-capability", "9.0"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/preflight.py"), *asked],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (level == "error"), done.stdout + done.stderr
    assert (f"{level}: {CONNECTIONS}" in done.stdout) == bool(level)
    assert words in done.stdout
    assert (CONNECTIONS in done.stdout) == bool(level)
