"""Runs pre-training in real processes without paying for the imports each time.

One process imports torch and Megatron (8 s) and forks the ranks of every run from there; each run
has its own processes, environment, process group and log, and can be killed like any other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]

_manager: Any = None


@dataclass
class Run:
    """The processes of one run."""

    pids: list[int]
    log: Path
    exit_codes: dict[int, int] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return len(self.exit_codes) == len(self.pids)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self, rank: int = 0, signum: int = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], signum)


class Launcher:
    """Starts runs through a zygote process, which it owns."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
            # Unbuffered: an event held back in a buffer would not wake the select.
            bufsize=0,
        )
        self._runs: dict[int, Run] = {}

    def start(
        self,
        argv: Sequence[str],
        log: Path,
        world_size: int = 1,
        main: str = "megatron_tst.training.pretrain:main",
        environment: dict[str, str] | None = None,
    ) -> Run:
        """Starts ``main`` with ``argv`` on ``world_size`` ranks, all writing to ``log``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        request = {
            "argv": list(argv),
            "log": str(log),
            "world_size": world_size,
            "port": _free_port(),
            "main": main,
            "environment": environment or {},
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        pids = None
        while pids is None:
            event = self._read_event(120)
            if not event:
                raise TimeoutError("the zygote does not answer")
            pids = event.get("pids")
        run = Run(pids, log)
        self._runs.update(dict.fromkeys(pids, run))
        return run

    def wait(self, run: Run, seconds: float = 300) -> list[int]:
        """Waits for all ranks and returns their exit codes, by rank; kills a run that hangs."""
        deadline = time.monotonic() + seconds
        while not run.finished:
            left = deadline - time.monotonic()
            if left <= 0:
                self.kill_all(run)
                raise TimeoutError(f"{run.log}:\n{run.text[-4000:]}")
            self._read_event(left)
        return [run.exit_codes[pid] for pid in run.pids]

    def run(self, argv: Sequence[str], log: Path, world_size: int = 1, **kwargs: Any) -> Run:
        """Starts a run, waits for it and requires that it succeeds."""
        started = self.start(argv, log, world_size, **kwargs)
        codes = self.wait(started)
        assert not any(codes), f"exit codes {codes}\n{started.text[-6000:]}"
        return started

    def kill_all(self, run: Run) -> None:
        for pid in run.pids:
            if pid not in run.exit_codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the zygote, which kills the runs that are left."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)

    def _read_event(self, seconds: float) -> dict[str, Any]:
        stdout: IO[bytes] | None = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], seconds)
        if not ready:
            return {}
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the zygote ended with {self._process.wait(10)}")
        event: dict[str, Any] = json.loads(line)
        if "exited" in event:
            run = self._runs[event["exited"]]
            run.exit_codes[event["exited"]] = event["code"]
        return event


def _free_port() -> int:
    # Below the ports that the kernel hands out: another process could get one of those before the
    # ranks of this run have come so far as to listen.
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def _serve() -> None:
    """The zygote: forks on request, reports process ids and exits, one JSON object a line."""
    # Reports keep their own channel: the imports and the children write to standard output.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _import_everything()
    children: set[int] = set()
    while True:
        ready, _, _ = select.select([0], [], [], 0.02)
        if ready:
            line = _read_line(0)
            if not line:
                for pid in children:
                    _kill_session(pid)
                break
            request = json.loads(line)
            pids = [_fork_rank(request, rank) for rank in range(request["world_size"])]
            children.update(pids)
            print(json.dumps({"pids": pids}), file=events)
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.remove(pid)
                _kill_session(pid)
                event = {"exited": pid, "code": os.waitstatus_to_exitcode(status)}
                print(json.dumps(event), file=events)


def _import_everything() -> None:
    """Imports what a run imports, and starts what each run would start and wait for."""
    global _manager
    from megatron_tst import cpu

    cpu.activate()
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text
    import megatron.training.argument_utils
    import megatron.training.arguments
    import torch._dynamo
    import torch.multiprocessing
    import torch.utils.tensorboard

    import megatron_tst.training.pretrain  # noqa: F401

    # Megatron makes its parser from the sources of its settings, several times a run.
    factory: Any = megatron.training.argument_utils.ArgumentGroupFactory
    read_help = functools.partial(factory._get_field_docstrings, object.__new__(factory))
    help_of = functools.cache(read_help)
    factory._get_field_docstrings = lambda self, settings: help_of(settings)
    megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())
    # Megatron's checkpoint writer starts one a rank, which imports torch.
    _manager = torch.multiprocessing.get_context("spawn").Manager()
    # Megatron collects garbage around evaluations and saves: no rank needs to look at all of this,
    # nor get pages of its own for it.
    gc.collect()
    gc.freeze()


def _kill_session(leader: int) -> None:
    """Ends a rank and what it leaves behind: the checkpoint writer has a process of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _read_line(descriptor: int) -> bytes:
    # Unbuffered: a line that a buffer holds back would not wake the select.
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            return b""
        line += byte
    return line


def _fork_rank(request: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    os.setsid()
    try:
        output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(request["world_size"]),
            LOCAL_WORLD_SIZE=str(request["world_size"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(request["port"]),
            **request["environment"],
        )
        _adopt_manager()
        code = _call(request["main"], request["argv"])
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _adopt_manager() -> None:
    """Gives this rank a queue of its own with the manager that is already there."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    assert filesystem_async._results_queue is None
    filesystem_async._results_queue = _manager.Queue()


def _call(main: str, argv: list[str]) -> int:
    from importlib import import_module

    module, function = main.split(":")
    sys.argv = [module, *argv]
    result = getattr(import_module(module), function)()
    return int(result or 0)


if __name__ == "__main__":
    _serve()
