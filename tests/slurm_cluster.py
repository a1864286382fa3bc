"""A real Slurm on one machine: a controller and its nodes, each with a network of its own.

    python -m tests.slurm_cluster            # a shell on the node of the controller
    python -m tests.slurm_cluster sinfo      # or one command there

Needs Slurm's daemons and commands and munge (``scripts/install_system_packages.sh`` installs them),
and root with the rights of ``tests.network_namespaces``. Nodes see their own ``/run`` and
``/etc/hosts``; the rest is written into one folder. Leaving ends every process and job.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import network_namespaces
from tests.network_namespaces import Node

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={head}
AuthType=auth/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
# No cgroups, which a container may not change.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
# Jobs start at once, and not after three seconds.
SchedulerParameters=batch_sched_delay=0
ReturnToService=2
# Nodes may have more CPUs and memory together than this machine has.
SlurmdParameters=config_overrides
NodeName={nodes} CPUs=2 RealMemory=16000
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE
"""


def why_unavailable() -> str | None:
    """Says why there can be no Slurm here; None if there can."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=_PATH)]
    if missing:
        return f"no {', '.join(missing)}: run scripts/install_system_packages.sh"
    return network_namespaces.why_unavailable()


@dataclass
class Slurm:
    """A running cluster.

    Attributes:
        folder: logs and states of the daemons.
        head: where the controller runs and jobs are submitted.
        nodes: where jobs run.
    """

    folder: Path
    head: Node
    nodes: list[Node]

    def run(
        self, *command: str | Path, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the head."""
        done = subprocess.run(
            self.head.inside([str(word) for word in command]),
            env=self.environment(environment),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def environment(self, variables: Mapping[str, str] | None = None) -> dict[str, str]:
        """What commands of Slurm need, over the given variables or those of this process."""
        given = os.environ if variables is None else variables
        path = f"{given.get('PATH', '')}:{_PATH}"
        return {**given, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def submit(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> str:
        """Runs sbatch and returns the id of the job."""
        return self.run("sbatch", "--parsable", *arguments, environment=environment).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by name."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Waits until a job is in one of some states."""
        self.wait_until(lambda: self.job(job)["JobState"] in states, seconds, job)
        return self.job(job)

    def wait_until(
        self, condition: Callable[[], bool], seconds: float = 300, job: str = ""
    ) -> None:
        """Waits for something, and says how the job stands if it does not come."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.job(job) if job else ''}\n{self.log(job)[-4000:]}")
            time.sleep(0.1)

    def log(self, job: str) -> str:
        """What a job has written, or nothing."""
        path = Path(self.job(job)["StdOut"]) if job else self.folder / "slurmctld.log"
        return path.read_text(errors="replace") if path.exists() else ""


@contextmanager
def slurm(size: int) -> Iterator[Slurm]:
    """Starts a controller and nodes; ends their processes and jobs at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as name,
        network_namespaces.cluster(size + 1) as made,
    ):
        folder, (head, *nodes) = Path(name), made.nodes
        started = Slurm(folder, head, nodes)
        _write_files(started)
        for node in made.nodes:
            _start_munge(started, node)
        _start(started, head, "slurmctld", "-D")
        for node in nodes:
            _start(started, node, "slurmd", "-D")
        idle = f"{len(nodes)} idle"
        started.wait_until(
            lambda: (
                idle in started.run("sinfo", "--noheader", "--format", "%D %t", check=False).stdout
            )
        )
        yield started


def _write_files(made: Slurm) -> None:
    nodes = ",".join(node.name for node in made.nodes)
    text = _CONFIGURATION.format(head=made.head.name, nodes=nodes, folder=made.folder)
    (made.folder / "slurm.conf").write_text(text)
    names = [f"{node.address} {node.name}\n" for node in (made.head, *made.nodes)]
    (made.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
    (made.folder / "key").touch(mode=0o600)
    (made.folder / "key").write_bytes(os.urandom(128))


def _start_munge(made: Slurm, node: Node) -> None:
    node.run("mount", "-t", "tmpfs", "run", "/run")
    node.run("mount", "--bind", str(made.folder / "hosts"), "/etc/hosts")
    node.run("mkdir", "/run/munge")
    state = [f"--{kind}-file={made.folder}/munge-{node.name}.{kind}" for kind in ("log", "seed")]
    key = f"--key-file={made.folder}/key"
    _start(made, node, "munged", "--foreground", "--force", key, *state)


def _start(made: Slurm, node: Node, *command: str) -> None:
    node.start(command, made.folder / f"{node.name}.txt", made.environment())


def main(command: Sequence[str]) -> int:
    """Runs a command, or a shell, on the head of a cluster of three nodes."""
    reason = why_unavailable()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with slurm(3) as made:
        print(f"slurm: {', '.join(node.name for node in made.nodes)}; logs: {made.folder}")
        return subprocess.run(
            made.head.inside(command or [os.environ.get("SHELL", "bash")]), env=made.environment()
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
