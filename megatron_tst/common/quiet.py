"""Megatron, imported where its warnings of missing GPU libraries say nothing."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Keeps warnings of libraries from the output of a tool that needs no GPU."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
