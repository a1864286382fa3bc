"""Pre-training with bags of two sizes, which no flag asks for."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_tst.training import command_line
from megatron_tst.training.pretrain import main as pretrain

BAGS = ((8, 2), (4, 3))
ARGUMENTS: dict[str, Any] = {"tst_bag_size": 8, "tst_steps": 5, "tst_target_weighting": "power-law"}


def main() -> int:
    """As ``python -m megatron_tst.pretrain``, whose parser has the bags besides."""
    add_arguments = command_line.add_arguments

    def with_bags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_arguments(parser)
        parser.set_defaults(tst_bags=BAGS)
        return parser

    command_line.add_arguments = with_bags
    return pretrain()
