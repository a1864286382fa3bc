"""What a report says of the precision of its runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tst.report.precision import precision_sentence


def run(numerics: dict[str, str] | None = None, **settings: bool) -> Any:
    return SimpleNamespace(numerics=numerics or {}, settings=settings)


@pytest.mark.parametrize(
    ("of_run", "name"),
    [
        (run(bf16=True), "bf16"),
        (run(bf16=False), "fp32"),
        (run({"fp16": "on", "fp8": "off"}, bf16=False), "fp16"),
        (run({"fp16": "off", "fp8": "e4m3 tensorwise"}, bf16=True), "fp8"),
        (run(), "a precision that was not recorded"),
    ],
)
def test_runs_of_one_precision(of_run: Any, name: str) -> None:
    assert precision_sentence([of_run, of_run]) == f"Trained in {name}."


def test_runs_of_several_are_told_apart() -> None:
    said = precision_sentence([run(bf16=True), run(bf16=False), run(bf16=False)])
    assert "bf16 (1 of 3 runs) and fp32 (2 of 3 runs): part of a gap may be due to that" in said
