"""The parsers that commands start from."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from megatron_tst.common.errors import UsageError


def command_parser(description: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser whose help calls the command as it was called: ``tst plan``, ``tools/plan_run.py``.

    Args:
        description: what the command does; the docstring of its module.
        options: further ones of ``argparse.ArgumentParser``.
    """
    return argparse.ArgumentParser(
        sys.argv[0], description=description, allow_abbrev=False, **options
    )


class RaisingParser(argparse.ArgumentParser):
    """Raises UsageError where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse says."""
        raise UsageError(message)
