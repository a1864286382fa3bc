"""The shares of a text for training, validation and test, as ``--split`` has them."""

from __future__ import annotations

import re

_SHARE = r"(\d+\.?\d*|\.\d+)"


def training_share(split: str) -> float:
    """Share of training, 0 to 1; 0 also for a text that is no split.

    Args:
        split: up to three numbers with commas between them, such as ``9995,5,0``.
    """
    if not re.fullmatch(rf"{_SHARE}(\s*,\s*{_SHARE}){{0,2}}", split):
        return 0.0
    shares = [float(share) for share in split.split(",")]
    return shares[0] / sum(shares) if shares[0] else 0.0
