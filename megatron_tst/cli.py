"""``tst``: one command for everything, each part of it imported when it is called.

``tst pretrain`` is ``python -m megatron_tst.pretrain``; several processes are started by
``torchrun ... -m megatron_tst.pretrain``, or by ``torchrun ... --no-python tst pretrain``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A part of ``tst``.

    Attributes:
        module: has ``main(arguments) -> int``, which takes ``sys.argv`` where it gets None.
        summary: what it is for.
    """

    module: str
    summary: str


COMMANDS: Mapping[str, Command] = {
    "quickstart": Command(
        "megatron_tst.commands.quickstart",
        "train a baseline and a superposition run on this machine, and compare them",
    ),
    "preprocess": Command(
        "megatron_tst.commands.preprocess_data", "tokenize text into .bin and .idx"
    ),
    "merge": Command("megatron_tst.commands.merge_corpora", "join corpora into one"),
    "inspect": Command(
        "megatron_tst.commands.inspect_data", "show a corpus and the bags made of it"
    ),
    "fit-weights": Command(
        "megatron_tst.commands.fit_target_weights", "fit the weights in a target bag to a corpus"
    ),
    "plan": Command(
        "megatron_tst.commands.plan_run", "choose bag size, ratio and steps for a budget"
    ),
    "preflight": Command(
        "megatron_tst.commands.preflight", "check a launch script without a GPU: will it run?"
    ),
    "pretrain": Command("megatron_tst.pretrain", "train: Megatron's arguments and --tst-*"),
    "study": Command("megatron_tst.commands.run_study", "run a grid of training runs"),
    "compare": Command(
        "megatron_tst.commands.compare_runs", "compare runs with baselines on an HTML page"
    ),
    "explain": Command(
        "megatron_tst.commands.explain_gain",
        "show where a gain comes from: positions, the switch, Adam's state",
    ),
    "trace": Command(
        "megatron_tst.commands.trace_data", "show which documents a step of a run read"
    ),
    "verify": Command(
        "megatron_tst.commands.verify_checkpoint", "look for what is wrong in a checkpoint"
    ),
    "convert from-hf": Command(
        "megatron_tst.commands.convert_hf_to_megatron", "make a checkpoint of a Hugging Face model"
    ),
    "convert to-hf": Command(
        "megatron_tst.commands.convert_megatron_to_hf", "make a Hugging Face model of a checkpoint"
    ),
    "stock-cache": Command(
        "megatron_tst.commands.write_stock_data_cache",
        "let plain Megatron read on where a superposition run was",
    ),
    "evaluate": Command(
        "megatron_tst.commands.evaluate", "measure a Hugging Face model: lm-eval, bits per byte"
    ),
    "generate": Command(
        "megatron_tst.commands.generate", "continue a prompt with a Hugging Face model"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Calls the command that the arguments begin with.

    Returns:
        Its exit code; 2 where there is no such command.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for words in (1, 2):
        name = " ".join(given[:words])
        if name in COMMANDS:
            # Parsers name the command by it, and Megatron reads its arguments there.
            sys.argv = [f"tst {name}", *given[words:]]
            return _call(name)
    return _answer_without_command(given)


def _call(name: str) -> int:
    try:
        module = import_module(COMMANDS[name].module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "megatron_tst":
            raise
        print(
            f"error: tst {name} needs {error.name}, which is not installed: "
            "pip install 'megatron-tst[megatron]'.",
            file=sys.stderr,
        )
        return 2
    return int(module.main())


def _answer_without_command(given: list[str]) -> int:
    group = [name for name in COMMANDS if given and name.split()[0] == given[0]]
    asked, names = (given[1:], group) if group else (given, COMMANDS)
    if asked and asked[0] in ("-h", "--help"):
        print(_help(names))
        return 0
    if given == ["--version"]:
        from megatron_tst import __version__

        print(f"megatron-tst {__version__}")
        return 0
    said = f"there is no command tst {' '.join(given[: 2 if group else 1])}" if asked else None
    print(f"error: {said or 'a command is missing'}.\n\n{_help(names)}", file=sys.stderr)
    return 2


def _help(names: Iterable[str]) -> str:
    lines = [f"  {name:<16} {COMMANDS[name].summary}" for name in names]
    return "\n".join(
        [
            "usage: tst COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "tst COMMAND --help tells what a command takes; tst --version names the release.",
            "Several processes: torchrun ... -m megatron_tst.pretrain [ARGUMENTS]",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
