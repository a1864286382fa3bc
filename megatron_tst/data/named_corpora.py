"""The corpora that a command line names, and their weights."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence

from megatron.core.msc_utils import maybe_msc
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_tst.common.errors import UsageError
from megatron_tst.data.blend import Blend, check_blend, check_numbers, is_number

_DATA_ARGUMENTS = (
    "data_path",
    "data_args_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
)


def data_path_prefixes(args: Namespace) -> list[str]:
    """Every corpus that the command line names, in order.

    Raises:
        UsageError: weights or files of arguments that cannot be read, or that cannot be blended.
    """
    return [prefix for blend in _blends(args) if blend is not None for prefix in blend[0]]


def data_weights(args: Namespace) -> list[Sequence[float] | None]:
    """The weights of every blend that the command line names, None without weights."""
    return [blend and blend[1] for blend in _blends(args)]


def _blends(args: Namespace) -> list[Blend | None]:
    try:
        blend, blend_per_split = get_blend_and_blend_per_split(args)
        words = _words_of_blends(args)
    # Megatron reports by assertion, and its files of arguments are text and JSON.
    except (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        arguments = {name: getattr(args, name) for name in _DATA_ARGUMENTS}
        named = [
            f"--{name.replace('_', '-')} {' '.join(value) if isinstance(value, list) else value}"
            for name, value in arguments.items()
            if value is not None
        ]
        raise UsageError(
            f"{' and '.join(named)} cannot be read ({type(error).__name__}: {error}): pass a path, "
            "paths, or a number in front of each path, by one of these arguments; a file of "
            "--per-split-data-args-path is a JSON object with train, valid and test."
        ) from error
    blends: list[Blend | None] = [blend, *(blend_per_split or [])]
    given = [blend for blend in blends if blend is not None]
    for (paths, weights), blend_words in zip(given, words, strict=True):
        check_numbers(blend_words, weights is not None)
        numbers = [path for path in paths if weights is None and is_number(path)]
        if numbers:
            raise UsageError(
                f"--data-path {' '.join(paths)}: {numbers[0]} stands where a path should. Put one "
                "number in front of each path, or in front of none."
            )
        check_blend(paths, weights)
    return blends


def _words_of_blends(args: Namespace) -> list[list[str]]:
    """Numbers and paths as they are written, of each blend: upstream keeps the values only."""
    if args.data_args_path is not None:
        with maybe_msc.open(args.data_args_path, "r") as file:
            return [file.read().split()]
    if args.data_path is not None:
        return [args.data_path]
    if args.per_split_data_args_path is not None:
        with maybe_msc.open(args.per_split_data_args_path, "r") as file:
            splits = json.load(file)
        blends = [splits[name] for name in ("train", "valid", "test")]
        return [b.split() if isinstance(b, str) else b for b in blends if b is not None]
    blends = [args.train_data_path, args.valid_data_path, args.test_data_path]
    return [blend for blend in blends if blend is not None]
