"""Runs plain Megatron in processes that cannot import this project.

``python stock_alone.py cases.json`` in a folder with copies of tests/stock_gpt.py and of the CPU
platform with its kernels, then called ``cpu_for_megatron`` and so on. A case has
the arguments of a run and its log. Each runs in a fork: the imports, which are most of the time,
are paid once.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import sys
import traceback
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

_PROJECT = "megatron_tst"

# What the CPU platform consists of.
_ROOMS = ("cpu", "common", "ops/native", "upstream")


class _NotThisProject(MetaPathFinder):
    """Ends every attempt to import the project, by Megatron or by an unpickled checkpoint."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == _PROJECT:
            raise ImportError(f"{fullname} was imported by a plain Megatron run")


def copy_to(folder: Path) -> Path:
    """Copies what a plain run needs, under other names; returns the script to run."""
    tests = Path(__file__).parent
    rooms = {f"{_PROJECT}.{room.replace('/', '.')}": room for room in _ROOMS}
    names = {module: f"{Path(room).name}_for_megatron" for module, room in rooms.items()}
    for module, room in rooms.items():
        shutil.copytree(tests.parent / _PROJECT / room, folder / names[module])
    for name in ("stock_gpt.py", "stock_alone.py"):
        shutil.copyfile(tests / name, folder / name)
    for path in [*folder.glob("*_for_megatron/*.py"), folder / "stock_gpt.py"]:
        text = path.read_text()
        for module, name in names.items():
            text = text.replace(module, name)
        path.write_text(text)
    return folder / "stock_alone.py"


def main(cases: Path) -> int:
    sys.meta_path.insert(0, _NotThisProject())
    importlib.import_module("cpu_for_megatron").activate()
    stock_gpt = importlib.import_module("stock_gpt")
    # Megatron's checkpoint writer would start one a run, which imports torch.
    manager = importlib.import_module("torch.multiprocessing").get_context("spawn").Manager()
    codes = [_fork(stock_gpt, manager, **case) for case in json.loads(cases.read_text())]
    return max(codes)


def _fork(stock_gpt: Any, manager: Any, argv: list[str], log: str) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        writer = "megatron.core.dist_checkpointing.strategies.filesystem_async"
        importlib.import_module(writer)._results_queue = manager.Queue()  # type: ignore[attr-defined]
        sys.argv = ["stock_gpt.py", *argv]
        code = stock_gpt.main()
        imported = [name for name in sys.modules if name.startswith(_PROJECT)]
        print(f"modules of this project: {imported}")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
