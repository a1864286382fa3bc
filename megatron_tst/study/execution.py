"""Starts the training process of a run and waits for its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.study.run_folder import LogReader, RunFolder, State

# Longer than torchrun waits for its processes before it kills them.
_SECONDS_TO_STOP = 60.0


@dataclass(frozen=True)
class Slot:
    """A part of the machine that one run at a time has to itself.

    Attributes:
        cores: CPU cores; empty: any.
        gpus: names of GPUs as in ``CUDA_VISIBLE_DEVICES``; empty: none.
        threads: CPU threads of each process.
    """

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()
    threads: int = 1

    def environment(self) -> dict[str, str]:
        """Environment variables of a run in this slot."""
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpus),
        }

    def prefix(self) -> list[str]:
        """What stands before a command to keep it on the cores."""
        if not self.cores or not shutil.which("taskset"):
            return []
        return ["taskset", "--cpu-list", ",".join(map(str, self.cores))]


@dataclass
class Execution:
    """One attempt at a run.

    Attributes:
        name: for people.
        folder: where it writes.
        arguments: Megatron's, without output paths.
        total_steps: when it is done.
        processes: ranks.
        keeps_checkpoints: whether it can go on after a failure.
        record: what else ``run.json`` holds.
        model: runs of one model take about as long a step.
    """

    name: str
    folder: RunFolder
    arguments: Sequence[str]
    total_steps: int
    processes: int = 1
    keeps_checkpoints: bool = True
    record: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""

    def __post_init__(self) -> None:
        self.log = LogReader(self.folder.log)
        # Seconds of the monotonic clock, and the step there.
        self.started = 0.0
        self.first_logged, self._first_step = 0.0, 0
        self._last_logged = 0.0
        self._slot = Slot()
        self._process: subprocess.Popen[bytes] | None = None
        self._resources = ExitStack()

    def start(self, slot: Slot) -> None:
        """Launches the run with torchrun.

        Raises:
            BlockingIOError: a process of an earlier attempt still runs.
        """
        lock = self._resources.enter_context(self.folder.lock())
        self.folder.begin()
        self.log.begin_attempt(self.folder.checkpoint_step())
        self._slot = slot
        self._write("running")
        output = self._resources.enter_context(self.folder.log.open("ab"))
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [*slot.prefix(), *self.command()],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot.environment(), "PYTHONWARNINGS": "ignore"},
            # Torchrun holds the lock: a runner that was killed cannot be followed by a second
            # copy of its runs.
            pass_fds=(lock.fileno(),),
        )

    def command(self) -> list[str]:
        """The command line."""
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(self.processes), "-m", "megatron_tst.pretrain"),
            *self.arguments,
            *self.folder.outputs(self.keeps_checkpoints),
        ]

    def poll(self) -> State:
        """Reads the log; ``running``, or how the run has ended."""
        assert self._process is not None
        code = self._process.poll()
        before = self.log.step
        self.log.poll()
        if self.log.step != before:
            self._last_logged = time.monotonic()
            if not self.first_logged:
                self.first_logged, self._first_step = self._last_logged, self.log.step
        return "running" if code is None else self._end(code)

    @property
    def pace(self) -> tuple[int, float]:
        """Steps of this attempt since it first logged, and their seconds: no start-up."""
        return self.log.step - self._first_step, self._last_logged - self.first_logged

    def seconds_left(self, seconds_a_step: float, seconds_to_start: float) -> float:
        """Time to its last step; of one that was not started, from its launch.

        Args:
            seconds_a_step: expected.
            seconds_to_start: from a launch to the first line of the log, expected.
        """
        step = self.log.step if self.started else self.folder.checkpoint_step()
        seconds = (self.total_steps - step) * seconds_a_step
        if self.first_logged:
            return max(seconds - (time.monotonic() - self._last_logged), 0.0)
        waited = time.monotonic() - self.started if self.started else 0.0
        return seconds + max(seconds_to_start - waited, 0.0)

    def _end(self, code: int) -> State:
        if code == 0 and self.log.validation is not None:
            state: State = "finished"
        else:
            state = "diverged" if self.folder.has_diverged() else "failed"
        self._write(state, exit_code=code)
        self._resources.close()
        if state == "finished":
            shutil.rmtree(self.folder.path / "cache", ignore_errors=True)
        return state

    def terminate(self) -> None:
        """Asks the run to end; :meth:`stop` waits for it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Ends the run if its end was not seen yet; it is waiting afterwards."""
        if self._process is None or self.folder.state() != "running":
            return
        self.terminate()
        try:
            self._process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._write("waiting")
        self._resources.close()

    def _write(self, state: State, **more: Any) -> None:
        elapsed = {} if state == "running" else {"seconds": round(time.monotonic() - self.started)}
        place = {"cores": self._slot.cores, "gpus": self._slot.gpus}
        command = " ".join(self.command())
        self.folder.write_record(
            state=state, **self.record, **elapsed, **place, **more, command=command
        )


def gpus_of_this_machine() -> list[str]:
    """Names of the GPUs that this process may use, by ``CUDA_VISIBLE_DEVICES`` or nvidia-smi."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i in range(len(listed.stdout.splitlines()))]


def cores_of_this_process() -> list[int]:
    """Numbers of the CPU cores that it may use; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def slots_of_this_machine(jobs: int | None, processes: int) -> list[Slot]:
    """Divides cores and GPUs among runs so that none is given twice.

    Args:
        jobs: runs at once; by default one for each ``processes`` GPUs, or cores without GPUs.
        processes: ranks of a run; each has a GPU, or a core where there is none.

    Raises:
        UsageError: naming what there is too little of.
    """
    cores = cores_of_this_process()
    gpus = gpus_of_this_machine()
    kind, available = ("GPUs", len(gpus)) if gpus else ("cores", len(cores) or os.cpu_count() or 1)
    jobs = jobs or max(available // processes, 1)
    if jobs * processes > available:
        raise UsageError(
            f"--jobs is {jobs}: {jobs} runs of {processes} processes need {jobs * processes} "
            f"{kind}, and this machine has {available}; lower --jobs or processes."
        )
    share = len(cores) // jobs
    return [
        Slot(
            cores=tuple(cores[i * share : (i + 1) * share]),
            gpus=tuple(gpus[i * processes : (i + 1) * processes]),
            threads=max(share // processes, 1),
        )
        for i in range(jobs)
    ]
