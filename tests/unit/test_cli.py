"""``tst``: what it says and imports, and that each command is there under both of its names."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_tst import cli

ROOT = Path(__file__).parents[2]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_help_imports_nothing_large() -> None:
    code = (
        "import sys; from megatron_tst.cli import main; main(['--help']);"
        "print({'torch', 'numpy', 'rich', 'megatron'} & sys.modules.keys())"
    )
    said = run("-c", code).stdout
    assert said.endswith("\nset()\n")
    assert all(f"\n  {name} " in said for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "error: a command is missing.\n"),
        (["plann", "--gpus"], "error: there is no command tst plann.\n"),
        (["convert"], "error: a command is missing.\n"),
        (["convert", "to-gguf"], "error: there is no command tst convert to-gguf.\n"),
    ],
)
def test_what_is_no_command_gets_the_commands_that_there_are(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(error)
    assert "  convert to-hf " in said
    assert ("  plan " in said) == ("convert" not in arguments)


def test_every_tool_is_a_command() -> None:
    commands = {
        command.module.rpartition(".")[2]: (name, command.module)
        for name, command in cli.COMMANDS.items()
        if name != "pretrain"
    }
    assert {file.stem for file in ROOT.glob("tools/*.py")} == commands.keys()
    for stem, (name, module) in commands.items():
        tool = (ROOT / "tools" / f"{stem}.py").read_text()
        assert f"``tst {name}``" in tool
        assert f"from {module} import main\n" in tool
        assert find_spec(module)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["-m", "megatron_tst.cli", "plan"], "tst plan"),
        (["-m", "megatron_tst.cli", "convert", "from-hf"], "tst convert from-hf"),
        (["tools/plan_run.py"], "tools/plan_run.py"),
    ],
)
def test_help_says_how_it_was_called(command: list[str], name: str) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name} [-h]")


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    # Without the packages of the environment, as where only torch and numpy are installed.
    code = "import sys; sys.path.append('.'); from megatron_tst import cli; sys.exit(cli.main())"
    done = run("-S", "-c", code, "plan")
    assert done.returncode == 2
    assert done.stderr == (
        "error: tst plan needs rich, which is not installed: "
        "pip install 'megatron-tst[megatron]'.\n"
    )


def test_exit_code_and_words_are_those_of_the_command() -> None:
    done = run("-m", "megatron_tst.cli", "plan", "--model", "none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model is 'none'")
