"""What there is to know about a GPU within ten minutes, in one JSON and one table.

    make gpu-check                  # torch, triton and megatron-core are enough
    make gpu-check-te               # the arms of Transformer Engine, in bf16 and fp8

Each stage is a process under a time limit and leaves its rows as it goes, so that nothing measured
is lost; both files are written anew after each stage. What needs a package that is not there is
left out by name. On a CPU (--device cpu) the same runs in Triton's interpreter at sizes that say
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.measuring import read  # noqa: E402
from benchmarks.gpu.tables import METRICS, counters, tables  # noqa: E402
from benchmarks.gpu.training import ARMS, TE_ARMS  # noqa: E402
from megatron_tst.common.atomic_files import write_file, write_json  # noqa: E402

HERE = Path(__file__).parent
MACHINE_STAGES = (
    "ceilings", "tests", "sanitizer", "kernels", "counters", "linear", "resume", "training",
)  # fmt: skip
TE_STAGE = "te"
# What a stage runs under, and where it may lie beside PATH.
TOOLS = {"sanitizer": "compute-sanitizer", "counters": "ncu"}
TOOL_FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute")
# Keeps half a minute of ten for what comes before and after.
TOTAL_SECONDS = 570
# What Nsight Compute says where the driver keeps its counters to administrators.
DENIED = "ERR_NVGPUCTRPERM"
# What the tests need beside pytest.
TEST_PACKAGES = ("pytest", "hypothesis")


@dataclass(frozen=True)
class Task:
    """A process of a stage, for how long it may run, and the tool that runs it."""

    stage: str
    name: str
    command: tuple[str, ...]
    seconds: float
    under: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    stage: str
    name: str
    ended: str
    seconds: float


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """The processes that were asked for, in their order."""
    tiny = ("--tiny",) if options.device == "cpu" else ()
    seconds = {"ceilings": 40, "kernels": 120, "linear": 60, "sanitizer": 60, "counters": 40}
    for stage in options.stages:
        where = ("--rows", str(options.output / f"{stage}.jsonl"))
        if stage == "tests":
            # The settings of pyproject.toml are those of plug-ins that may be missing.
            pytest = ("-m", "pytest", "-m", "gpu", "-q", "-o", "addopts=--import-mode=importlib")
            yield Task(stage, stage, (*pytest, "-p", "no:cacheprovider", "tests/unit"), 60)
        elif stage in seconds:
            command = (str(HERE / "stages.py"), stage, *where, "--device", options.device, *tiny)
            yield Task(stage, stage, command, seconds[stage], under(stage, options.output))
        elif stage == "resume":
            yield Task(stage, stage, (str(HERE / "resume.py"), *where, *tiny), 90)
        else:
            arms = TE_ARMS if stage == TE_STAGE else ARMS
            steps = ("--steps", str(options.steps))
            for arm in options.arms or arms:
                command = (str(HERE / "training.py"), arm, *where, *steps, *tiny)
                yield Task(stage, arm, command, 85 if stage == TE_STAGE else 45)


def under(stage: str, folder: Path) -> tuple[str, ...]:
    """The tool that a stage runs under, with its options, where it is installed."""
    tool = TOOLS.get(stage)
    path = (
        shutil.which(tool, path=os.pathsep.join((os.environ["PATH"], *TOOL_FOLDERS)))
        if tool
        else None
    )
    if path is None:
        return ()
    if stage == "sanitizer":
        return (path, "--tool", "memcheck", "--error-exitcode", "1")
    log = str(folder / "counters.csv")
    own = ("--kernel-name", "regex:^_[a-z]+_kernel$", "--metrics", ",".join(METRICS))
    return (path, "--csv", "--page", "raw", "--print-units", "base", "--log-file", log, *own)


def missing(task: Task, device: str) -> str | None:
    """Why a process is not started."""
    if device == "cpu" and task.stage in ("tests", *TOOLS):
        return "no GPU"
    if task.stage in TOOLS and not task.under:
        return f"{TOOLS[task.stage]} not installed"
    needed = {"tests": TEST_PACKAGES, TE_STAGE: ("transformer_engine",)}.get(task.stage, ())
    absent = [package for package in needed if find_spec(package) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def run(task: Task, log: Path, device: str, seconds: float) -> Outcome:
    """Runs a process with its output in a file, and ends it with all its children in time."""
    reason = missing(task, device)
    if reason or seconds <= 0:
        return Outcome(task.stage, task.name, f"left out: {reason or 'no time left'}", 0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if task.stage == "sanitizer":
        # Each tensor has memory of its own, whose ends are known.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}
        if task.stage in ("kernels", "linear"):
            environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*task.under, sys.executable, *task.command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            ended = "done" if code == 0 else f"failed with {code}: {last_line(log)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        finally:
            end_group(process)
    if task.stage in ("tests", "sanitizer"):
        ended += f" ({last_line(log)})"
    if DENIED in log.read_text(errors="replace"):
        ended = f"left out: {DENIED}, counters are for administrators"
    return Outcome(task.stage, task.name, ended, time.monotonic() - start)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it has started; its group is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last line that a process printed."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")[:300]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = (*MACHINE_STAGES, TE_STAGE)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/gpu-check")
    parser.add_argument("--stages", nargs="+", choices=stages, default=list(MACHINE_STAGES))
    parser.add_argument("--arms", nargs="+", choices=ARMS | TE_ARMS, help="default: all")
    parser.add_argument("--steps", type=int, default=60, help="of each arm")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all stages")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages and prints the table; 1 if one failed or was stopped, 2 without a GPU."""
    options = parse_arguments(argv)
    start = time.monotonic()
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda" and not has_gpu():
        print("error: torch sees no CUDA device on this machine", file=sys.stderr)
        return 2
    for stage in options.stages:  # of an earlier run
        (options.output / f"{stage}.jsonl").unlink(missing_ok=True)
    (options.output / "counters.csv").unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    for number, task in enumerate(tasks(options)):
        left = options.seconds - (time.monotonic() - start)
        log = options.output / f"{number:02d}-{task.stage}.log"
        outcomes.append(run(task, log, options.device, min(task.seconds, left)))
        print(f"{task.stage}, {task.name}: {outcomes[-1].ended}", flush=True)
        write_results(options, outcomes)
    print(f"\n{(options.output / 'gpu-check.md').read_text()}")
    expected = ("done", "left out")
    return 0 if all(outcome.ended.startswith(expected) for outcome in outcomes) else 1


def has_gpu() -> bool:
    """Whether torch sees a GPU; asked in another process, which leaves none of its memory taken."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def write_results(options: argparse.Namespace, outcomes: list[Outcome]) -> None:
    """Writes gpu-check.json and gpu-check.md from all rows that there are so far."""
    rows = {stage: read(options.output / f"{stage}.jsonl") for stage in (*MACHINE_STAGES, TE_STAGE)}
    rows["counters"] = counters(options.output / "counters.csv")
    ended = [asdict(outcome) for outcome in outcomes]
    write_json(options.output / "gpu-check.json", {"stages": ended, "rows": rows})
    write_file(options.output / "gpu-check.md", tables(ended, rows))


if __name__ == "__main__":
    sys.exit(main())
