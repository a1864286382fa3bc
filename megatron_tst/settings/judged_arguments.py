"""What was found of each argument of Megatron-Core 0.19.2's parser: ``megatron_arguments.toml``.

The file has the arguments by the groups of the parser, and in a group by verdict:

- ``works``: a run with superposition has it in phase 1, in the test that is named.
- ``same``: it is Megatron's alone in both phases; the file of Megatron that reads it is named.
- ``refused``: with the reason, and a sample that is; ``when`` says under which condition. An
  argument with a condition can have another verdict for the rest.
- ``no-effect``: training with this entry point reads it nowhere; the reason says what it is for,
  ``with`` names an argument that is refused and without which nothing reads it, and ``also_in``
  files that read it to no end.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Verdict = Literal["works", "same", "refused", "no-effect"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
FILE = Path(__file__).with_name("megatron_arguments.toml")


@dataclass(frozen=True)
class Judgement:
    """A verdict on some arguments.

    Attributes:
        group: of the parser.
        verdict: one of ``VERDICTS``.
        arguments: their flags.
        evidence: a test, a file of Megatron, or a reason, by the verdict.
        when: condition of a refusal; empty for always.
        sample: flags that are refused.
        needs: a refused argument without which nothing reads these.
        read_by: files of Megatron that read what has no effect, for inference or in vain.
    """

    group: str
    verdict: Verdict
    arguments: tuple[str, ...]
    evidence: str
    when: str = ""
    sample: str = ""
    needs: str = ""
    read_by: tuple[str, ...] = ()


def judgements() -> Iterator[Judgement]:
    """All of them, in the order of the file."""
    evidence = {"works": "test", "same": "read_by", "refused": "reason", "no-effect": "reason"}
    for group, found in tomllib.loads(FILE.read_text()).items():
        for verdict in VERDICTS:
            for entry in found.get(verdict, ()):
                yield Judgement(
                    group,
                    verdict,
                    tuple(entry["arguments"]),
                    entry[evidence[verdict]],
                    entry.get("when", ""),
                    entry.get("sample", ""),
                    entry.get("with", ""),
                    tuple(entry.get("also_in", ())),
                )


def unjudged(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Arguments of a parser of Megatron that nobody has judged.

    Args:
        parser: with Megatron's arguments; those of this package are left out.
    """
    known = {flag for judgement in judgements() for flag in judgement.arguments}
    return [
        action
        for action in parser._actions
        if not known.intersection(action.option_strings) and not is_ours(action.option_strings)
    ]


def is_ours(flags: Sequence[str]) -> bool:
    """Whether an argument is no one of Megatron's."""
    return any(flag.startswith("--tst-") or flag == "--help" for flag in flags)
