"""The vocabulary and the text of a launch, as far as they are on this machine."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.tokenizers.utils.build_tokenizer import SP_TOKENIZERS, build_tokenizer
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_tst.common.errors import UsageError
from megatron_tst.data.budget import CorpusBudget, TrainText, data_budget, refuse_repetition
from megatron_tst.data.files import check_indexed_dataset
from megatron_tst.data.named_corpora import data_path_prefixes, data_weights
from megatron_tst.preflight.findings import Finding, error, note
from megatron_tst.settings.schedule import SuperpositionSchedule

_LLAMA_3_IDS = 128_256
# To the others Megatron does not give --vocab-size.
_OF_VOCAB_SIZE = ("NullTokenizer", "NullMultimodalTokenizer", "TikTokenizer")


def resolve_vocabulary(args: Namespace, given_ids: int | None) -> tuple[int, list[Finding]]:
    """Sets ``padded_vocab_size`` as Megatron does from the tokenizer.

    Args:
        args: validated command line.
        given_ids: number of ids, where the tokenizer is not on this machine.

    Returns:
        Ids of the tokenizer, and what was assumed.
    """
    found = given_ids or _ids_of(args)
    findings = []
    if found is None:
        found = args.vocab_size or args.padded_vocab_size or _LLAMA_3_IDS
        files = _files_of(args)
        absent = [file for file in files if not Path(file).exists()]
        named = f" {', '.join(absent or files)}" if files else ""
        state = "could not be read" if files and not absent else "is not on this machine"
        findings.append(
            note(f"the tokenizer{named} {state}: {found:,} ids were assumed (--vocabulary).")
        )
    if args.padded_vocab_size is None:
        args.padded_vocab_size = calculate_padded_vocab_size(
            found, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, False
        )
    return int(found), findings


def _files_of(args: Namespace) -> list[str]:
    """What Megatron reads the tokenizer from."""
    names = ("tokenizer_model", "vocab_file", "merge_file")
    return [value for name in names if (value := getattr(args, name)) is not None]


def _ids_of(args: Namespace) -> int | None:
    """Ids of the tokenizer; None where it is not on this machine or cannot be read."""
    kind = args.tokenizer_type
    if kind in _OF_VOCAB_SIZE and args.vocab_size:
        return int(args.vocab_size)
    if kind in (*SP_TOKENIZERS, "TikTokenizer"):
        return _ids_by_megatron(args)
    if kind == "GPT2BPETokenizer":
        return _ids_of_pairs(args.vocab_file)
    return _ids_of_hugging_face(args.tokenizer_model)


def _ids_by_megatron(args: Namespace) -> int | None:
    files = _files_of(args)
    if not files or not all(Path(file).exists() for file in files):
        return None
    try:
        # A copy, in which it writes; and no code of a tokenizer is run.
        found = build_tokenizer(Namespace(**{**vars(args), "trust_remote_code": False}))
        return int(found.vocab_size)
    # Each library raises its own.
    except Exception:
        return None


def _ids_of_pairs(vocabulary: str | None) -> int | None:
    """Not by Megatron, which would ask the Hub for another file of GPT-2's tokenizer."""
    if vocabulary is None:
        return None
    try:
        return len(json.loads(Path(vocabulary).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return None


def _ids_of_hugging_face(tokenizer: str | None) -> int | None:
    """Read from its file, in no time."""
    if tokenizer is None:
        return None
    try:
        path = Path(tokenizer) / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        words = set(vocabulary) if isinstance(vocabulary, dict) else {w for w, _ in vocabulary}
        return len(words | {token["content"] for token in content.get("added_tokens", ())})
    except (OSError, KeyError, TypeError, ValueError):
        return None


def check_text(
    args: Namespace, schedule: SuperpositionSchedule
) -> tuple[list[CorpusBudget], list[Finding]]:
    """What the run reads of corpora that are on this machine.

    Args:
        args: validated command line.
        schedule: phases of the run.

    Returns:
        The budget of each corpus, none if one of them is elsewhere, and errors.
    """
    try:
        prefixes = data_path_prefixes(args)
        if not prefixes:
            return [], [note("no --data-path: the tokens were not counted.")]
        absent = [prefix for prefix in prefixes if not Path(f"{prefix}.idx").exists()]
        if absent:
            return [], [note(f"{absent[0]} is not on this machine: the tokens were not counted.")]
        for prefix in prefixes:
            check_indexed_dataset(prefix)
        if args.data_path is None:
            return [], [note("corpora by split: the tokens were not counted.")]
        return _budget(args, schedule, prefixes), []
    except UsageError as problem:
        return [], [error(str(problem))]


def _budget(
    args: Namespace, schedule: SuperpositionSchedule, prefixes: list[str]
) -> list[CorpusBudget]:
    split = convert_split_vector_to_split_matrix(
        parse_and_normalize_split(args.split or "969, 30, 1")
    )[0]
    texts = [TrainText(prefix, split[1] if split else 0.0) for prefix in prefixes]
    weights = data_weights(args)[0] or [text.tokens or 1 for text in texts]
    limit = args.tst_max_epochs or (1.0 if schedule.config.enabled else None)
    if limit is not None:
        refuse_repetition(schedule, texts, weights, limit)
    return data_budget(schedule, texts, weights)
