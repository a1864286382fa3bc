"""Shows which documents the steps of a run read, and which steps read a document."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command

if TYPE_CHECKING:
    from megatron_tst.data.tracing import TracedSample
    from megatron_tst.training.traced_run import TracedRun

_SHOWN_CHARACTERS = 60


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says, not yet checked against a run."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        required=True,
        help="folder with tensorboard/tst_run.json, an iter_... folder, or a --save folder",
    )
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--steps", metavar="A:B", help="steps A to B as the log counts them, from 1; or one step")
    what("--document", nargs="+", metavar="CORPUS:INDEX", help="which steps read these documents")
    what(
        "--spikes",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="the steps of the N highest loss spikes in the TensorBoard log (default 1)",
    )
    add("--rank", type=int, metavar="R", help="what one data-parallel rank reads")
    add("--micro-batch-size", type=int, help="of the layout of --rank (default: the last start's)")
    add(
        "--data-parallel-size", type=int, help="of the layout of --rank (default: the last start's)"
    )
    add("--data-path", nargs="+", help="corpora that have moved, as training would be given them")
    add("--words", type=int, default=12, metavar="N", help="tokens shown of each document")
    add("--json", action="store_true", help="one JSON object a line for each document of a sample")
    return parser.parse_args(arguments)


class Printer:
    """Prints samples as text or JSON."""

    def __init__(self, run: TracedRun, options: argparse.Namespace) -> None:
        self._run, self._options = run, options
        self._micro_batch_size = options.micro_batch_size or run.args.micro_batch_size
        self._ranks = options.data_parallel_size or run.args.data_parallel_size
        if options.rank is not None and not 0 <= options.rank < self._ranks:
            raise UsageError(
                f"--rank {options.rank} is not among the {self._ranks} data-parallel ranks: pass "
                "--data-parallel-size for another layout."
            )

    def show(self, samples: Iterable[TracedSample]) -> None:
        """Prints the samples that --rank reads, or all."""
        for sample in samples:
            rank = sample.rank(self._micro_batch_size, self._ranks)
            if self._options.rank not in (None, rank):
                continue
            (self._show_json if self._options.json else self._show_text)(sample, rank)

    def _show_text(self, sample: TracedSample, rank: int) -> None:
        bag_size = self._run.data.phase_at(sample.step).bag_size
        tokens = sum(passage.tokens for passage in sample.passages)
        bags = f", bags of {bag_size}" if bag_size > 1 else ""
        print(f"step {sample.step}, sample {sample.index}, rank {rank}{bags}: {tokens:,} tokens")
        for passage in sample.passages:
            name = f"{passage.corpus}:{passage.document}"
            begin, end = passage.offset, passage.offset + passage.tokens
            print(f"    {name}  tokens {begin:,} to {end - 1:,}  {self._words(passage)!r}")

    def _show_json(self, sample: TracedSample, rank: int) -> None:
        for passage in sample.passages:
            values = {"step": sample.step, "sample": sample.index, "rank": rank}
            text = {"words": self._words(passage)}
            print(json.dumps({**values, **vars(passage), **text}))

    def _words(self, passage: Any) -> str:
        ids = self._run.data.tokens(passage, self._options.words)
        text: str = self._run.tokenizer.detokenize(ids)
        return text if self._options.json else text[:_SHOWN_CHARACTERS]


def _steps(text: str) -> range:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(part or match[1]) for part in match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise UsageError(f"--steps {text!r}: write A:B with 1 <= A <= B, such as 120:121.")
    return range(first, last + 1)


def _spikes(run: TracedRun, path: Path, count: int, say: Callable[[str], None]) -> list[int]:
    """Their steps, and the step before each: its update may have done the damage."""
    from megatron_tst.report.events import read_scalars
    from megatron_tst.report.runs import NOT_LOGGED, TRAINING_LOSS
    from megatron_tst.report.spikes import find_spikes
    from megatron_tst.training.traced_run import run_file

    description = run_file(path)
    if description is None:
        raise UsageError(
            f"--spikes needs a TensorBoard log, and --run {path} has none: use --steps."
        )
    losses = read_scalars(description.parent).get(TRAINING_LOSS, NOT_LOGGED)
    spikes = find_spikes(losses, run.data.schedule)
    say(f"{len(spikes)} spikes in {len(losses.steps)} logged steps")
    steps: set[int] = set()
    for spike in spikes[:count]:
        say(f"spike at step {spike.step}: loss {spike.loss:.4f}, {spike.usual:.4f} before")
        steps.update(range(max(spike.first_step - 1, 1), spike.step + 1))
    return sorted(steps)


def _trace(options: argparse.Namespace) -> None:
    from megatron_tst.data.blend import find_corpus
    from megatron_tst.training.traced_run import open_run

    with open_run(options.run, options.data_path) as run:
        printer = Printer(run, options)
        if options.document is not None:
            for document in options.document:
                try:
                    corpus, index = find_corpus(document, run.data.corpora)
                except UsageError as error:
                    raise UsageError(f"--document {error}") from error
                printer.show(run.data.document(run.data.corpora[corpus], index))
            return
        if options.spikes is None:
            steps: Iterable[int] = _steps(options.steps)
        else:
            # Standard output has what was read, and nothing else.
            steps = _spikes(
                run, options.run, options.spikes, lambda line: print(line, file=sys.stderr)
            )
        for step in steps:
            printer.show(run.data.step(step))


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    options = parse_arguments(arguments)
    # Of Megatron, on what is not installed and what it does.
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)

    from megatron_tst import cpu

    cpu.activate()
    _trace(options)
    return 0
