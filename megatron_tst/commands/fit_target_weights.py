"""Fits the weights of the tokens of a target bag to a corpus: see docs/data-tools.md."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from megatron_tst.common.atomic_files import write_file
from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import UsageError, command
from megatron_tst.corpus.mutual_information import (
    DEFAULT_PAIRS,
    DecayFit,
    Measurement,
    distance_ladder,
    entropy,
    fit_decay,
    measure,
)
from megatron_tst.corpus.token_sample import TokenSample, sample_tokens
from megatron_tst.report.corpus_plots import draw_decay

_FEWEST_DISTANCES_UP_TO = 8


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says, not yet checked against a corpus."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("prefix", type=Path, metavar="PREFIX", help="path of the corpus without .bin or .idx")
    add("--max-distance", type=int, default=64, help="tokens (default: %(default)s)")
    add(
        "--pairs",
        type=int,
        default=DEFAULT_PAIRS,
        help="pairs of tokens to sample for each distance (default: %(default)s)",
    )
    add("--across-documents", action="store_true", help="pair tokens of neighbouring documents too")
    add("--seed", type=int, default=0, help="of the choice of text (default: %(default)s)")
    add("--output", type=Path, help="folder for a picture and the numbers as JSON")
    args = parser.parse_args(arguments)
    at_least = {"max_distance": _FEWEST_DISTANCES_UP_TO, "pairs": 1000, "seed": 0}
    for name, minimum in at_least.items():
        if getattr(args, name) < minimum:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is {getattr(args, name)}: use {minimum} or more.")
    return args


def run(args: argparse.Namespace) -> None:
    """Samples, measures, fits, and reports on standard output."""
    # Here, so that --help and a wrong flag do not wait for the import of Megatron.
    from megatron_tst.corpus.inspection import open_corpus

    corpus = open_corpus(str(args.prefix))
    try:
        sample = sample_tokens(
            corpus, args.max_distance, args.pairs, args.across_documents, args.seed
        )
        measurement, quarter = _measure(sample, args.max_distance)
        fit = fit_decay(measurement, quarter, sample.documents)
    except UsageError as error:
        raise UsageError(f"{args.prefix}: {error}") from error
    _print_table(sample, measurement, fit)
    if args.output is not None:
        name = f"{args.prefix.name}-mutual-information"
        numbers = json.dumps(describe(args, sample, measurement, fit), indent=2) + "\n"
        write_file(args.output / f"{name}.png", draw_decay(measurement, fit))
        write_file(args.output / f"{name}.json", numbers.encode())
        print(f"written: {args.output / name}.png and .json")
    print(f"--tst-target-weighting power-law --tst-power-law-exponent {-fit.law.exponent:.3f}")


def _measure(sample: TokenSample, max_distance: int) -> tuple[Measurement, Measurement]:
    distances = distance_ladder(max_distance)
    console = Console(stderr=True)
    bar = track(
        distances, "distances", console=console, disable=not console.is_terminal, transient=True
    )
    return measure(sample, bar), measure(sample.quarter(), distances)


def _print_table(sample: TokenSample, measurement: Measurement, fit: DecayFit) -> None:
    law = fit.law
    print(f"{len(sample.positions):,} pairs at each distance, from {sample.documents:,} documents")
    print(f"subtracted: {measurement.baseline:.4f} nats, found between unrelated tokens")
    print(
        f"entropy of single tokens: {_entropy(sample):.4f} nats, the loss of a phase 1 that has "
        "learned their frequencies alone\n"
    )
    print("distance  I(D) in nats      fit")
    fitted = law(measurement.distances)
    for distance, value, expected in zip(
        measurement.distances, measurement.information, fitted, strict=True
    ):
        print(f"{distance:8d}  {value:12.4f}  {expected:7.4f}")
    print(
        f"\nI(D) = {law.constant:.4f} + {law.amplitude:.4f} * D^{law.exponent:.3f} "
        f"(R^2 {fit.r_squared:.4f})"
    )
    if fit.exponent_interval is None:
        print(f"exponent: no interval from only {sample.documents} documents")
    else:
        low, high = fit.exponent_interval
        print(f"exponent: 95 % between {low:.3f} and {high:.3f} over documents")
    print(f"exponent from a quarter of the pairs: {fit.quarter_exponent:.3f}")


def _entropy(sample: TokenSample) -> float:
    return entropy(sample.tokens[sample.positions])


def describe(
    args: argparse.Namespace, sample: TokenSample, measurement: Measurement, fit: DecayFit
) -> dict[str, Any]:
    """The settings and results, as plain values for JSON."""
    errors = fit.standard_errors
    return {
        "corpus": str(args.prefix),
        "max_distance": args.max_distance,
        "across_documents": args.across_documents,
        "seed": args.seed,
        "pairs": len(sample.positions),
        "documents": sample.documents,
        "distances": measurement.distances.tolist(),
        "mutual_information": measurement.information.tolist(),
        "standard_errors": None if errors is None else errors.tolist(),
        "baseline": measurement.baseline,
        "entropy": _entropy(sample),
        "constant": fit.law.constant,
        "amplitude": fit.law.amplitude,
        "exponent": fit.law.exponent,
        "exponent_interval": fit.exponent_interval,
        "exponent_from_a_quarter": fit.quarter_exponent,
        "r_squared": fit.r_squared,
        "tst_power_law_exponent": round(-fit.law.exponent, 3),
    }


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    # What Megatron and torch say about missing GPUs does not concern a tool that needs none.
    warnings.simplefilter("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    run(parse_arguments(arguments))
    return 0
