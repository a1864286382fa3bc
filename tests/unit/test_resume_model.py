"""What a resume may not change about a model or an optimizer, by parsed command lines."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_tst.checkpoint.hf_arguments import parse_arguments
from megatron_tst.common.errors import UsageError
from megatron_tst.training.resume import corpus_identity
from megatron_tst.training.resume_model import refuse_other_model

EXPERTS = "--num-experts 4"


def parsed(line: str) -> Namespace:
    args = parse_arguments(["--load", "checkpoints", *line.split()])
    # As Megatron's validation leaves it.
    args.add_qkv_bias = False
    return args


@pytest.mark.parametrize(
    ("common", "changed", "message"),
    [
        ("", "--norm-epsilon 1e-6", "--norm-epsilon 1e-05, and this command has 1e-06"),
        ("", "--squared-relu", "--squared-relu False, and this command has True"),
        ("", "--quick-geglu", "--quick-geglu False"),
        ("", "--openai-gelu", "--openai-gelu False"),
        ("", "--apply-layernorm-1p", "--apply-layernorm-1p False"),
        ("", "--qk-l2-norm", "--qk-l2-norm False"),
        ("", "--apply-residual-connection-post-layernorm", "post-layernorm False"),
        (EXPERTS, "--moe-router-topk 1", "--moe-router-topk 2, and this command has 1"),
        (EXPERTS, "--moe-router-score-function sigmoid", "--moe-router-score-function softmax"),
        (EXPERTS, "--moe-router-pre-softmax", "--moe-router-pre-softmax False"),
        (EXPERTS, "--moe-router-topk-scaling-factor 2.5", "--moe-router-topk-scaling-factor None"),
        (EXPERTS, "--moe-router-num-groups 2", "--moe-router-num-groups None"),
    ],
)
def test_the_same_weights_must_not_compute_something_else(
    common: str, changed: str, message: str
) -> None:
    saved = parsed(common)
    refuse_other_model(parsed(common), saved)
    with pytest.raises(UsageError, match=f"{message}.*would compute something else.*--finetune"):
        refuse_other_model(parsed(f"{common} {changed}"), saved)


@pytest.mark.parametrize(
    ("common", "changed", "message"),
    [
        ("", "--disable-bias-linear", "--disable-bias-linear False, and this command has True"),
        ("", "--attention-output-gate", "--attention-output-gate False"),
        (EXPERTS, "--moe-layer-freq 2", "--moe-layer-freq 1, and this command has 2"),
        (EXPERTS, "--moe-ffn-hidden-size 32", "--moe-ffn-hidden-size None, and .* has 32"),
        (EXPERTS, "--moe-shared-expert-intermediate-size 32", "intermediate-size None"),
        (EXPERTS, "--moe-router-enable-expert-bias", "--moe-router-enable-expert-bias False"),
    ],
)
def test_weights_must_fit(common: str, changed: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"{message}.*the weights do not fit"):
        refuse_other_model(parsed(f"{common} {changed}"), parsed(common))


@pytest.mark.parametrize(
    ("optimizer", "changed"),
    [
        ("sgd", "--sgd-momentum 0.5"),
        ("muon", "--muon-momentum 0.5"),
        ("adaptive_muon", "--muon-momentum 0.5"),
        ("muon", "--muon-scalar-optimizer lion"),
        ("lion", "--lion-beta1 0.5"),
        ("adam", "--adam-beta1 0.5"),
    ],
)
def test_what_the_state_of_the_optimizer_overrides(optimizer: str, changed: str) -> None:
    saved = parsed(f"--optimizer {optimizer}")
    flag = changed.split()[0]
    with pytest.raises(UsageError, match=f"{flag} .* the state of the optimizer is that of"):
        refuse_other_model(parsed(f"--optimizer {optimizer} {changed}"), saved)
    refuse_other_model(parsed(f"--optimizer {optimizer} {changed} --no-load-optim"), saved)


def test_corpora_in_an_object_storage_are_told_by_their_paths() -> None:
    one, same, two = (
        corpus_identity(parsed(f"--data-path s3://bucket/{name}")) for name in ("one", "one", "two")
    )
    assert one == same
    assert one != two
    # What runs of an earlier version recorded is as before.
    assert "corpus_objects" not in corpus_identity(parsed("--mock-data"))
