import signal
import subprocess
import sys

import pytest
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_tst.common.errors import UsageError, command, raise_interrupt, read_json_object

_TOOL = """
import sys
import numpy as np
from megatron_tst.common.errors import UsageError, command

@command
def main() -> int:
    {body}
    return 0

sys.exit(main())
"""


def _run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _TOOL.format(body=body)], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (r"raise UsageError('--a is 1:\n use 2.')", "error: --a is 1:  use 2.\n"),
        ("open('/missing')", "error: [Errno 2] No such file or directory: '/missing'\n"),
    ],
)
def test_bad_input_ends_a_command_with_one_line(body, line):
    done = _run(body)
    assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.parametrize(
    ("name", "code", "line"), [("SIGINT", 130, "interrupted\n"), ("SIGTERM", 143, "")]
)
def test_an_interrupt_ends_a_command_once_it_has_cleaned_up(tmp_path, name, code, line):
    done = _run(
        f"""
    import pathlib, signal
    from megatron_tst.common.atomic_files import replacing_folder
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with replacing_folder(pathlib.Path({str(tmp_path / "folder")!r})):
        signal.raise_signal(signal.{name})
    """
    )
    assert (done.returncode, done.stderr) == (code, line)
    assert not list(tmp_path.iterdir())


def test_the_handler_of_a_caller_is_back_behind_a_command():
    before = signal.getsignal(signal.SIGTERM)
    within = []

    @command
    def main() -> int:
        within.append(signal.getsignal(signal.SIGTERM))
        return 0

    assert main() == 0
    assert within != [before]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupt_is_raised_again_from_what_was_made_of_it(interrupt):
    made = UsageError("damaged")
    made.__context__ = SystemError("a result with an exception set")
    made.__context__.__cause__ = interrupt
    with pytest.raises(type(interrupt)) as raised:
        raise_interrupt(made)
    assert raised.value is interrupt
    raise_interrupt(UsageError("no interrupt"))


class Interrupted(FileSystemReader):
    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        raise KeyboardInterrupt


def test_an_interrupt_is_found_in_what_torch_makes_of_it(tmp_path):
    with pytest.raises(CheckpointException) as made:
        load({}, storage_reader=Interrupted(tmp_path), no_dist=True)
    with pytest.raises(KeyboardInterrupt):
        raise_interrupt(made.value)


def test_a_fault_of_the_program_keeps_its_traceback():
    done = _run("np.stack([])")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ValueError: need at least one array to stack\n")


def test_a_command_passes_its_arguments_and_its_code_on():
    @command
    def main(code: int, more: int = 0) -> int:
        """What it does."""
        return code + more

    assert main(1, more=3) == 4
    assert main.__doc__ == "What it does."


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b"[" * 100_000])
def test_what_is_no_json_object_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"file\.json is (no|not) JSON.*: repair it\.$"):
        read_json_object(path, "repair it")
