"""How many tokens or bags ahead a command line predicts."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_tst.settings.multi_token import depths


@pytest.mark.parametrize(
    ("number", "pattern", "expected"),
    [
        (None, None, 0),
        (0, None, 0),
        (2, None, 2),
        (None, "*-|*-", 0),
        (None, "*-*-/*-", 1),
        (None, "*-|*-/**/**", 2),
        # Megatron takes the number of the pattern, and an empty one for none.
        (1, "*-/*-/*-", 2),
        (None, "*-/", 0),
    ],
)
def test_depths(number: int | None, pattern: str | None, expected: int) -> None:
    assert depths(Namespace(mtp_num_layers=number, hybrid_layer_pattern=pattern)) == expected


def test_a_checkpoint_of_another_release_may_lack_the_arguments() -> None:
    assert depths(Namespace()) == 0
