"""Every argument of Megatron's parser has a verdict, which its sources and our tests bear out."""

from __future__ import annotations

import argparse
import ast
import functools
import re
import shlex
from collections import Counter
from pathlib import Path

import megatron
import pytest
from megatron.training.arguments import add_megatron_arguments, validate_args

from megatron_tst.common.platform import GPUS
from megatron_tst.preflight.misfits import unjudged_arguments
from megatron_tst.preflight.rank_simulation import launch_parser
from megatron_tst.settings.argument_checks import argument_errors
from megatron_tst.settings.judged_arguments import FILE, Judgement, is_ours, judgements, unjudged
from megatron_tst.training.command_line import add_arguments
from tests import judged_page
from tests.runs import SmallRun

ROOT = Path(__file__).resolve().parents[2]
MEGATRON = Path(megatron.__path__[0])
JUDGED = list(judgements())
# Parts of Megatron that training with this entry point never runs.
NOT_REACHED = (
    *("core/inference/", "core/export/", "core/post_training/", "rl/"),
    *(f"core/models/{name}/" for name in ("T5", "bert", "vision", "multimodal", "mimo", "audio")),
    *(
        "core/tensor_parallel/inference_layers.py",
        "core/transformer/moe/token_dispatcher_inference.py",
    ),
    *("training/yaml_arguments.py", "training/theoretical_memory_usage.py"),
    "training/config/",
    # Declares and validates it.
    *("training/arguments.py", "core/transformer/transformer_config.py"),
)
# What trains: a resume may compare an argument, and a report print it.
OURS = [
    path
    for room in ("data", "model", "ops", "training")
    for path in (ROOT / "megatron_tst" / room).rglob("*.py")
    if not re.match(
        "resume|checkpoint_choice|reporting|gpt_to_hybrid|saved_state|schedule_state|finished",
        path.name,
    )
]
# Looked at to say or to skip something, and left to Megatron.
LOOKED_AT = {
    "--rope-scaling-factor": ["config.py"],
    "--transformer-impl": ["fused_paths.py"],
    "--use-precision-aware-optimizer": ["moments.py"],
}
MENTIONS = (
    "tests/runs.py",
    "tests/integration/layouts.py",
    "tests/survival.py",
    "tests/multi_token_checks.py",
)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


@pytest.fixture(scope="module")
def names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Under which name the value of a flag is found."""
    return {flag: action.dest for action in parser._actions for flag in action.option_strings}


def judged(verdict: str) -> list[tuple[str, Judgement]]:
    found = [judgement for judgement in JUDGED if judgement.verdict == verdict]
    return [(flag, judgement) for judgement in found for flag in judgement.arguments]


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text()


def reads(text: str, name: str) -> bool:
    """Whether a source looks at an attribute, by dot or by getattr, and does not hand it on."""
    text = re.sub(rf"\w+=args\.{name},", "", text)
    return re.search(rf"(?:\.|['\"]){name}\b", text) is not None


def test_every_argument_is_judged(parser: argparse.ArgumentParser) -> None:
    new = [action.option_strings[0] for action in unjudged(parser)]
    assert not new, f"what do they do with superposition? {FILE}: {new}"
    groups = {
        flag: group.title
        for group in parser._action_groups
        for action in group._group_actions
        for flag in action.option_strings
        if not is_ours(action.option_strings)
    }
    wrong = [
        (flag, judgement.group)
        for judgement in JUDGED
        for flag in judgement.arguments
        if groups.get(flag) != judgement.group
    ]
    assert not wrong


def test_an_argument_has_one_verdict_beside_conditions() -> None:
    found = Counter(
        flag for judgement in JUDGED if not judgement.when for flag in judgement.arguments
    )
    assert not [flag for flag, count in found.items() if count > 1]


def test_a_launch_with_an_argument_of_a_newer_megatron_is_warned() -> None:
    parser = launch_parser()
    parser.add_argument("--new-loss", type=int, default=0)
    parser.add_argument("--newer-loss", action="store_true")
    args = parser.parse_args(["--new-loss", "2", "--tst-bag-size", "4"])
    (found,) = unjudged_arguments(parser, args)
    assert found.level == "warning"
    assert found.text.startswith("--new-loss is new in this Megatron")


@functools.cache
def functions_in(file: str) -> set[str]:
    return {node.name for node in ast.parse(text_of(ROOT / file)).body if hasattr(node, "name")}


def test_what_works_has_its_test(names: dict[str, str]) -> None:
    silent = []
    for flag, judgement in judged("works"):
        place, _, alias = judgement.evidence.partition(" as ")
        file, _, test = place.partition("::")
        assert test in functions_in(file), judgement.evidence
        texts = [text_of(ROOT / name) for name in (file, *MENTIONS)]
        spellings = {
            alias or names[flag],
            flag.removeprefix("--"),
            flag.removeprefix("--").replace("-", "_"),
        }
        if not any(name in text for text in texts for name in spellings):
            silent.append((flag, judgement.evidence))
    assert not silent


def test_what_is_the_same_is_megatrons_alone(names: dict[str, str]) -> None:
    wrong, touched = [], {}
    for flag, judgement in judged("same"):
        file, _, alias = judgement.evidence.partition(" as ")
        if not re.search(rf"\b{alias or names[flag]}\b", text_of(MEGATRON / file)):
            wrong.append((flag, judgement.evidence))
        readers = [path.name for path in OURS if reads(text_of(path), names[flag])]
        if readers != LOOKED_AT.get(flag, []):
            touched[flag] = readers
    assert not wrong
    assert not touched


def test_what_has_no_effect_is_read_nowhere(names: dict[str, str]) -> None:
    refused = {flag for flag, _ in judged("refused")}
    sources = {str(path.relative_to(MEGATRON)): path for path in MEGATRON.rglob("*.py")}
    reached = [path for name, path in sources.items() if not name.startswith(NOT_REACHED)]
    found = {}
    for flag, judgement in judged("no-effect"):
        if judgement.needs:
            assert judgement.needs in refused, judgement
            continue
        readers = [
            str(path.relative_to(MEGATRON))
            for path in reached
            if names[flag] in text_of(path) and reads(text_of(path), names[flag])
        ]
        if unknown := sorted(set(readers) - set(judgement.read_by)):
            found[flag] = unknown
    assert not found


def refusals() -> list[Judgement]:
    return [judgement for judgement in JUDGED if judgement.verdict == "refused"]


@pytest.mark.parametrize("judgement", refusals(), ids=lambda j: f"{j.arguments[0]} {j.when}")
def test_what_is_refused_says_why(parser: argparse.ArgumentParser, judgement: Judgement) -> None:
    run = SmallRun(Path("text"), Path("run")).with_(tst_bag_size=4, tst_steps=5)
    args = parser.parse_args([*run.argv, *shlex.split(judgement.sample)])
    args.rank, args.world_size = 0, 1
    errors = list(argument_errors(args, GPUS))
    if not errors:
        # Old arguments, which Megatron's validation begins with.
        with pytest.raises(AssertionError) as refusal:
            validate_args(args)
        errors = [str(refusal.value)]
    (flag,) = judgement.arguments
    assert any(flag in text and judgement.evidence in text for text in errors), errors


def test_the_page_is_as_new_as_the_verdicts() -> None:
    assert judged_page.TARGET.read_text() == judged_page.page()
