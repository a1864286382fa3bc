"""What Megatron makes of the command lines of launch scripts, in one process without a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import utils
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import add_megatron_arguments, validate_args
from packaging.version import Version

from megatron_tst.common.platform import pose_connections
from megatron_tst.settings.arguments import superposition_schedule_from_args
from megatron_tst.settings.batch_arguments import refuse_unusable_batch_sizes
from megatron_tst.settings.conflicts import refuse_conflicting_arguments
from megatron_tst.training.command_line import add_arguments, check_arguments

# Kernels whose absence Megatron's model configuration refuses by importing them.
_FUSIONS = ("apply_rope_fusion", "moe_permute_fusion", "moe_router_fusion")
_LLAMA_3_VOCABULARY = 128256


def main() -> int:
    """Reads a JSON list of [world size, command line] and writes the list of findings."""
    cases, results = (Path(name) for name in sys.argv[1:])
    _pose_as_a_b200()
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    found = [_finding(parser, size, argv) for size, argv in json.loads(cases.read_text())]
    results.write_text(json.dumps(found))
    return 0


def _pose_as_a_b200() -> None:
    """Answers the two questions of Megatron's validation about the machine: device and TE."""
    torch.cuda.get_device_capability = lambda device=None: (10, 0)
    utils._te_version = Version("2.16.0")


def _finding(parser: argparse.ArgumentParser, world_size: int, argv: list[str]) -> dict[str, Any]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            args = parser.parse_args(argv)
            # What Megatron's parse_args adds.
            args.rank, args.world_size = 0, world_size
            args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
            check_arguments(args)
            given = _given(args, argv)
            pose_connections(args)
            validate_args(args)
            refuse_conflicting_arguments(args)
            schedule = superposition_schedule_from_args(args)
            refuse_unusable_batch_sizes(args, steps_done=0)
            changed = _changed(args, given)
            _build_configuration(args)
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    switch, steps = schedule.switch_step, schedule.total_steps
    return {
        "switch_step": switch,
        "steps": steps,
        "phase_1_tokens": schedule.data_tokens(switch),
        "data_tokens": schedule.data_tokens(steps),
        "equivalent_tokens": schedule.equivalent_tokens(steps),
        "lr": args.lr,
        "decay_steps": args.lr_wsd_decay_iters,
        "superposition": schedule.config.to_dict(),
        "changed": changed,
    }


def _given(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """The arguments that the command line names by their own name, with their values."""
    names = {word[2:].replace("-", "_") for word in argv if word.startswith("--")}
    return {name: value for name, value in vars(args).items() if name in names}


def _changed(args: argparse.Namespace, given: dict[str, Any]) -> list[str]:
    """Arguments to which validation gave another value than the command line."""

    def plain(value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    return [n for n, value in given.items() if plain(getattr(args, n, None)) != plain(value)]


def _build_configuration(args: argparse.Namespace) -> None:
    """Builds Megatron's configurations, which check what validate_args does not."""
    for name in _FUSIONS:
        setattr(args, name, False)
    args.padded_vocab_size = args.padded_vocab_size or _LLAMA_3_VOCABULARY
    pretrain_cfg_container_from_args(args, gpt_config_from_args(args))


if __name__ == "__main__":
    sys.exit(main())
