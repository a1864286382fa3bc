"""Tests the project with other versions and writes the table of docs/versions.md.

    python -m tests.versions [NAME ...] [-- PYTEST-ARGUMENT ...]

``make test-versions`` runs all. An environment lies in ``.venv/overlays/NAME``, on top of the
packages of ``.venv`` or with an interpreter of its own, and is built where it is not there yet.
Without arguments for pytest, the tests are those of ``TESTS`` that the environment is about.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tst.common.atomic_files import write_file
from tests.durations import processor

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs/versions.md"
OVERLAYS = ROOT / ".venv/overlays"
BEGIN, END = "<!-- Made by make test-versions; do not edit. -->", "<!-- End of what is made. -->"
_COLUMNS = (
    *("environment", "tests", "Python", "torch", "Triton", "transformers", "numpy"),
    *("passed", "failed", "skipped", "minutes", "machine", "commit"),
)
_ASK = (
    "import platform, importlib.metadata as m; print(platform.python_version(), "
    "*map(m.version, ('torch', 'triton', 'transformers', 'numpy')))"
)

TESTS = {
    # Kernels interpreted and compiled, losses and embedding, data sets, runs through the switch
    # with their resumes and with a newer torch in the middle, exports and the way back, preflight,
    # the CPU platform.
    "chosen": """
        tests/unit/test_kernels_compile.py tests/unit/test_kernels_bag_embedding.py
        tests/unit/test_kernels_cross_entropy.py tests/unit/test_native_*.py
        tests/unit/test_compiled_ops.py tests/unit/test_multi_hot_cross_entropy.py
        tests/unit/test_linear_*.py tests/unit/test_bag_embedding.py tests/unit/test_objectives.py
        tests/unit/test_dataset*.py tests/unit/test_stream.py tests/unit/test_torch_dist_writer.py
        tests/unit/test_cpu_attention.py tests/unit/test_cpu_norm.py tests/unit/test_cpu_platform.py
        tests/unit/test_cpu_rotary.py tests/unit/test_cpu_swiglu.py
        tests/unit/test_preflight.py::test_all_errors_of_arguments_are_told_at_once
        tests/unit/test_preflight.py::test_the_torch_that_runs_is_named
        tests/distributed/test_tensor_parallel_numerics.py
        tests/integration/test_training.py
        tests/integration/torch_upgrade.py
        tests/integration/test_resume.py::test_the_checkpoint_of_a_newer_torch_is_not_called_damaged
        tests/integration/test_hf_export.py
        tests/integration/test_hf_import.py::test_the_way_back_gives_the_same_bits
        tests/integration/test_hf_import.py::test_training_goes_on_from_the_loss_of_transformers
    """,
    # What reads or writes folders, configurations and tokenizers of transformers.
    "transformers": """
        tests/integration/test_hf_export.py tests/unit/test_hf_mapping.py
        tests/integration/test_hf_import.py::test_the_way_back_gives_the_same_bits
        tests/integration/test_hf_import.py::test_training_goes_on_from_the_loss_of_transformers
        tests/unit/test_model_families.py tests/unit/test_model_folder.py
        tests/unit/test_huggingface_tokenizer.py
    """,
}


@dataclass(frozen=True)
class Environment:
    """Versions that are not those of constraints.txt."""

    packages: str = ""
    python: str = ""
    """Version of another interpreter, which gets every package of constraints.txt."""
    tests: str = "chosen"


ENVIRONMENTS = {
    "pinned": Environment(),
    # Triton 3.6's interpreter needs a numpy before 2.4.
    "torch-2.11": Environment("--no-deps torch==2.11.0 triton==3.6.0 numpy==2.3.5"),
    "torch-2.13": Environment("--no-deps torch==2.13.0 triton==3.7.1"),
    "torch-2.15": Environment("--no-deps torch==2.15.0 triton==3.9.0 nvidia-nvshmem-cu13==3.7.2"),
    **{
        f"transformers-5.{minor}": Environment(f"transformers==5.{minor}.*", tests="transformers")
        for minor in range(17, 25)
    },
    "python-3.13": Environment(python="3.13"),
}


def main(arguments: Sequence[str]) -> int:
    """Returns 1 where a test fails or an environment cannot be built."""
    names, pytest_arguments = [*arguments], []
    if "--" in names:
        split = names.index("--")
        names, pytest_arguments = names[:split], names[split + 1 :]
    if unknown := set(names) - ENVIRONMENTS.keys():
        raise SystemExit(f"no environment {', '.join(unknown)}: pass some of {[*ENVIRONMENTS]}")
    failed = []
    for name in names or ENVIRONMENTS:
        print(f"versions: {name}", flush=True)
        try:
            row, failures = run(name, build(name), pytest_arguments)
        except subprocess.CalledProcessError as error:
            print(f"versions: {name} was not built or tested: {error}", file=sys.stderr)
            failed.append(name)
            continue
        write_file(TARGET, updated(TARGET.read_text(), row, failures))
        if failures:
            failed.append(name)
    print(f"versions: failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def build(name: str) -> Path:
    """The interpreter of an environment, which is installed where it is not there as wanted."""
    environment = ENVIRONMENTS[name]
    folder = OVERLAYS / name
    if not (environment.packages or environment.python):
        return Path(sys.executable)
    stamp, wanted = folder / "installed", repr(environment)
    python = folder / "bin/python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    if environment.python:
        found = subprocess.check_output(["scripts/find_python.sh", environment.python], cwd=ROOT)
        subprocess.run([found.decode().strip(), "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt"]
        subprocess.run([*pip, "--editable", ".[dev]"], cwd=ROOT, check=True)
    else:
        overlay = ["scripts/overlay.sh", name, *environment.packages.split()]
        subprocess.run(overlay, cwd=ROOT, check=True)
    stamp.write_text(wanted)
    return python


def run(name: str, python: Path, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A row of the table, and the tests that failed."""
    tests = ENVIRONMENTS[name].tests
    chosen = arguments or _files(TESTS[tests])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.xml"
        command = [str(python), "-m", "pytest", "-q", "-n", "0", f"--junitxml={results}", *chosen]
        # Torch would build an extension anew for every version that shares the folder.
        extensions = {"TORCH_EXTENSIONS_DIR": str(OVERLAYS / name / "torch_extensions")}
        environment = os.environ | {"CI": ""} | extensions
        ended = subprocess.run(command, cwd=ROOT, env=environment).returncode
        # Anything else than failed tests, an interruption too, leaves counts that mean nothing.
        if ended not in (0, 1):
            raise subprocess.CalledProcessError(ended, command)
        counts, failures = _read(results)
    minutes = (time.monotonic() - started) / 60
    versions = subprocess.check_output([python, "-c", _ASK], text=True).split()
    asked = f"`{' '.join(arguments)}`" if arguments else tests
    numbers = [str(counts[kind]) for kind in ("passed", "failed", "skipped")]
    machine = f"{os.cpu_count()} cores, {processor()}"
    return [
        f"`{name}`",
        asked,
        *versions,
        *numbers,
        f"{minutes:.0f}",
        machine,
        _commit(),
    ], failures


def _commit() -> str:
    """Whether anything but the page, which an earlier row has changed, differs from it."""
    commit = subprocess.check_output(["git", "describe", "--always"], cwd=ROOT, text=True).strip()
    changes = ["git", "status", "--porcelain", "--", ".", f":!{TARGET.relative_to(ROOT)}"]
    return commit + ("-dirty" if subprocess.check_output(changes, cwd=ROOT) else "")


def _files(patterns: str) -> Iterator[str]:
    for pattern in patterns.split():
        file, separator, test = pattern.partition("::")
        yield from (f"{p.relative_to(ROOT)}{separator}{test}" for p in sorted(ROOT.glob(file)))


def _read(results: Path) -> tuple[Counter[str], list[str]]:
    """How many tests passed, failed and were skipped, and which failed."""
    counts: Counter[str] = Counter()
    failures = []
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            file = case.get("classname", "").rpartition(".")[2]
            failures.append(f"{file}::{case.get('name')}")
    return counts, failures


def updated(page: str, row: Sequence[str], failures: Sequence[str]) -> str:
    """The page with the result of one environment in place of an earlier one of the same tests."""
    before, begin, rest = page.partition(BEGIN)
    made, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(
            f"{TARGET}: has no lines {BEGIN!r} and {END!r}: put them where the table is to be."
        )
    key = f"| {row[0]} | {row[1]} |"
    rows = [line for line in made.splitlines() if re.match(r"\| `", line)]
    rows = [line for line in rows if not line.startswith(key)] + [_row(row)]
    named = f"- {row[0]}, {row[1]}: "
    lists = [
        line for line in made.splitlines() if line.startswith("- ") and not line.startswith(named)
    ]
    if failures:
        lists.append(named + ", ".join(f"`{test}`" for test in failures))
    lines = [
        _row(_COLUMNS),
        _row(["---"] * len(_COLUMNS)),
        *sorted(rows, key=_place),
        "",
        *sorted(lists, key=_place),
    ]
    return f"{before}{begin}\n\n" + "\n".join(lines).rstrip() + f"\n\n{end}{after}"


def _place(line: str) -> int:
    return [*ENVIRONMENTS].index(line.split("`")[1])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
