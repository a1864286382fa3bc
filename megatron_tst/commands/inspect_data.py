"""Shows what is in a corpus (.bin/.idx), and the bags that training would read from it."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from megatron_tst.common.atomic_files import write_file
from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command, read_json_object
from megatron_tst.corpus.lengths import LengthDistribution, length_distribution
from megatron_tst.corpus.outputs import with_suffix
from megatron_tst.corpus.tokenizer import load_tokenizer
from megatron_tst.report.corpus_plots import draw_lengths
from megatron_tst.settings.config import SETTINGS
from megatron_tst.settings.phases import Bags, phase_of_sample
from megatron_tst.settings.setting_fields import Words, worded
from megatron_tst.settings.size_schedule import parse_sizes
from megatron_tst.settings.step_sizes import StepSizes

if TYPE_CHECKING:
    from megatron_tst.corpus.inspection import PhaseOneSample

_SHOWN_DOCUMENTS = 5
_SHOWN_TOKENS = 64
_FIRST_POSITIONS, _LAST_POSITIONS = 6, 2
_BAR_WIDTH = 30
_PIPED_WIDTH = 160
_ORDER = {name: known for name, known in SETTINGS.items() if known.orders_text}


class TextDecoder:
    """Token ids as one line of text, or as numbers where there is no tokenizer."""

    def __init__(self, folder: Path | None) -> None:
        self._tokenizer: Any = None
        self.vocabulary_size: int | None = None
        self.sha256: str | None = None
        if folder is not None:
            loaded = load_tokenizer(folder)
            self._tokenizer = Tokenizer.from_str(loaded.definition)
            self.vocabulary_size = loaded.vocab_size
            self.sha256 = loaded.sha256

    def __call__(self, ids: Iterable[int], ignored: int | None = None) -> str:
        """The text of the ids, with everything that is not printable escaped."""
        kept = list(ids)
        if kept and all(token == ignored for token in kept):
            return "(does not count)"
        present = [token for token in kept if token != ignored]
        missing = len(kept) - len(present)
        # Without a tokenizer, or with gaps in the middle, numbers show which are missing.
        if self._tokenizer is None or ignored in kept[: len(present)]:
            return " ".join("-" if token == ignored else str(token) for token in kept)
        return repr(self._tokenizer.decode(present, skip_special_tokens=False)) + " -" * missing


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says, not yet checked against a corpus."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("prefix", type=Path, metavar="PREFIX", help="path of the corpus without .bin or .idx")
    add("--tokenizer", type=Path, help="its folder (default: PREFIX-tokenizer)")
    add("--output", type=Path, help="folder for a picture of the document lengths")
    bags = parser.add_argument_group(
        "bags of phase 1, with the values given to training"
    ).add_argument
    for name, known in _ORDER.items():
        is_needed = name == "bag_size"
        bags(
            _flag(name),
            type=known.kind,
            choices=tuple(known.choices) or None,
            metavar="S" if is_needed else None,
            help=known.flag if is_needed else f"{known.flag} (default: {known.default})",
        )
    bags("--sequence-length", type=int, metavar="L", help="--seq-length")
    bags("--sample", type=int, nargs="+", metavar="I", help="samples, counted from 0 (default: 0)")
    bags("--split", help="--split (default: all documents are for training)")
    bags("--seed", type=int, help="--seed (default: 1234)")
    bags(
        "--schedule",
        metavar="S:N,...",
        help="instead of --bag-size: sizes of --tst-schedule, each with its steps times global "
        "batch size",
    )
    bags("--bag-sizes", metavar="S,...", help="instead of --bag-size: --tst-bag-sizes")
    bags("--global-batch-size", type=int, metavar="B", help="only for --bag-sizes")
    bags(
        "--phase-1-samples",
        type=int,
        metavar="N",
        help="steps of phase 1 times global batch size (default: an epoch or more)",
    )
    return parser.parse_args(arguments)


def show_corpus(args: argparse.Namespace, console: Console) -> None:
    """Prints all that was asked for, and writes the picture."""
    from megatron_tst.corpus.inspection import open_corpus
    from megatron_tst.data.files import check_vocabulary

    _check_combination(args)
    folder = _tokenizer_folder(args)
    decode = TextDecoder(folder)
    corpus = open_corpus(str(args.prefix))
    report = _report(args.prefix)
    _check_tokenizer(args, report, decode, console)
    lengths = length_distribution(corpus.sequence_lengths)
    console.print(_summary(corpus, lengths, args.prefix))
    console.print(_octaves(lengths))
    _show_report(args.prefix, report, lengths, console)
    if args.output is not None:
        picture = args.output / f"{args.prefix.name}-lengths.png"
        write_file(picture, draw_lengths(lengths))
        console.print(f"picture: {picture}\n")
    if folder is None:
        console.print(f"{args.prefix}-tokenizer is missing: token ids follow; pass --tokenizer.\n")
    if decode.vocabulary_size is not None:
        check_vocabulary(str(args.prefix), decode.vocabulary_size)
    console.print(_document_starts(corpus, decode))
    if _has_bags(args):
        _show_bags(args, folder, decode, console)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_combination(args: argparse.Namespace) -> None:
    others = ("split", "seed", "sequence_length", "sample", "phase_1_samples", "global_batch_size")
    given = list(_given(args, (*_ORDER, *others)))
    if not _has_bags(args) and given:
        raise UsageError(f"{_flag(given[0])} goes with --bag-size, which is missing: add it.")
    for named, value in _given(args, _BAGS).items():
        if args.sequence_length is None:
            raise UsageError(
                f"{_flag(named)} {value} goes with --sequence-length, which is missing: add the "
                "--seq-length of training."
            )
    if args.global_batch_size is not None and args.bag_sizes is None:
        raise UsageError(
            f"--global-batch-size {args.global_batch_size} goes with --bag-sizes, which is "
            "missing: remove it."
        )
    for names in (_BAGS, ("phase_1_samples", "schedule")):
        both = [f"{_flag(name)} {value}" for name, value in _given(args, names).items()]
        if len(both) > 1:
            raise UsageError(
                f"{both[0]} and {both[1]} both set bag sizes or their samples: pass one of them."
            )


_BAGS = ("bag_size", "bag_sizes", "schedule")


def _has_bags(args: argparse.Namespace) -> bool:
    return bool(_given(args, _BAGS))


def _tokenizer_folder(args: argparse.Namespace) -> Path | None:
    """The folder to use; None if none was named and preprocessing left none."""
    if args.tokenizer is not None:
        path: Path = args.tokenizer
        return path.parent if path.is_file() else path
    beside = with_suffix(args.prefix, "-tokenizer")
    return beside if beside.is_dir() else None


def _report(prefix: Path) -> dict[str, Any]:
    """The summary of preprocessing; empty where there is none."""
    path = with_suffix(prefix, ".json")
    return read_json_object(path, "remove or repair it") if path.is_file() else {}


def _check_tokenizer(
    args: argparse.Namespace, report: dict[str, Any], decode: TextDecoder, console: Console
) -> None:
    expected = report.get("tokenizer_sha256", decode.sha256)
    if decode.sha256 is None or decode.sha256 == expected:
        return
    file, named = with_suffix(args.prefix, ".json"), report.get("tokenizer")
    if args.tokenizer is None:
        raise UsageError(
            f"{with_suffix(args.prefix, '-tokenizer')} is not the tokenizer of the corpus, which "
            f"{file} names ({named}): pass that one with --tokenizer."
        )
    # The same one may have been written anew.
    console.print(
        f"warning: --tokenizer {args.tokenizer} is not the file of which {file} has the SHA-256 "
        f"({named}): if it has other tokens, the text below is not that of the corpus.\n"
    )


def _summary(corpus: Any, lengths: LengthDistribution, prefix: Path) -> Table:
    sequences = len(corpus)
    megatron_documents = len(corpus.document_indices) - 1
    data_bytes = Path(f"{prefix}.bin").stat().st_size
    rows = {
        "corpus": f"{prefix}.bin ({data_bytes:,} bytes), {prefix}.idx",
        "documents": f"{lengths.documents:,} ({lengths.empty:,} empty)",
        "tokens": f"{lengths.tokens:,} ({np.dtype(corpus.index.dtype).name})",
        "tokens a document": (
            f"min {lengths.quantile(0):,}, median {lengths.quantile(0.5):,}, "
            f"mean {lengths.mean:,.1f}, p95 {lengths.quantile(0.95):,}, "
            f"max {lengths.quantile(1):,}"
        ),
    }
    if megatron_documents != sequences:
        rows["note"] = (
            f"the index groups them into {megatron_documents:,} documents; "
            "training reads and shuffles the smaller units, called documents here"
        )
    return _grid(rows)


def _grid(rows: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _octaves(lengths: LengthDistribution) -> Table:
    """Documents and tokens by powers of two of the length."""
    powers = np.concatenate(([0], 1 << np.arange(int(lengths.lengths[-1]).bit_length() + 1)))
    documents, tokens = lengths.binned(powers)
    table = Table(box=None, pad_edge=False, title_justify="left")
    for name in ("length", "documents", "of documents", "of tokens"):
        table.add_column(name, justify="right")
    table.add_column("")
    first = int(np.argmax(documents > 0))
    for low, high, number, share_of_tokens in zip(
        powers[first:-1], powers[first + 1 :], documents[first:], tokens[first:], strict=True
    ):
        share = number / lengths.documents
        table.add_row(
            f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}",
            f"{number:,}",
            f"{share:.1%}",
            f"{share_of_tokens / max(lengths.tokens, 1):.1%}",
            "#" * round(_BAR_WIDTH * number / documents.max()),
        )
    return table


def _show_report(
    prefix: Path, report: dict[str, Any], lengths: LengthDistribution, console: Console
) -> None:
    if not report:
        return
    path = with_suffix(prefix, ".json")
    rows = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in report.items()
    }
    console.print(f"\n{path}", style="bold")
    console.print(_grid(rows))
    for name, value in (("documents", lengths.documents), ("tokens", lengths.tokens)):
        if report.get(name, value) != value:
            console.print(f"warning: {path} says {report[name]:,} {name}, the index {value:,}.")
    console.print()


def _document_starts(corpus: Any, decode: TextDecoder) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("document", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("begins with", overflow="fold")
    shown = np.linspace(0, len(corpus) - 1, min(len(corpus), _SHOWN_DOCUMENTS), dtype=np.int64)
    for document in shown.tolist():
        length = int(corpus.sequence_lengths[document])
        ids = corpus.get(document, 0, min(length, _SHOWN_TOKENS)).tolist()
        table.add_row(f"{document:,}", f"{length:,}", decode(ids))
    return table


def _show_bags(
    args: argparse.Namespace, folder: Path | None, decode: TextDecoder, console: Console
) -> None:
    from megatron_tst.corpus.inspection import PhaseOne, read_phase_1

    given = {name: known.default for name, known in _ORDER.items()} | _given(args, _ORDER)
    order = _given(args, ("split", "seed"))
    with worded(Words(_flag, lambda name, value: f"{_flag(name)} {value}")):
        bags = _bags_of_schedule(args.schedule)
        if bags:
            given["bag_size"] = max(size for size, _ in bags)
        if args.bag_sizes is not None:
            given["bag_size"] = max(StepSizes.parse(args.bag_sizes).sizes)
        samples = sum(count for _, count in bags) or args.phase_1_samples
        settings = PhaseOne(
            args.sequence_length,
            {**given, "bag_sizes": args.bag_sizes},
            samples=samples,
            bags=bags,
            batch_size=args.global_batch_size,
            **order,
        )
    schedule, places = settings.schedule, args.sample or [0]
    for place, sample in zip(
        places, read_phase_1(str(args.prefix), settings, places, folder), strict=True
    ):
        given["bag_size"] = schedule.phase_of_sample(place).bag_size
        said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
        unit = f"phase {1 + phase_of_sample(schedule.phases, place)}"
        console.print(
            f"\nsample {place} of {unit}: {said}, sequence length {settings.sequence_length}, "
            f"seed {settings.seed}, split {settings.split}",
            style="bold",
        )
        documents = ", ".join(map(str, sample.documents[:8]))
        more = f" and {len(sample.documents) - 8} more" if len(sample.documents) > 8 else ""
        console.print(
            f"begins at token {sample.begin:,} of the stream; documents {documents}{more}"
        )
        console.print(_bags(sample, decode))


def _bags_of_schedule(text: str | None) -> Bags:
    if text is None:
        return ()
    sizes = parse_sizes(text)
    bags = tuple((size, count) for size, count in sizes if isinstance(count, int))
    if len(bags) < len(sizes):
        raise UsageError(
            f"--schedule is {text!r}: a corpus does not know the steps of the run; write samples, "
            "steps times global batch size, in the place of shares."
        )
    return bags


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _bags(sample: PhaseOneSample, decode: TextDecoder) -> Table:
    from megatron_tst.data.bags import IGNORE_INDEX

    table = Table(box=None, pad_edge=False)
    table.add_column("position", justify="right")
    table.add_column("input", overflow="fold")
    table.add_column("target", overflow="fold")
    length = len(sample.inputs)
    hidden = range(_FIRST_POSITIONS, length - _LAST_POSITIONS)
    for position in range(length):
        if position in hidden:
            if position == hidden[0]:
                table.add_row("...")
            continue
        table.add_row(
            str(position),
            decode(sample.inputs[position].tolist(), ignored=IGNORE_INDEX),
            decode(sample.targets[position].tolist(), ignored=IGNORE_INDEX),
        )
    return table


def silence_megatron() -> None:
    """Keeps what Megatron and torch say about missing GPUs out of a tool that needs none."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    args = parse_arguments(arguments)
    silence_megatron()
    # A terminal knows its width; a pipe or a file does not.
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    # The text of a corpus is not markup.
    show_corpus(args, Console(width=width, markup=False, highlight=False, emoji=False))
    return 0
