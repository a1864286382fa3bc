"""What the entry point takes for arguments that a command line does not have."""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import PackageNotFoundError

import pytest

from megatron_tst.common.errors import UsageError
from megatron_tst.settings import optimizer_arguments
from megatron_tst.settings.optimizer_arguments import (
    optimizer_conflicts,
    refuse_missing_optimizer,
)
from megatron_tst.training.command_line import _defaults


@pytest.mark.parametrize(
    ("given", "expected"),
    # As Megatron's pretrain_gpt.py; a default beside a given value would only print a warning.
    [(None, {"tokenizer_type": "GPT2BPETokenizer"}), ("HuggingFaceTokenizer", {})],
)
def test_tokenizer_type(given: str | None, expected: dict[str, str]) -> None:
    args = Namespace(tokenizer_type=given, step_batch_size_schedule=None)
    assert _defaults(args) == expected


def test_an_optimizer_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(optimizer_arguments, "version", missing)
    refuse_missing_optimizer(Namespace(optimizer="adam"))
    with pytest.raises(UsageError, match=r"--optimizer muon needs .*: pip install emerging-opt"):
        refuse_missing_optimizer(Namespace(optimizer="muon"))


@pytest.mark.parametrize(
    ("package", "megatron", "is_refused"),
    [("0.2.0", "0.19.2", False), ("0.3.0", "0.19.2", True), ("0.3.0", "0.20.0rc0", False)],
)
def test_adaptive_muon(
    monkeypatch: pytest.MonkeyPatch, package: str, megatron: str, is_refused: bool
) -> None:
    versions = {"emerging-optimizers": package, "megatron-core": megatron}
    monkeypatch.setattr(optimizer_arguments, "version", versions.__getitem__)
    args = Namespace(
        optimizer="adaptive_muon",
        ckpt_format="torch_dist",
        optimizer_cpu_offload=False,
        use_distributed_optimizer=False,
        use_torch_fsdp2=False,
        bf16=True,
        fp16=False,
    )
    messages = list(optimizer_conflicts(args))
    assert bool(messages) == is_refused
    assert not messages or "does not work with emerging-optimizers 0.3.0" in messages[0]
