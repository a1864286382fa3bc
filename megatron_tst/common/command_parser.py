"""The parser that every command starts from."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def command_parser(description: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser whose help calls the command as it was called: ``tst plan``, ``tools/plan_run.py``.

    Args:
        description: what the command does; the docstring of its module.
        options: further ones of ``argparse.ArgumentParser``.
    """
    return argparse.ArgumentParser(
        sys.argv[0], description=description, allow_abbrev=False, **options
    )
