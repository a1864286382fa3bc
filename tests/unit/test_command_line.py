"""What the entry point takes for arguments that a command line does not have."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_tst.training.command_line import _defaults


@pytest.mark.parametrize(
    ("given", "expected"),
    # As Megatron's pretrain_gpt.py; a default beside a given value would only print a warning.
    [(None, {"tokenizer_type": "GPT2BPETokenizer"}), ("HuggingFaceTokenizer", {})],
)
def test_tokenizer_type(given: str | None, expected: dict[str, str]) -> None:
    args = Namespace(tokenizer_type=given, step_batch_size_schedule=None)
    assert _defaults(args) == expected
