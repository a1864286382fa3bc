"""Every field of Megatron's configuration of a model is judged: heeded, refused, or neither."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import fields

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.arguments import add_megatron_arguments

from megatron_tst.common.platform import Platform
from megatron_tst.cpu.arguments import _WITHOUT_GPU, refuse_gpu_arguments
from megatron_tst.settings.argument_checks import argument_errors
from megatron_tst.settings.conflicts import _CONFLICTS
from megatron_tst.training.command_line import add_arguments
from tests import plain_layer_checks
from tests.config_fields import JUDGEMENTS

JUDGED = {kind: text.split() for kind, text in JUDGEMENTS.items()}
FIELDS = {field.name for field in fields(MLATransformerConfig)}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def test_every_field_is_judged_once() -> None:
    judged = Counter(name for names in JUDGED.values() for name in names)
    new, gone = FIELDS - set(judged), set(judged) - FIELDS
    assert not new, f"does a layer of megatron_tst/cpu heed these? tests/config_fields.py: {new}"
    assert not gone
    assert not [name for name, count in judged.items() if count > 1]


def test_fields_of_a_layer_are_compared_with_plain_modules() -> None:
    checks = plain_layer_checks
    tables = [checks.COMPUTED, checks.SAME, checks.EXPERTS, checks.LATENT]
    compared = {name for table in tables for settings in table.values() for name in settings}
    # Set by the checks themselves.
    compared |= {"fp32_residual_connection", "multi_latent_attention", "mup_attn_scale_power"}
    assert not set(JUDGED["layer"]) - compared


def test_refused_fields_have_a_refusal(parser: argparse.ArgumentParser) -> None:
    without_gpu = Platform(has_gpu=False, refuse_arguments=refuse_gpu_arguments)
    refused = {name for name, _, _ in _WITHOUT_GPU}
    conflicts = {conflict.flag.removeprefix("--").replace("-", "_") for conflict in _CONFLICTS}
    for name in sorted(set(JUDGED["refused"]) - refused - conflicts):
        action = next(action for action in parser._actions if action.dest == name)
        value = [] if action.nargs == 0 else ["/tmp/refused"]
        args = parser.parse_args([action.option_strings[0], *value])
        errors = list(argument_errors(args, without_gpu))
        assert any(action.option_strings[0] in text for text in errors), name


def test_derived_fields_have_no_argument(parser: argparse.ArgumentParser) -> None:
    arguments = {action.dest for action in parser._actions}
    assert not set(JUDGED["derived"]) & arguments
    others = {"num_moe_experts", "activation_func", "gated_linear_unit", "bias_activation_fusion"}
    others |= {"softmax_scale", "virtual_pipeline_model_parallel_size"}
    others |= {"num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"}
    others |= {"gtp_weight_remat_size", "expert_gtp_weight_remat_size"}
    others |= {"original_max_position_embeddings", "beta_fast", "beta_slow"}
    rest = FIELDS - set(JUDGED["derived"])
    assert rest - arguments == others
