"""The environment scripts, run on stand-in interpreters: nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash") or "/bin/bash"
FAILING_SHIM = "echo 'pyenv: python3.12: command not found' >&2; exit 127"


def write_command(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{script}\n")
    path.chmod(0o755)
    return path


def reports(version: str) -> str:
    """Script of an interpreter that answers the search's question with this version."""
    return f"echo {version}"


def find_python(machine: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the search on a machine that has only what is below one folder."""
    return subprocess.run(
        [BASH, str(ROOT / "scripts/find_python.sh")],
        env={"PATH": str(machine / "bin"), "HOME": str(machine / "home")} | variables,
        capture_output=True,
        text=True,
    )


def test_failing_shim_is_skipped_for_a_pyenv_version(tmp_path: Path) -> None:
    write_command(tmp_path / "bin/python3.12", FAILING_SHIM)
    write_command(tmp_path / "bin/python3", reports("3.11"))
    versions = tmp_path / "home/.pyenv/versions"
    write_command(versions / "3.11.7/bin/python", reports("3.11"))
    working = write_command(versions / "3.12.1/bin/python", reports("3.12"))
    found = find_python(tmp_path)
    assert (found.returncode, found.stdout.strip()) == (0, str(working)), found.stderr


def test_tested_version_is_preferred_wherever_it_is(tmp_path: Path) -> None:
    write_command(tmp_path / "bin/python3", reports("3.13"))
    write_command(tmp_path / "bin/python3.13", reports("3.13"))
    uv = tmp_path / "home/.local/share/uv/python"
    tested = write_command(uv / "cpython-3.12.9-linux/bin/python3", reports("3.12"))
    assert find_python(tmp_path).stdout.strip() == str(tested)


@pytest.mark.parametrize(
    ("commands", "found"),
    [
        ({"python3.12": "3.12", "python3.13": "3.13"}, "python3.12"),
        ({"python3": "3.12", "python3.13": "3.13"}, "python3"),
        ({"python3": "3.11", "python3.13": "3.13"}, "python3.13"),
        ({"python3": "3.11", "python": "3.13"}, "python"),
    ],
)
def test_order_of_versions_on_path(tmp_path: Path, commands: dict[str, str], found: str) -> None:
    for name, version in commands.items():
        write_command(tmp_path / "bin" / name, reports(version))
    assert find_python(tmp_path).stdout.strip() == found


@pytest.mark.parametrize("variable", ["PYENV_ROOT", "UV_PYTHON_INSTALL_DIR"])
def test_folders_moved_by_their_variable_are_searched(tmp_path: Path, variable: str) -> None:
    below = {
        "PYENV_ROOT": "versions/3.13.0/bin/python",
        "UV_PYTHON_INSTALL_DIR": "cpython-3.13.0-linux/bin/python3",
    }[variable]
    working = write_command(tmp_path / "moved" / below, reports("3.13"))
    found = find_python(tmp_path, **{variable: str(tmp_path / "moved")})
    assert found.stdout.strip() == str(working)


def test_nothing_found_says_what_to_install(tmp_path: Path) -> None:
    write_command(tmp_path / "bin/python3.12", FAILING_SHIM)
    write_command(tmp_path / "bin/python3", reports("3.11"))
    write_command(tmp_path / "bin/python", reports("2.7"))
    found = find_python(tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert "No working Python 3.12 or 3.13 was found" in found.stderr
    for remedy in ("apt-get install", "pyenv install", "uv python install", "conda", "PYTHON="):
        assert remedy in found.stderr
    assert "command not found" not in found.stderr


def test_named_interpreter_is_used_or_refused_but_not_replaced(tmp_path: Path) -> None:
    write_command(tmp_path / "bin/python3.12", reports("3.12"))
    assert find_python(tmp_path, PYTHON=sys.executable).stdout.strip() == sys.executable
    # The wheels of megatron-core end with 3.13.
    for version in ("3.11", "3.14"):
        other = write_command(tmp_path / "other", reports(version))
        refused = find_python(tmp_path, PYTHON=str(other))
        assert refused.returncode == 1
        assert f"PYTHON is '{other}'" in refused.stderr
        assert "correct it, or unset it" in refused.stderr


class Tree:
    """A copy of what the set-up reads, with an interpreter that only notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stamp = folder / ".venv/installed"
        self.log = folder / "calls"
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        (folder / "pyproject.toml").write_text("[project]\n")
        (folder / "constraints.txt").write_text("torch==1\n")
        # -c: a question; -m venv --clear DIR: leaves itself there; -m pip: ends as told to.
        self.python = write_command(
            folder / "python",
            f"""echo "$1 $2 $3" >>{self.log}
            case "$1 $2" in
              "-c import"*) echo 3.12 ;;
              "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
              "-m pip") exit "${{PIP_STATUS:-0}}" ;;
            esac""",
        )

    def set_up(self, pip_status: int = 0) -> list[str]:
        """Runs the set-up; returns which of venv and pip it ran."""
        self.log.write_text("")
        done = subprocess.run(
            [BASH, str(self.folder / "scripts/bootstrap.sh")],
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHON": str(self.python),
                "PIP_STATUS": str(pip_status),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == pip_status, done.stderr
        return [line.split()[1] for line in self.log.read_text().splitlines() if "-m" in line]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree")


def test_second_set_up_installs_nothing(tree: Tree) -> None:
    assert tree.set_up() == ["venv", "pip"]
    assert tree.set_up() == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_pin_installs_again_into_the_same_environment(tree: Tree, changed: str) -> None:
    tree.set_up()
    (tree.folder / changed).write_text("changed\n")
    assert tree.set_up() == ["pip"]
    assert tree.set_up() == []


def test_failed_installation_leaves_no_stamp_and_is_repaired(tree: Tree) -> None:
    tree.set_up(pip_status=3)
    assert not tree.stamp.exists()
    assert tree.set_up() == ["venv", "pip"]
    assert tree.set_up() == []


def test_failed_update_is_taken_up_again_even_when_the_pin_is_put_back(tree: Tree) -> None:
    tree.set_up()
    pins = tree.folder / "constraints.txt"
    before = pins.read_text()
    pins.write_text("torch==2\n")
    tree.set_up(pip_status=3)
    pins.write_text(before)
    assert tree.set_up() == ["pip"]
    assert tree.set_up() == []


def test_environment_whose_interpreter_is_gone_is_built_anew(tree: Tree) -> None:
    tree.set_up()
    (tree.folder / ".venv/bin/python").unlink()
    assert tree.set_up() == ["venv", "pip"]


def test_copied_tree_installs_itself(tree: Tree, tmp_path: Path) -> None:
    tree.set_up()
    moved = tree.folder.rename(tmp_path / "moved")
    tree.folder, tree.stamp = moved, moved / ".venv/installed"
    # The copy's environment still runs, but its editable installation names the original.
    tree.log.parent.mkdir()
    tree.python = moved / "python"
    assert tree.set_up() == ["pip"]


def test_constraints_are_names_and_exact_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert "megatron-core==0.19.2" in pins
    for pin in pins:
        name, _, version = pin.partition("==")
        assert name.replace("-", "").replace("_", "").replace(".", "").isalnum(), pin
        assert version[:1].isdigit(), pin
        assert not set(version) & set("/@: ;"), pin
