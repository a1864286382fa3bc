"""Installs this project into a container without disturbing what the container brings."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import distributions, version
from pathlib import Path

from packaging.version import InvalidVersion, Version

_REQUIRED = ("torch", "transformer_engine.pytorch", "megatron.core", "megatron_tst.pretrain")
# Without apex and its extension, runs need --no-gradient-accumulation-fusion.
_OPTIONAL = ("apex", "fused_weight_gradient_mlp_cuda", "flash_attn")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 where the image is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("constraints", help="print the constraints for pip install")
    merge.add_argument("container", type=Path, help="pip list --format freeze of the container")
    merge.add_argument("tested", type=Path, help="constraints.txt of this project")
    check = commands.add_parser("check", help="import everything; nothing may have changed")
    check.add_argument("container", type=Path, help="pip list --format freeze before")
    options = parser.parse_args(arguments)
    container = read_pins(options.container.read_text().splitlines())
    if options.command == "constraints":
        tested = read_pins(options.tested.read_text().splitlines())
        print("\n".join(merged_pins(container, tested)))
        return 0
    after = {normalised(d.metadata["Name"]): canonical(d.version) for d in distributions()}
    problems = changed_packages(container, after) + failed_imports(_REQUIRED)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    for problem in failed_imports(_OPTIONAL):
        print(f"warning: {problem}", file=sys.stderr)
    if not problems:
        print(f"torch {version('torch')}, megatron-core {version('megatron-core')}: ready")
    return 1 if problems else 0


def normalised(name: str) -> str:
    """The name by which pip compares packages."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(lines: Iterable[str]) -> dict[str, str]:
    """Versions by package name of lines ``name==version``; other lines are left out."""
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {normalised(name): canonical(pin.strip()) for name, pin in pins}


def canonical(version: str) -> str:
    """One spelling: pip lists the torch of a container as nv26.8 whose metadata say nv26.08."""
    try:
        return str(Version(version))
    except InvalidVersion:
        return version


def merged_pins(container: dict[str, str], tested: dict[str, str]) -> list[str]:
    """Lines for pip: the versions in the container, and the tested ones of all other packages."""
    # Python packages of CUDA belong to the torch of PyPI; the container has the libraries.
    ours = {name: pin for name, pin in tested.items() if not name.startswith(("nvidia-", "cuda-"))}
    return [f"{name}=={pin}" for name, pin in sorted({**ours, **container}.items())]


def changed_packages(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What the installation has done to the packages of the container, a sentence each."""
    return [
        f"{name} was {pin} in the container and is {after.get(name, 'gone')} now"
        for name, pin in sorted(before.items())
        if after.get(name) != pin
    ]


def failed_imports(modules: Iterable[str]) -> list[str]:
    """Modules that cannot be imported, a sentence each."""
    failures = []
    for module in modules:
        try:
            import_module(module)
        # A library that does not load raises OSError, one built for another torch RuntimeError.
        except Exception as error:
            failures.append(f"import {module}: {error}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
