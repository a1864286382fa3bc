"""Runs a launch script up to its launch, which stand-ins take the place of."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.preflight.launch_stand_in import (
    RUNNING,
    end_session,
    processes_of,
    search_paths,
)
from megatron_tst.preflight.launchers import needs_stand_in, stand_ins

_TIMEOUT_SECONDS = 60
_OUTPUT_SECONDS = 5
_STAND_IN = '#!/bin/sh\nexec {python} -I -S {boot} {folder} {name} "$@"\n'
_START = 'echo $$ >"$0" && exec bash "$@"'
_BOOT = """import sys

sys.path.insert(0, {root!r})
from megatron_tst.preflight.launch_stand_in import main

main(sys.argv[1], sys.argv[2], sys.argv[3:])
"""
# Every Python loads it at its start, by whatever path it was called, and becomes the stand-in,
# unless that has looked at it: exec keeps the process. It runs on old Pythons too.
_SITE = """import os
import sys

if os.environ.pop({running!r}, "").split(" ")[0] != str(os.getpid()):
    words = getattr(sys, "orig_argv", None)
    if words is None:
        with open("/proc/self/cmdline", "rb") as file:
            words = [os.fsdecode(word) for word in file.read().split(b"\\0")[:-1]]
    # A program with a Python inside has none.
    if words:
        os.execv({by_path!r}, [{by_path!r}, sys.executable or words[0]] + words[1:])
sys.path[:] = [path for path in sys.path if path != {site!r}]
own = sys.modules.pop("sitecustomize")
try:
    import sitecustomize
except ImportError:
    pass
sys.modules.setdefault("sitecustomize", own)
"""


@dataclass(frozen=True)
class Launched:
    """What became of a script.

    Attributes:
        command: that it would have launched; None if it came to its end.
        environment: of that command, as far as Megatron looks at it; None if that is unknown.
        printed: output of a script that came to its end.
        last_words: its last line of errors or, without any, of output.
    """

    command: list[str] | None
    environment: Mapping[str, str] | None
    printed: str = ""
    last_words: str = ""


def run_script(script: Path, extra: Sequence[str]) -> Launched:
    """Runs a script under bash with ``DRY_RUN=1``, until it would launch something.

    Args:
        script: that launches training.
        extra: its arguments.

    Raises:
        UsageError: it fails, takes too long, or launches what cannot be read.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = _write_stand_ins(folder)
        _run(script, extra, folder, environment)
        try:
            record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            printed = (folder / "output").read_text(encoding="utf-8", errors="replace")
            lines = _lines(folder / "errors") or _lines(folder / "output") or [""]
            return Launched(None, None, printed, lines[-1])
    if record["is_refused"]:
        raise _refusal(script, record)
    return Launched(record["command"], record["environment"])


def _refusal(script: Path, record: Mapping[str, Any]) -> UsageError:
    line = shlex.join(record["command"])
    behind = record["behind"]
    where = f" (behind {_shortened(behind)})" if behind and behind != line else ""
    return UsageError(
        f"{script} calls {_shortened(line)}{where}, which names no program pretrain and was not "
        "run, as it could launch training: pass the script that it starts, let it print its "
        "command under DRY_RUN=1, or pass a file with the arguments of Megatron."
    )


def _shortened(line: str) -> str:
    return line if len(line) <= 200 else f"{line[:200]} ..."


def _write_stand_ins(folder: Path) -> dict[str, str]:
    """The environment in which a script finds them."""
    quoted = {
        "python": shlex.quote(sys.executable),
        "boot": shlex.quote(str(folder / "boot.py")),
        "folder": shlex.quote(str(folder)),
    }
    root = str(Path(__file__).parents[2])
    (folder / "boot.py").write_text(_BOOT.format(root=root), encoding="utf-8")
    (folder / "bin").mkdir()
    files = {"by_path": folder / "by_path"}
    for name in stand_ins():
        if needs_stand_in(name, is_installed=shutil.which(name) is not None):
            files[name] = folder / "bin" / name
    for name, file in files.items():
        own = "" if name == "by_path" else shlex.quote(name)
        file.write_text(_STAND_IN.format(**quoted, name=own), encoding="utf-8")
        file.chmod(0o755)
    (folder / "site").mkdir()
    text = _SITE.format(running=RUNNING, by_path=str(folder / "by_path"), site=str(folder / "site"))
    (folder / "site" / "sitecustomize.py").write_text(text, encoding="utf-8")
    return {**os.environ, "DRY_RUN": "1", **search_paths(folder)}


def _run(script: Path, extra: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    """Runs a script; it and all that it started have ended."""
    record, output, errors = (folder / name for name in ("record.json", "output", "errors"))
    with output.open("wb") as to_output, errors.open("wb") as to_errors:
        try:
            process = subprocess.Popen(
                ["bash", "-c", _START, str(folder / "session"), str(script), *extra],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=to_output,
                stderr=to_errors,
                start_new_session=True,
            )
        except OSError as error:
            raise UsageError(f"{script} cannot be run by bash: {error}.") from error
        try:
            code = _wait(process, record)
        finally:
            end_session(process.pid)
            process.wait()
    if record.exists():
        return
    if code is None:
        raise UsageError(
            f"{script} did not come to its launch under DRY_RUN=1 within {_TIMEOUT_SECONDS} "
            "seconds: let it print its command then, or pass a file with the arguments of Megatron."
        )
    if code:
        # Usage follows the error.
        lines = _lines(errors) or _lines(errors, is_trace=True)[-1:]
        reason = lines[0] if lines else "it printed nothing"
        raise UsageError(
            f"{script} ended with {code} under DRY_RUN=1: {reason}. Set the variables "
            "that it needs, as for a launch."
        )


def _lines(file: Path, *, is_trace: bool = False) -> list[str]:
    """What a script printed, without the trace of ``set -x``, or that trace."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip() and line.startswith("+") == is_trace]


def _wait(process: subprocess.Popen[bytes], record: Path) -> int | None:
    """The exit code, or None where there is a record first, or the time is over."""
    end = time.monotonic() + _TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < end and not record.exists():
        time.sleep(0.02)
    # What it printed may be on its way: exec > >(tee log).
    end = time.monotonic() + _OUTPUT_SECONDS
    while process.returncode == 0 and processes_of(process.pid) and time.monotonic() < end:
        time.sleep(0.02)
    return process.returncode
